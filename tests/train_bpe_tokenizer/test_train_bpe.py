"""train_bpe.py against a plain SentencePiece call and plain loops."""

import csv
import hashlib
import io
import json
import random
import subprocess
import sys

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from towerspeech import units as dsu
from towerspeech.errors import UserError
from train_bpe_tokenizer.train_bpe import Sample, draw, read_km, train_bpe

NUM_UNITS = 50


def corpus(count=120, seed=0, longest=60):
    generator = random.Random(seed)
    utterances = []
    for _ in range(count):
        units = [generator.randrange(NUM_UNITS)]
        for _ in range(generator.randint(4, longest)):
            follows = (units[-1] * 7 + 3) % NUM_UNITS
            unit = follows if generator.random() < 0.6 else generator.randrange(NUM_UNITS)
            units += [unit] if unit != units[-1] else []
        utterances.append(units)
    return utterances


def write_km(path, utterances):
    path.write_text("".join(" ".join(map(str, units)) + "\n" for units in utterances))
    return path


def pieces(folder):
    loaded = SentencePieceProcessor(model_file=str(folder / "units_bpe.model"))
    return [loaded.id_to_piece(index) for index in range(1, loaded.get_piece_size())]


def split(utterances, held_out=0.01, seed=0):
    """What is trained on and what is held out, of a corpus that is trained on whole: those of the highest keys."""
    texts = ["".join(chr(0xF0000 + unit) for unit in units) for units in utterances]
    generator = random.Random(seed)
    keys = [generator.random() for _ in texts]
    left, apart = held_out * sum(map(len, texts)), set()
    for position in sorted(range(len(texts)), key=keys.__getitem__, reverse=True):
        left -= len(texts[position])
        if left < 0:
            break
        apart.add(position)
    return [text for i, text in enumerate(texts) if i not in apart], [texts[i] for i in sorted(apart)]


def plain_sentencepiece(texts, vocab_size):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size + 3,  # and <unk>, <s>, </s>
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def test_equals_plain_sentencepiece(tmp_path):
    utterances = corpus(800)
    train_bpe([write_km(tmp_path / "a.km", utterances)], NUM_UNITS, tmp_path / "out", vocab_size=90)
    texts, held_out = split(utterances)
    assert len(texts) + len(held_out) == 800 and len(held_out) > 3
    plain = plain_sentencepiece(texts, 90)
    wanted = [plain.id_to_piece(index) for index in range(3, 93)]
    assert pieces(tmp_path / "out") == [*wanted[:40], *dsu.to_text(range(NUM_UNITS))]
    assert sorted(wanted) == sorted(pieces(tmp_path / "out"))
    ours = SentencePieceProcessor(model_file=str(tmp_path / "out/units_bpe.model"))
    assert [ours.get_score(index) for index in range(1, 91)] == [-rank for rank in range(90)]
    for text in held_out:
        assert ours.encode(text, out_type=str) == plain.encode(text, out_type=str)
    facts = json.loads((tmp_path / "out/units_bpe.json").read_text())
    counts = facts["counts"]
    assert (facts["num_units"], facts["offset"], facts["vocab_size"]) == (NUM_UNITS, 0xF0000, 90)
    assert counts["units"] == sum(map(len, utterances))
    assert counts["sampled_units"] == counts["units"] - sum(map(len, held_out))
    assert (counts["held_out_utterances"], counts["measured_on"]) == (
        len(held_out),
        f"{len(held_out)} held-out utterances",
    )
    listed = (tmp_path / "out/units_bpe.vocab").read_text().splitlines()
    ids = [dsu.to_text(map(int, line.split("\t")[0].split())) for line in listed]
    assert ids == pieces(tmp_path / "out")


def test_compression_is_that_of_vocabularies_trained_by_themselves(tmp_path):
    utterances = corpus(800)
    train_bpe([write_km(tmp_path / "a.km", utterances)], NUM_UNITS, tmp_path / "out", vocab_size=98, seed=3)
    texts, held_out = split(utterances, seed=3)
    with open(tmp_path / "out/compression.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["vocab_size"]) for row in rows] == [50, 53, 56, 62, 74, 86, 98]
    for row in rows[1:]:
        plain = plain_sentencepiece(texts, int(row["vocab_size"]))
        tokens = sum(len(plain.encode(text)) for text in held_out)
        assert (int(row["tokens"]), int(row["units"])) == (tokens, sum(map(len, held_out)))
        assert float(row["units_per_token"]) == round(sum(map(len, held_out)) / tokens, 4) > 1
    assert float(rows[0]["units_per_token"]) == 1
    assert (tmp_path / "out/compression.png").read_bytes().startswith(b"\x89PNG")


def test_report_by_hand(tmp_path):
    """The merges are 1 2, which comes three times, and 3 4, which comes twice."""
    paths = [write_km(tmp_path / "a.km", [[1, 2], [1, 2]]), write_km(tmp_path / "b.km", [[1, 2], [3, 4], [3, 4], []])]
    train_bpe(paths, NUM_UNITS, tmp_path / "out", vocab_size=52, held_out=0)
    with open(tmp_path / "out/compression.csv") as file:
        rows = [list(row.values())[:5] for row in csv.DictReader(file)]
    assert rows == [["50", "0", "10", "10", "1.0"], ["51", "1", "10", "7", "1.4286"], ["52", "2", "10", "5", "2.0"]]
    facts = json.loads((tmp_path / "out/units_bpe.json").read_text())
    assert facts["corpora_sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    counts = {name: facts["counts"][name] for name in ("utterances", "empty_utterances", "units", "units_per_token")}
    assert counts == {"utterances": 6, "empty_utterances": 1, "units": 10, "units_per_token": 2}


def test_held_out_utterances_are_a_hundredth_and_not_trained_on():
    utterances = [dsu.to_text(units) for units in corpus(2000)]
    texts, held_out, seen = draw(utterances, 20_000_000, 0.01, 0)
    assert (texts, held_out) == split(corpus(2000))
    assert seen == {"utterances": 2000, "empty_utterances": 0, "units": sum(map(len, utterances))}
    assert sorted([*texts, *held_out]) == sorted(utterances)
    assert 0.009 < sum(map(len, held_out)) / seen["units"] <= 0.01
    texts, held_out, _ = draw(utterances, 10_000, 0.01, 0)  # a sample: what is measured on is smaller too
    assert sum(map(len, texts)) <= 10_000 and 50 < sum(map(len, held_out)) <= 100
    assert draw(utterances[:20], 20_000_000, 0.01, 0)[:2] == (utterances[:20], [])


def test_parquet_and_km_give_the_same(tmp_path, make_units):
    utterances = corpus()
    make_units(tmp_path / "units", [{"units": units} for units in utterances[:70]], num_shards=1)
    rest = write_km(tmp_path / "rest.km", utterances[70:])
    train_bpe([tmp_path / "units", rest], NUM_UNITS, tmp_path / "mixed", vocab_size=80)
    train_bpe([write_km(tmp_path / "all.km", utterances)], NUM_UNITS, tmp_path / "km", vocab_size=80)
    model = (tmp_path / "mixed/units_bpe.model").read_bytes()
    assert model == (tmp_path / "km/units_bpe.model").read_bytes()


def test_units_alone_and_units_that_the_corpus_lacks(tmp_path):
    few = write_km(tmp_path / "a.km", [[1, 2, 3, 1, 2]])
    train_bpe([few], NUM_UNITS, tmp_path / "alone", vocab_size=NUM_UNITS)
    assert sorted(pieces(tmp_path / "alone")) == list(dsu.to_text(range(NUM_UNITS)))
    train_bpe([few], NUM_UNITS, tmp_path / "merged", vocab_size=NUM_UNITS + 1)
    assert pieces(tmp_path / "merged")[0] == dsu.to_text([1, 2])
    assert pieces(tmp_path / "merged")[1:] == list(dsu.to_text(range(NUM_UNITS)))
    repeated = write_km(tmp_path / "b.km", [[1, 2, 1, 2]])
    train_bpe([repeated], NUM_UNITS, tmp_path / "most", vocab_size=54)  # the most, as the message for 80 says
    assert len(pieces(tmp_path / "most")) == 54


def test_long_utterances_are_not_skipped(tmp_path):
    """SentencePiece's default drops lines above 4192 bytes = 1048 units; 16-bit positions would end at 65535."""
    generator = random.Random(0)
    long = [generator.randrange(40) for _ in range(70_000)] + [48, 49] * 3000  # the best merge lies at its end
    train_bpe([write_km(tmp_path / "a.km", [long])], NUM_UNITS, tmp_path / "out", vocab_size=NUM_UNITS + 2)
    assert dsu.to_text([48, 49]) in pieces(tmp_path / "out")[:2]


def test_sample_is_the_longest_prefix_of_a_shuffle_that_fits():
    for seed in range(30):
        texts = [dsu.to_text(units) for units in corpus(40, seed)]
        generator = random.Random(seed)
        keys = [generator.random() for _ in texts]
        sample = Sample(400)
        for position, (key, text) in enumerate(zip(keys, texts, strict=True)):
            sample.add(key, position, text)
        total, wanted = 0, []
        for index in sorted(range(len(texts)), key=keys.__getitem__):
            total += len(texts[index])
            if total > 400:
                break
            wanted.append(index)
        assert list(sample.texts().items()) == [(index, texts[index]) for index in sorted(wanted)]
        assert sample.units == sum(len(texts[index]) for index in wanted) <= 400


def test_draw_is_uniform():
    texts = [dsu.to_text([index] * 10) for index in range(20)]
    counts = [0] * 20
    for seed in range(2000):
        for text in draw(texts, 50, 0.01, seed)[0]:
            counts[ord(text[0]) - dsu.OFFSET] += 1
    assert all(420 < count < 580 for count in counts)  # 500 each, standard deviation 19


def test_repeats_are_collapsed_on_request(tmp_path):
    frames = [[unit for unit in units for _ in range(3)] for units in corpus()]
    frames_km, units_km = write_km(tmp_path / "frames.km", frames), write_km(tmp_path / "units.km", corpus())
    train_bpe([frames_km], NUM_UNITS, tmp_path / "frames", vocab_size=80, collapse=True)
    train_bpe([units_km], NUM_UNITS, tmp_path / "units", vocab_size=80)
    one, two = ((tmp_path / name / "units_bpe.model").read_bytes() for name in ("frames", "units"))
    assert one == two


def test_same_seed_same_bytes_and_done_again(tmp_path, capsys):
    source = write_km(tmp_path / "a.km", corpus())
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train_bpe([source], NUM_UNITS, tmp_path / name, vocab_size=70, max_units=1000, seed=seed)
    one, two, other = ((tmp_path / n / "units_bpe.model").read_bytes() for n in ("one", "two", "other"))
    assert one == two != other
    counts = json.loads((tmp_path / "one/units_bpe.json").read_text())["counts"]
    assert counts["sampled_units"] <= 1000 < counts["units"] and 0 < counts["share_sampled"] < 1
    capsys.readouterr()
    train_bpe([source], NUM_UNITS, tmp_path / "one", vocab_size=70, max_units=1000)
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="max_units was 1000, now 900"):
        train_bpe([source], NUM_UNITS, tmp_path / "one", vocab_size=70, max_units=900)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "a.km does not exist"),
        ("", {}, "a.km is empty"),
        ("\n\n", {}, "no units in 2 utterances"),
        ("1 2\n3 50 4\n", {}, r"a.km:2: unit id 50 is outside 0..49"),
        ("1 2\n3 x 4\n", {}, r"a.km:2: not unit ids"),
        ("1 2\n", {"vocab_size": 49}, "--vocab_size 49 is smaller than --num_units 50"),
        ("1 2 1 2\n", {"vocab_size": 80}, r"50 units and 4 merges\n.*--vocab_size 54"),
        ("1 2 3 4\n", {"held_out": 1.5}, "--held_out 1.5 is no share"),
        ("1 2 3 4\n", {"max_units": 3}, "--max_units 3 is less than one utterance"),
    ],
)
def test_bad_input(tmp_path, content, options, message):
    path = tmp_path / "a.km"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        train_bpe([path], NUM_UNITS, tmp_path / "out", **{"vocab_size": 50, **options})
    assert not list((tmp_path / "out").glob("units_bpe*")) and not (tmp_path / "out/run_info.json").exists()


@pytest.mark.parametrize(
    "word",
    [
        *("1.0", "1e3", "+3", "-1", "-0", "٣", "²", "3²", "１", "1_0", "0x10", "NaN", "inf", "3,", "[3]", "None", "a"),
        *("\ufeff3", "3\ufeff", "3\x00", "3\u00a04", "3\u20034", "3\x1c4", "9" * 21, "9" * 5000, "\U000f0003"),
    ],
)
def test_a_unit_id_is_digits_alone(tmp_path, word):
    """Named with file and line, and written so that one sees which character it is."""
    path = tmp_path / "a.km"
    path.write_bytes(f"7 8 9\n4 {word} 5\n".encode())
    with pytest.raises(UserError) as told:
        list(read_km(path, NUM_UNITS))
    assert str(told.value).startswith(f"{path}:2: not unit ids") and ascii(word[:40]) in str(told.value)


@pytest.mark.parametrize("number", [50, 2**16 + 3, 2**32 + 3, 2**63, 2**64 + 3])
def test_units_do_not_wrap(tmp_path, number):
    path = tmp_path / "a.km"
    path.write_text(f"7 8 9\n4 {number} 5\n")
    with pytest.raises(UserError, match=rf"a.km:2: unit id {number} is outside 0\.\.49"):
        list(read_km(path, NUM_UNITS))


def test_text_that_is_not_utf8(tmp_path):
    for encoded in ("7 8\n4 5\n".encode("utf-16"), b"7 \xff 8\n"):
        (tmp_path / "a.km").write_bytes(encoded)
        with pytest.raises(UserError, match="a.km:1: not unit ids"):
            list(read_km(tmp_path / "a.km", NUM_UNITS))


@pytest.mark.parametrize("empty", [b"", b"\n", b"\r\n", b" \t\n"])
def test_bom_and_empty_lines(tmp_path, empty):
    """A BOM before the first unit is no unit; an empty line is an utterance of its own."""
    path = tmp_path / "a.km"
    for bom in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(bom + b"7 8 9\r\n" + empty + b" 49\t0 ")
        wanted = ["\U000f0007\U000f0008\U000f0009", *([""] if empty else []), "\U000f0031\U000f0000"]
        assert list(read_km(path, NUM_UNITS)) == wanted
    path.write_bytes(b"\xef\xbb\xbf" + empty)
    assert "".join(read_km(path, NUM_UNITS)) == ""


def test_lines_are_counted_over_the_whole_file(tmp_path):
    """It is read in parts of 4 MB."""
    path = tmp_path / "a.km"
    path.write_text("1 2 3 4 5 6 7 8 9\n" * 300_000 + "10 x\n")
    with pytest.raises(UserError, match="a.km:300001: not unit ids.*'x'"):
        list(read_km(path, NUM_UNITS))
    path.write_text("1 2 3 4 5 6 7 8 9\n" * 300_000 + "\n10\n")
    texts = list(read_km(path, NUM_UNITS))
    assert len(texts) == 300_002 and texts[-3:] == [dsu.to_text(range(1, 10)), "", "\U000f000a"]


def test_leading_zeros_are_read(tmp_path):
    train_bpe([write_km(tmp_path / "a.km", [[1, 2, 1, 2]])], NUM_UNITS, tmp_path / "one", vocab_size=51)
    (tmp_path / "b.km").write_text("01 002 1\t2\r\n")
    train_bpe([tmp_path / "b.km"], NUM_UNITS, tmp_path / "two", vocab_size=51)
    assert (tmp_path / "one/units_bpe.model").read_bytes() == (tmp_path / "two/units_bpe.model").read_bytes()


@pytest.mark.parametrize("name", [".", "units-00000-of-00001.parquet"])
def test_units_of_two_kmeans_are_refused(tmp_path, make_units, name):
    folders = [make_units(tmp_path / name, 20) for name in ("a", "b")]
    for folder, kmeans in zip(folders, ("1", "2"), strict=True):
        (folder / "units-00000-of-00001.run_info.json").write_text(
            json.dumps({"inputs": {"kmeans": [kmeans]}, "outputs": {}})
        )
    with pytest.raises(UserError, match="a.* and .*b.* were labelled with different k-means"):
        train_bpe([folder / name for folder in folders], NUM_UNITS, tmp_path / "out", vocab_size=50)
    assert not (tmp_path / "out").exists()


def test_bad_input_num_units_and_parquet(tmp_path, make_units):
    folder = make_units(tmp_path / "units", [{"units": [1, 2]}, {"units": [3, 60], "id": "bad"}])
    with pytest.raises(UserError, match=r"units-00000-of-00001.parquet, row 2 \(id bad\): unit id 60"):
        train_bpe([folder], NUM_UNITS, tmp_path / "out", vocab_size=50)
    for wrong in (-1, 0, 1, 65_535, 70_000):
        with pytest.raises(UserError, match=f"--num_units is {wrong:,}.*\n.*2 to 65,534"):  # before what else is wrong
            train_bpe([tmp_path / "no"], wrong, tmp_path / "out2", vocab_size=-1, max_units=-1)
    assert not (tmp_path / "out2").exists()


def test_the_most_units_reach_to_the_end_of_plane_15(tmp_path):
    source = write_km(tmp_path / "a.km", [[0, 65_533, 0, 65_533]])
    train_bpe([source], 65_534, tmp_path / "out", vocab_size=65_535)
    found = pieces(tmp_path / "out")
    assert (found[0], found[1], found[-1], len(found)) == ("\U000f0000\U000ffffd", "\U000f0000", "\U000ffffd", 65_535)


@pytest.mark.parametrize("script", ["train_bpe", "merge_tokenizer", "extend_model"])
def test_help_loads_no_large_library_and_flags_are_exact(script):
    path = f"train_bpe_tokenizer/{script}.py"
    told = [sys.executable, "-X", "importtime", path, "--help"]
    shown = subprocess.run(told, capture_output=True, text=True, check=True)
    assert "--output_dir" in shown.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert "towerspeech" in imported
    assert not imported & {"torch", "transformers", "tokenizers", "sentencepiece", "pyarrow", "numpy", "matplotlib"}
    wrong = subprocess.run([sys.executable, path, "--output", "x"], capture_output=True, text=True)
    assert wrong.returncode and "Traceback" not in wrong.stderr


def test_command_line_error_is_one_message(tmp_path):
    command = ["--units", str(tmp_path / "no.km"), "--num_units", "50", "--output_dir", str(tmp_path / "out")]
    script = [sys.executable, "train_bpe_tokenizer/train_bpe.py"]
    failed = subprocess.run([*script, *command], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
