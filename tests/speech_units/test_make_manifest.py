"""make_manifest.py: corpora in their real layouts, against lhotse, pandas and what the trees were made of."""

import csv
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from speech_units import corpora, utterances
from speech_units.make_manifest import make_manifest
from tests.corpus_trees import CORPORA, audio_bytes, row, tone, write
from tests.corpus_trees import common_voice as common_voice_tree
from tests.corpus_trees import europarl_st as europarl_tree
from tests.corpus_trees import fleurs as fleurs_tree
from tests.corpus_trees import mls as mls_tree
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.manifests import read_manifest, segment
from towerspeech.records import read_jsonl
from towerspeech.texts import FIELDS, iter_parallel

ROOT = Path(__file__).parents[2]
SPLITS = {name: "TEST" if name == "gigaspeech" else "test" for name in CORPORA}


def made(output: Path, **arguments) -> dict[str, dict]:
    """The manifest's rows by id, which read_manifest accepts, of a run with these arguments."""
    make_manifest(output, **arguments)
    rows = {
        row["id"]: {k: v for k, v in row.items() if k != "where"} for row in read_manifest(output / "manifest.jsonl")
    }
    info = json.loads((output / "run_info.json").read_text())
    assert info["counts"]["utterances"] == len(rows)
    assert info["counts"]["hours"] == pytest.approx(sum(row["duration_s"] for row in rows.values()) / 3600, abs=1e-4)
    number_dropped = sum(reason["utterances"] for reason in info["counts"]["dropped"].values())
    assert number_dropped == len(dropped(output))
    return rows


def dropped(output: Path) -> list[dict]:
    lines = (output / "dropped.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def reasons(output: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in dropped(output)}


def pairs(output: Path) -> set:
    rows = [pair for _, pair in iter_parallel(output / "translations.jsonl")]
    assert all(pair["src_lang"] == "en" and set(pair) == {*FIELDS} for pair in rows)
    found = {(pair["id"], pair["tgt_lang"], pair["source"], pair["target"]) for pair in rows}
    assert len(found) == len(rows)
    return found


def same(found: dict, wanted: dict) -> None:
    assert list(found) == list(wanted)
    for name, fields in wanted.items():
        times = {field: pytest.approx(value, abs=1e-6) for field, value in fields.items() if field.endswith("_s")}
        assert found[name] == fields | times


def nemo(path: Path, *rows: dict | str) -> Path:
    return write(path, *(row if isinstance(row, str) else json.dumps(row) for row in rows))


# --- Corpora --------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("corpus", CORPORA)
def test_each_corpus_is_read_from_its_folder_or_one_or_two_above(corpus, levels, tmp_path):
    folder = tmp_path.joinpath("data", *["deeper"] * levels)
    wanted = CORPORA[corpus](folder)
    wanted, translated = wanted if isinstance(wanted, tuple) else (wanted, None)
    found = made(tmp_path / "out", corpus=corpus, root=tmp_path / "data", split=SPLITS[corpus])
    same(found, {k: v | {"audio": "deeper/" * levels + v["audio"]} for k, v in wanted.items()})
    for fields in found.values():  # an audio path is below --root, and is that recording
        if "member" not in fields:
            whole = soundfile.info(tmp_path / "data" / fields["audio"]).duration
            assert segment(fields)[0] + fields["duration_s"] <= whole + 1e-6
    if translated is None:
        assert not (tmp_path / "out/translations.jsonl").exists()
    else:
        assert pairs(tmp_path / "out") == translated
    assert {*reasons(tmp_path / "out").values()} == ({"garbage"} if corpus == "gigaspeech" else set())


@pytest.mark.parametrize("asked", CORPORA)
@pytest.mark.parametrize("there", CORPORA)
def test_another_corpus_is_told(asked, there, tmp_path):
    CORPORA[there](tmp_path / "data")
    if asked == there or (asked, there) == ("common_voice", "covost2"):
        return  # Common Voice is there beside CoVoST
    with pytest.raises(UserError, match=f"it looks like {there}\n  -> use --corpus {there}"):
        make_manifest(tmp_path / "out", corpus=asked, root=tmp_path / "data", split=SPLITS[asked])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_nothing_and_a_split_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no test/\*/\*/\*.trans.txt, there or up to 2 levels below\n  -> give the"):
        make_manifest(tmp_path / "out", corpus="librispeech", root=tmp_path / "empty", split="test")
    with pytest.raises(UserError, match="nowhere is no folder"):
        make_manifest(tmp_path / "out", corpus="librispeech", root=tmp_path / "nowhere", split="test")
    for corpus in CORPORA:
        CORPORA[corpus](tmp_path / corpus)
        with pytest.raises(UserError, match="-> check --split"):
            make_manifest(tmp_path / "out" / corpus, corpus=corpus, root=tmp_path / corpus, split="noon")
        assert not (tmp_path / "out" / corpus / "manifest.jsonl").exists()


def test_two_copies_are_refused(tmp_path):
    for copy in ("a", "b"):
        CORPORA["librispeech"](tmp_path / "data" / copy)
    with pytest.raises(UserError, match="several copies of librispeech"):
        make_manifest(tmp_path / "out", corpus="librispeech", root=tmp_path / "data", split="test")


def test_mls_in_opus_and_beside_another_language(tmp_path):
    wanted = mls_tree(tmp_path / "mls_english_opus", ".opus")
    mls_tree(tmp_path / "mls_german_opus", ".opus")
    found = made(tmp_path / "out", corpus="mls", root=tmp_path, split="test")
    same(found, {k: v | {"audio": f"mls_english_opus/{v['audio']}"} for k, v in wanted.items()})


def test_fleurs_unpacked_and_its_own_folder_as_root(tmp_path):
    wanted, translated = fleurs_tree(tmp_path / "fleurs", packed=False)
    found = made(tmp_path / "out", corpus="fleurs", root=tmp_path / "fleurs/en_us", split="test", text="raw")
    texts = {source for _, _, source, _ in translated}
    assert {row["text"] for row in found.values()} == texts
    assert [row["audio"] for row in found.values()] == [f"audio/test/{name}.wav" for name in wanted]
    assert pairs(tmp_path / "out") == translated


def test_fleurs_names_a_missing_archive(tmp_path):
    fleurs_tree(tmp_path)
    (tmp_path / "en_us/audio/test.tar.gz").unlink()
    with pytest.raises(UserError, match=r"neither .*audio/test.tar.gz nor"):
        make_manifest(tmp_path / "out", corpus="fleurs", root=tmp_path, split="test")


def test_europarl_without_libsndfiles_formats_says_how_to_convert(tmp_path):
    europarl_tree(tmp_path / "a", ".m4a")
    with pytest.raises(UserError, match=r"\.m4a alone.*\n.*ffmpeg -i \"\$f\" -ac 1 -ar 16000 \"\$\{f%.m4a\}.flac\""):
        make_manifest(tmp_path / "out", corpus="europarl_st", root=tmp_path / "a", split="test")
    wanted, _ = europarl_tree(tmp_path / "b", ".wav")
    shutil.move(tmp_path / "b/en/audios", tmp_path / "b/en/audios_wav")
    found = made(tmp_path / "out", corpus="europarl_st", root=tmp_path / "b", split="test")
    assert {row["audio"] for row in found.values()} == {"en/audios_wav/en.20080925.26.4-036.wav"}
    with open(tmp_path / "b/en/de/test/segments.de", "a") as file:
        file.write("Noch eine.\n")
    with pytest.raises(UserError, match="segments.de and segments.lst have unequal numbers of lines"):
        make_manifest(tmp_path / "out2", corpus="europarl_st", root=tmp_path / "b", split="test")


def test_a_segment_twice_in_one_europarl_list_is_a_duplicate(tmp_path):
    wanted, translated = europarl_tree(tmp_path)
    for ending in ("lst", "en", "de"):
        path = tmp_path / f"en/de/test/segments.{ending}"
        path.write_text(path.read_text() + path.read_text().splitlines()[0].replace("Danke", "Nochmal") + "\n")
    found = made(tmp_path / "out", corpus="europarl_st", root=tmp_path, split="test", max_bad_share=0.5)
    same(found, wanted)
    assert pairs(tmp_path / "out") == translated
    assert reasons(tmp_path / "out") == {next(iter(wanted)): "duplicate id"}


def test_covost_equals_pandas_merge(tmp_path):
    """CoVoST's own script reads and joins the TSVs so."""
    import pandas

    CORPORA["covost2"](tmp_path)
    validated = tmp_path / "cv-corpus-4-2019-12-10/en/validated.tsv"
    german = tmp_path / "covost_v2.en_de.tsv"
    with open(german, "a") as file:
        file.write('common_voice_en_3.mp3\tMit \\\\ und "Zeichen\ttrain_covost\n')
    read = {"sep": "\t", "escapechar": "\\", "quoting": csv.QUOTE_NONE, "na_filter": False}
    joined = pandas.merge(pandas.read_csv(validated, **read), pandas.read_csv(german, **read), how="inner", on="path")
    for split in ("train", "test"):
        out = tmp_path / f"out-{split}"
        make_manifest(out, corpus="covost2", root=tmp_path, split=split, text="raw")
        wanted = joined[joined.split.isin([split, "train_covost"] if split == "train" else [split])]
        wanted = {(Path(r.path).stem, "de", r.sentence, r.translation) for r in wanted.itertuples()}
        assert len(wanted) and {pair for pair in pairs(out) if pair[1] == "de"} == wanted


def test_translations_left_out_are_counted(tmp_path):
    CORPORA["covost2"](tmp_path)
    german = tmp_path / "covost_v2.en_de.tsv"
    german.write_text(german.read_text().replace("Nein.", " ").replace("Hallo", "Hallo\U000f0001"))
    found = made(tmp_path / "out", corpus="covost2", root=tmp_path, split="test")
    assert len(found) == 2 and {code for _, code, *_ in pairs(tmp_path / "out")} == {"zh"}
    counts = json.loads((tmp_path / "out/run_info.json").read_text())["counts"]
    assert counts["translations"] == {"left out": 2, "zh": 1}


def test_covost_lists_what_common_voice_lacks(tmp_path):
    CORPORA["covost2"](tmp_path)
    with open(tmp_path / "covost_v2.en_de.tsv", "a") as file:
        file.write("common_voice_en_99.mp3\tWeg.\ttest\n")
    make_manifest(tmp_path / "out", corpus="covost2", root=tmp_path, split="test", max_bad_share=0.5)
    assert reasons(tmp_path / "out") == {"common_voice_en_99": "missing audio (not in validated.tsv)"}


# --- lhotse's recipes, where they run -------------------------------------------------------------
def lhotse_rows(supervisions, recordings) -> dict:
    found = {}
    for supervision in supervisions:
        recording = recordings[supervision.recording_id]
        audio = Path(recording.sources[0].source)
        found[supervision.id] = (audio, supervision.text, recording.duration, supervision.speaker)
    return found


def our_rows(rows: dict, root: Path) -> dict:
    return {
        name: (root / row["audio"], row["text"], pytest.approx(row["duration_s"], abs=1e-4), row["speaker"])
        for name, row in rows.items()
    }


def test_librispeech_equals_lhotses_recipe(tmp_path):
    from lhotse.recipes import prepare_librispeech

    CORPORA["librispeech"](tmp_path)
    theirs = prepare_librispeech(tmp_path, dataset_parts="test")["test"]
    ours = made(tmp_path / "out", corpus="librispeech", root=tmp_path, split="test", text="raw")
    assert our_rows(ours, tmp_path) == lhotse_rows(theirs["supervisions"], theirs["recordings"])


def test_mls_equals_lhotses_recipe(tmp_path):
    from lhotse.recipes import prepare_mls

    mls_tree(tmp_path / "data/mls_english")
    theirs = prepare_mls(tmp_path / "data", opus=False)["english"]["test"]
    ours = made(tmp_path / "out", corpus="mls", root=tmp_path / "data", split="test", text="raw")
    assert our_rows(ours, tmp_path / "data") == lhotse_rows(theirs["supervisions"], theirs["recordings"])


def test_common_voice_equals_lhotses_recipe(tmp_path):
    from lhotse.recipes.commonvoice import _parse_utterance

    common_voice_tree(tmp_path, accents="", variant="")
    with open(tmp_path / "en/test.tsv") as file:  # the recipe's own loop, without its processes
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    parsed = [_parse_utterance(tmp_path / "en", "en", row) for row in rows]
    theirs = lhotse_rows([s for _, s in parsed], {recording.id: recording for recording, _ in parsed})
    ours = made(tmp_path / "out", corpus="common_voice", root=tmp_path, split="test", text="raw")
    assert our_rows(ours, tmp_path) == theirs


# --- Texts ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("corpus", "text", "wanted"),
    [
        ("librispeech", " IT'S  LATE", "it's late"),
        ("mls", "it's  late", "it's late"),
        ("gigaspeech", "WELL <COMMA> WHO <QUESTIONMARK> ME <EXCLAMATIONPOINT> OK <PERIOD>", "well, who? me! ok."),
        ("spgispeech", "Up 5%, “sharply”. ", "Up 5%, “sharply”."),
        ("voxpopuli", "as\tit is", "as it is"),
        ("fleurs", '"As it is"', '"As it is"'),
        ("europarl_st", '"As it is"', '"As it is"'),
        ("common_voice", '"All of it."', "All of it."),
        ("common_voice", '"Some" and "some"', '"Some" and "some"'),
        ("common_voice", '"He said ""hi"" to me."', 'He said "hi" to me.'),
        ("common_voice", '"""Hi"" she said ""ok"""', '"Hi" she said "ok"'),
        ("common_voice", '""Twice""', "Twice"),
        ("common_voice", "“All”", "All"),
        ("common_voice", "“Some” and “some”", "“Some” and “some”"),
        ("common_voice", "‘tis the boys’", "tis the boys"),
        ("common_voice", '"No end', '"No end'),
        ("common_voice", '"', '"'),
        ("covost2", "„So ist es.“", "So ist es."),
        (None, " as  It is ", "as It is"),
    ],
)
def test_text_rules(corpus, text, wanted):
    assert corpora.clean(corpus, text) == wanted


@pytest.mark.parametrize("garbage", ["<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"])
@pytest.mark.parametrize("text", ["clean", "raw"])
def test_gigaspeechs_garbage_is_left_out_and_raw_text_is_the_corpuss(garbage, text, tmp_path):
    CORPORA["gigaspeech"](tmp_path)
    path = tmp_path / "GigaSpeech.json"
    path.write_text(path.read_text().replace("<MUSIC>", garbage))
    found = made(tmp_path / "out", corpus="gigaspeech", root=tmp_path, split="{TEST}", text=text)
    assert dropped(tmp_path / "out") == [
        {
            "id": "POD1_S0000001",
            "audio": "audio/podcast/P1/POD1.opus",
            "reason": "garbage",
            "where": "GigaSpeech.json, POD1_S0000001",
        }
    ]
    assert found["POD1_S0000000"]["text"] == ("WELL <COMMA> YES <PERIOD>" if text == "raw" else "well, yes.")
    counts = json.loads((tmp_path / "out/run_info.json").read_text())["counts"]
    assert counts["dropped"] == {"garbage": {"utterances": 1, "hours": 0.0002, "of_unknown_length": 0}}


def test_voxpopulis_two_columns(tmp_path):
    CORPORA["voxpopuli"](tmp_path)
    for text, wanted in (("clean", ["madam president", "so"]), ("raw", ['"Madam President!', "So."])):
        found = made(tmp_path / text, corpus="voxpopuli", root=tmp_path, split="test", text=text)
        assert [row["text"] for row in found.values()] == wanted


def test_text_rules_do_not_count_as_bad(tmp_path):
    tone(tmp_path / "a.wav", 1)
    rows = [{"audio_filepath": "a.wav", "offset": i / 10, "duration": 0.1, "text": t} for i, t in enumerate("ab")]
    empty = [{**rows[0], "offset": 0.5 + i / 10, "text": t} for i, t in enumerate(["", " \t", "a\U000f0001"])]
    found = made(tmp_path / "out", nemo=nemo(tmp_path / "m.json", *rows, *empty), max_bad_share=0.0)
    assert [row["text"] for row in found.values()] == ["a", "b"]
    units = "characters that are for speech units"
    assert [row["reason"] for row in dropped(tmp_path / "out")] == ["no transcript", "no transcript", units]


# --- Bad rows -------------------------------------------------------------------------------------
BAD = {
    "missing": ({"audio_filepath": "gone.wav", "duration": 1.0, "text": "a"}, "missing audio"),
    "empty file": ({"audio_filepath": "empty.wav", "duration": 1.0, "text": "a"}, "unreadable audio"),
    "no samples": ({"audio_filepath": "none.wav", "text": "a"}, "unreadable audio (it holds 0 samples)"),
    "not UTF-8 text": ({"audio_filepath": "a.wav", "offset": 1, "text": "\ud800"}, "malformed line"),
    "a number as text": ({"audio_filepath": "a.wav", "offset": 2, "text": 5}, "malformed line"),
    "no audio": ({"text": "a"}, "malformed line"),
    "NaN": ('{"audio_filepath": "a.wav", "offset": NaN, "duration": 1, "text": "a"}', "malformed line"),
    "infinite": ('{"audio_filepath": "a.wav", "offset": 1e999, "duration": 1, "text": "a"}', "ends before it starts"),
    "before": ({"audio_filepath": "a.wav", "offset": -1, "duration": 2, "text": "a"}, "malformed line"),
    "no JSON": ("{", "malformed line"),
    "a list": ("[1]", "malformed line"),
    "twice": ({"audio_filepath": "a.wav", "offset": 0.0, "duration": 0.5, "text": "a"}, "duplicate id"),
    "beyond": ({"audio_filepath": "a.wav", "offset": 9.5, "duration": 0.56, "text": "a"}, "ends after its recording"),
    "after": ({"audio_filepath": "a.wav", "offset": 10.0, "text": "a"}, "ends after its recording"),
    "backwards": ({"audio_filepath": "a.wav", "offset": 3.0, "duration": -1, "text": "a"}, "ends before it starts"),
    "an archive's name": ({"audio_filepath": "a.tar", "text": "a"}, "malformed line"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_row_is_listed_and_left_out_up_to_a_share(name, tmp_path):
    bad, reason = BAD[name]
    tone(tmp_path / "a.wav", 10)
    shutil.copy(tmp_path / "a.wav", tmp_path / "a.tar")
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "none.wav", [], 16000)
    good = [{"audio_filepath": "a.wav", "offset": i / 10, "duration": 0.5, "text": f"t{i}"} for i in range(80)]
    path = nemo(tmp_path / "m.json", *good[:40], bad, *good[40:])
    found = made(tmp_path / "out", nemo=path, max_bad_share=0.0125)
    assert [row["text"] for row in found.values()] == [f"t{i}" for i in range(80)]
    [listed] = dropped(tmp_path / "out")
    assert listed["reason"].startswith(reason) and listed["where"] == "m.json:41"
    with pytest.raises(
        UserError, match=rf"1 of 81 rows are bad, more than 1.20%: 1 {reason.split(' (')[0]} \(first: "
    ):
        make_manifest(tmp_path / "out2", nemo=path, max_bad_share=0.012)
    assert not [file for file in (tmp_path / "out2").iterdir() if not file.name.startswith(".")]


def test_all_bad_ends_early(tmp_path):
    path = nemo(tmp_path / "m.json", *({"audio_filepath": f"{i}.wav", "text": "a"} for i in range(12_000)))
    with pytest.raises(UserError, match="of 10,000 rows none can be used: 10,000 missing audio.*\n  -> check --root"):
        make_manifest(tmp_path / "out", nemo=path)


def test_bad_lines_of_tables(tmp_path):
    """A column too few or many, bytes that are no UTF-8; a byte order mark and CRLF are none."""
    CORPORA["common_voice"](tmp_path)
    path = tmp_path / "en/test.tsv"
    lines = path.read_bytes().splitlines()
    lines += [b"c\tcommon_voice_en_4.mp3", lines[1] + b"\tmore", b"\xff" + lines[2], b""]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    found = made(tmp_path / "out", corpus="common_voice", root=tmp_path, split="test", max_bad_share=0.6)
    assert len(found) == 3
    listed = [(row["reason"], row["where"]) for row in dropped(tmp_path / "out")]
    assert listed == [("malformed line", f"test.tsv:{line}") for line in (5, 6, 7)]


def test_a_damaged_gzip_is_one_error(tmp_path):
    CORPORA["voxpopuli"](tmp_path)
    path = tmp_path / "asr_en.tsv.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"asr_en.tsv.gz:\d+: cannot be read"):
        make_manifest(tmp_path / "out", corpus="voxpopuli", root=tmp_path, split="test")


def test_segments_and_their_recordings_end(tmp_path):
    """A segment may end a little after its recording: it is cut there. What is all of it is no segment."""
    tone(tmp_path / "a.wav", 2)
    times = [(0, 2), (0, 2.04), (0, 1.96), (0, 1.9), (1.5, 0.54), (1.5, None), (0.25, 0.5)]
    rows = [{"audio_filepath": "a.wav", "offset": o, "duration": d, "text": "a"} for o, d in times]
    found = made(tmp_path / "out", nemo=nemo(tmp_path / "m.json", *rows))
    seen = [(row.get("start_s"), row.get("end_s"), row["duration_s"]) for row in found.values()]
    whole = (None, None, 2)
    assert seen == [whole] * 3 + [(0, 1.9, 1.9), (1.5, 2, 0.5), (1.5, None, 0.5), (0.25, 0.75, 0.5)]


# --- GigaSpeech's large JSON ----------------------------------------------------------------------
def test_json_of_any_size_is_read_in_chunks(tmp_path, monkeypatch):
    items = [{"n": i, "text": 'x"]}[{é' * (i % 50), "list": [{"a": []}]} for i in range(300)]
    path = tmp_path / "g.json"
    for indent in (None, 1):
        path.write_text(json.dumps({"other": "audios", "audios": items, "more": [1]}, indent=indent))
        for chunk in (7, 1000, 1 << 20):
            monkeypatch.setattr(corpora, "CHUNK", chunk)
            assert list(corpora.list_items(path, "audios")) == items
    path.write_text(path.read_text()[:3000])
    with pytest.raises(UserError, match="g.json: not JSON"):
        list(corpora.list_items(path, "audios"))
    path.write_bytes(b'{"audios": ["\xff"]}')
    with pytest.raises(UserError, match="g.json: not UTF-8"):
        list(corpora.list_items(path, "audios"))
    path.write_text('{"other": []}')
    with pytest.raises(UserError, match="no list 'audios'"):
        list(corpora.list_items(path, "audios"))


def test_a_large_json_takes_little_memory(tmp_path):
    with open(tmp_path / "g.json", "w") as file:
        file.write('{"audios": [')
        for number in range(3000):
            file.write(("," if number else "") + json.dumps({"segments": ["x" * 20_000]}))
        file.write("]}")
    tracemalloc.start()
    assert sum(1 for _ in corpora.list_items(tmp_path / "g.json", "audios")) == 3000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 15e6  # of 60 MB


# --- Forms ----------------------------------------------------------------------------------------
def lhotse_cuts(folder: Path, **recording):
    """A recording of 3 s and cuts of it; audio paths are as ``folder`` makes them."""
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
    from lhotse.audio import AudioSource

    tone(folder / "rec.wav", 3)
    source = AudioSource("file", [0], "rec.wav")
    rec = Recording(
        **{"id": "rec", "sources": [source], "sampling_rate": 16000, "num_samples": 48000, "duration": 3.0} | recording
    )
    cuts = []
    for number, (start, duration) in enumerate([(0.5, 1.25), (0.0, 3.0), (2.0, 1.0)]):
        texts = ["one", "two"] if number == 0 else [f"text {number}"]
        supervisions = [SupervisionSegment(f"s{t}", "rec", 0, 0.5, text=t, speaker="ann") for t in texts]
        cuts.append(MonoCut(f"c{number}", start, duration, 0, supervisions=supervisions, recording=rec))
    return CutSet.from_cuts(cuts)


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_cuts(name, tmp_path):
    lhotse_cuts(tmp_path).to_file(tmp_path / name)
    same(
        made(tmp_path / "out", cuts=tmp_path / name),
        row("c0", "rec.wav", "one two", 1.25, start_s=0.5, end_s=1.75, speaker="ann")
        | row("c1", "rec.wav", "text 1", 3.0, speaker="ann")
        | row("c2", "rec.wav", "text 2", 1.0, start_s=2.0, end_s=3.0, speaker="ann"),
    )


def test_cuts_that_are_not_one_channel_of_one_file(tmp_path):
    from lhotse import CutSet, MonoCut, Recording
    from lhotse.audio import AudioSource

    cuts = list(lhotse_cuts(tmp_path))
    command = lhotse_cuts(tmp_path, sources=[AudioSource("command", [0], "cat rec.wav")])[0].with_id("command")
    stereo = Recording("rec", [AudioSource("file", [0, 1], "rec.wav")], 16000, 48000, 3.0, channel_ids=[0, 1])
    mixed = cuts[0].append(cuts[2]).with_id("mixed")
    padded = cuts[0].pad(duration=5).with_id("padded")
    multi = stereo.to_cut().with_id("multi")
    one_of_two = lhotse_cuts(tmp_path, sources=stereo.sources, channel_ids=[0, 1])[0].with_id("one of two")
    fast = cuts[0].perturb_speed(1.1).with_id("fast")
    resampled = cuts[0].resample(8000).with_id("resampled")
    features = MonoCut("features", 0, 1, 0, supervisions=cuts[0].supervisions)
    everything = [*cuts, command, mixed, padded, multi, one_of_two, fast, resampled, features]
    CutSet.from_cuts(everything).to_file(tmp_path / "cuts.jsonl")
    with open(tmp_path / "cuts.jsonl", "a") as file:
        file.write('{"id": "x", "type": "MonoCut"}\n')
    found = made(tmp_path / "out", cuts=tmp_path / "cuts.jsonl", max_bad_share=0.9)
    assert list(found) == ["c0", "c1", "c2", "resampled"]
    not_one = dict.fromkeys(["mixed", "padded", "multi", "one of two", "features"], "not one channel of one recording")
    others = {
        "command": "its audio is no file (command)",
        "fast": "its audio is no file (its Speed)",
        "": "malformed line",
    }
    assert reasons(tmp_path / "out") == not_one | others


def test_shar(tmp_path, monkeypatch):
    """Its tar files hold each cut's audio: lhotse reads the same samples."""
    import tarfile

    from lhotse import CutSet
    from lhotse.shar import SharWriter

    monkeypatch.chdir(tmp_path)
    (tmp_path / "shar").mkdir()
    with SharWriter(tmp_path / "shar", fields={"recording": "flac"}, shard_size=2) as writer:
        for cut in lhotse_cuts(tmp_path):
            writer.write(cut)
    found = made(tmp_path / "out", cuts=tmp_path / "shar")
    assert [row["audio"] for row in found.values()] == [f"recording.00000{i}.tar" for i in (0, 0, 1)]
    for cut in CutSet.from_shar(in_dir=tmp_path / "shar"):
        fields = found[cut.id]
        with tarfile.open(tmp_path / "shar" / fields["audio"]) as tar:
            samples, _ = soundfile.read(tar.extractfile(fields["member"]), dtype="float32")
        assert (samples == cut.load_audio()[0]).all()
        assert fields["duration_s"] == cut.duration and segment(fields) == (0, None)


def test_without_lhotse_cuts_name_the_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse.serialization", None)
    with pytest.raises(UserError, match="lhotse is not installed.*\n  -> bash install.sh corpora"):
        make_manifest(tmp_path / "out", cuts=write(tmp_path / "c.jsonl", "{}"))


def test_nemo_with_a_root_and_audio_outside_of_it(tmp_path):
    tone(tmp_path / "audio/x/a.wav", 1)
    tone(tmp_path / "b.wav", 2)
    rows = [
        {"audio_filepath": "x/a.wav", "duration": 1.0, "text": "whole"},
        {"audio_filepath": str(tmp_path / "audio/x/a.wav"), "offset": 0.25, "duration": 0.5, "text": "part"},
        {"audio_filepath": "../b.wav", "duration": 2.0, "text": "outside"},
    ]
    outside = str(tmp_path / "b.wav")
    same(
        made(tmp_path / "out", nemo=nemo(tmp_path / "m.json", *rows), root=tmp_path / "audio"),
        row("x/a", "x/a.wav", "whole", 1.0)
        | row("x/a-250-750", "x/a.wav", "part", 0.5, start_s=0.25, end_s=0.75)
        | row(outside[:-4], outside, "outside", 2.0),
    )


@pytest.mark.parametrize("ending", [".wrd", ".ltr"])
def test_fairseq(ending, tmp_path):
    seconds = [tone(tmp_path / f"audio/s/{name}.flac", 0.5 + name / 8) for name in range(2)]
    path = write(tmp_path / "lists/t.tsv", str(tmp_path / "audio"), "s/0.flac\t8000", "s/1.flac\t10000")
    texts = {".wrd": ["HE SAID", "NO"], ".ltr": ["H E | S A I D |", "N O |"]}[ending]
    write(path.with_suffix(ending), *(f"{said}\r" for said in texts))
    wanted = row("s/0", "s/0.flac", "HE SAID", seconds[0]) | row("s/1", "s/1.flac", "NO", seconds[1])
    same(made(tmp_path / "out", fairseq=path, text="raw"), wanted)
    write(path.with_suffix(ending), "HE SAID")
    with pytest.raises(UserError, match=rf"t.tsv has 2 rows, but t{ending} 1 lines"):
        make_manifest(tmp_path / "out2", fairseq=path)
    path.with_suffix(ending).unlink()
    with pytest.raises(UserError, match="neither t.wrd nor t.ltr is beside it"):
        make_manifest(tmp_path / "out2", fairseq=path)


def test_kaldi_with_segments(tmp_path):
    tone(tmp_path / "rec1.wav", 3)
    data = tmp_path / "data"
    write(
        data / "wav.scp",
        "rec1 rec1.wav",
        f"rec2 touch {tmp_path}/ran |",
        f"rec3 touch {tmp_path}/ran |",
        "rec4 a.ark:17",
    )
    write(
        data / "segments",
        "u1 rec1 0.5 1.5",
        "u2 rec1 1.5 -1",
        "u3 rec2 0 1",
        "u4 rec9 0 1",
        "u5 rec4 0 1",
        "u6 rec1 1 2",
    )
    write(data / "text", "u1 HE SAID", "u2 NO", "u3 A", "u4 B", "u5 C", "u7 D")
    write(data / "utt2spk", "u1 ann", "u2 bob", "u3 ann")
    found = made(tmp_path / "out", kaldi=data, root=tmp_path, max_bad_share=0.9)
    same(
        found,
        row("u1", "rec1.wav", "HE SAID", 1.0, start_s=0.5, end_s=1.5, speaker="ann")
        | row("u2", "rec1.wav", "NO", 1.5, start_s=1.5, speaker="bob"),
    )
    assert reasons(tmp_path / "out") == {
        "u3": "its audio is no file (a command)",
        "u4": "missing audio (not in wav.scp)",
        "u5": "its audio is no file (an archive)",
        "u6": "no transcript",
        "u7": "missing audio (not in segments)",
    }
    assert not (tmp_path / "ran").exists()
    write(data / "text", "u2 NO", "u1 HE SAID")
    with pytest.raises(UserError, match="text:2: u1 comes after u2.*\n.*LC_ALL=C sort"):
        make_manifest(tmp_path / "out2", kaldi=data, root=tmp_path)


def test_kaldi_without_segments(tmp_path):
    for name in ("a", "b"):
        tone(tmp_path / f"{name}.wav", 1)
    write(tmp_path / "wav.scp", "a a.wav", f"b {tmp_path}/b.wav", "c sph2pipe c.sph |")
    write(tmp_path / "text", "a HE", "", "b SAID")
    found = made(tmp_path / "out", kaldi=tmp_path)
    same(found, row("a", "a.wav", "HE", 1.0) | row("b", "b.wav", "SAID", 1.0))


def parquet(path: Path, seconds: list[float], **columns: list) -> Path:
    audio = [
        {"bytes": audio_bytes(s) if s else None, "path": f"clip-{path.stem}-{i}.wav"} for i, s in enumerate(seconds)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"audio": audio, **columns}), path, row_group_size=2)
    return path


def test_parquet(tmp_path):
    """Rows are counted from 0 over a file's row groups; ids are its own, or those of the audio files."""
    texts = ["one", "two", None, "four", "five"]
    columns = {"speaker_id": [1, 2, 3, 4, 5], "begin_time": [7.0] * 5, "transcript": texts}
    parquet(tmp_path / "d/train-0.parquet", [0.5, 1, 1, 0, 2], **columns)
    ids = ["v", "w", "x", "y", "z"]
    parquet(tmp_path / "d/train-1.parquet", [0.25] * 5, **columns | {"id": ids, "transcript": ["t"] * 5})
    found = made(tmp_path / "out", parquet=[tmp_path / "d"], max_bad_share=0.2)
    wanted = {}
    for number, text, seconds in ((0, "one", 0.5), (1, "two", 1.0), (4, "five", 2.0)):
        place = {"row": number, "speaker": str(number + 1)}
        wanted |= row(f"clip-train-0-{number}", "train-0.parquet", text, seconds, **place)
    for number, name in enumerate(ids):
        wanted |= row(name, "train-1.parquet", "t", 0.25, row=number, speaker=str(number + 1))
    same(found, wanted)
    missing = {"clip-train-0-2": "no transcript", "clip-train-0-3": "missing audio (no bytes)"}
    assert reasons(tmp_path / "out") == missing
    parquet(tmp_path / "d/test-0.parquet", [0.5], text=["a"])
    with pytest.raises(UserError, match="holds several splits: train, test\n.*--parquet"):
        make_manifest(tmp_path / "out2", parquet=[tmp_path / "d"])


def test_parquet_that_is_not_the_hubs(tmp_path):
    pq.write_table(pa.table({"audio": ["a.wav"], "text": ["a"]}), tmp_path / "paths.parquet")
    with pytest.raises(UserError, match="no column audio with bytes among audio, text"):
        make_manifest(tmp_path / "out", parquet=[tmp_path / "paths.parquet"])
    path = parquet(tmp_path / "no_text.parquet", [0.5], words=["a"])
    with pytest.raises(UserError, match="none of the text columns text, transcript"):
        make_manifest(tmp_path / "out", parquet=[path])
    with pytest.raises(UserError, match="is no Parquet"):
        make_manifest(tmp_path / "out", parquet=[write(tmp_path / "x.parquet", "no")])
    path = parquet(tmp_path / "raw.parquet", [0.5], raw_text=["Raw."], normalized_text=["clean"])
    for text, wanted in (("raw", "Raw."), ("clean", "clean")):
        [fields] = made(tmp_path / text, parquet=[path], text=text).values()
        assert fields["text"] == wanted


# --- The command ----------------------------------------------------------------------------------
def test_run_twice(tmp_path, capsys):
    """The same bytes elsewhere and again; done is said; another text needs --overwrite."""
    for name in ("a", "b"):
        CORPORA["covost2"](tmp_path / name)
        make_manifest(tmp_path / f"out-{name}", corpus="covost2", root=tmp_path / name, split="test")
    files = ("manifest.jsonl", "dropped.jsonl", "translations.jsonl")
    hashes = [[hash_file(tmp_path / f"out-{name}" / file) for file in files] for name in ("a", "b")]
    assert hashes[0] == hashes[1]
    capsys.readouterr()
    make_manifest(tmp_path / "out-a", corpus="covost2", root=tmp_path / "b", split="test", max_bad_share=0.5)
    assert capsys.readouterr().out == f"already done: {tmp_path}/out-a\n"
    with pytest.raises(UserError, match="text was 'clean', now 'raw'"):
        make_manifest(tmp_path / "out-a", corpus="covost2", root=tmp_path / "a", split="test", text="raw")
    with open(tmp_path / "a/covost_v2.en_de.tsv", "a") as file:
        file.write("common_voice_en_3.mp3\tSo.\ttest\n")
    with pytest.raises(UserError, match="index was"):
        make_manifest(tmp_path / "out-a", corpus="covost2", root=tmp_path / "a", split="test")
    found = made(tmp_path / "out-a", corpus="covost2", root=tmp_path / "a", split="test", overwrite=True)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no corpus given"),
        ({"nemo": Path("a"), "kaldi": Path("b")}, "--nemo and --kaldi given, but one is wanted"),
        ({"corpus": "mls", "root": Path("a")}, "--corpus mls without --split"),
        ({"corpus": "mls", "split": "a"}, "--corpus mls without --root"),
        ({"nemo": Path("a"), "split": "a"}, "--split a with --nemo"),
        ({"nemo": Path("a"), "language": "xx"}, "unknown language 'xx'"),
        ({"nemo": Path("a"), "max_bad_share": 1.0}, "give a share"),
        ({"nemo": Path("nowhere")}, "nowhere does not exist"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_manifest(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_as_typed(tmp_path):
    CORPORA["europarl_st"](tmp_path / "v1.1")
    words = ["--corpus", "europarl_st", "--root", "v1.1", "--split", "test", "--output_dir", "out"]
    command = [sys.executable, ROOT / "speech_units/make_manifest.py", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    lines = ["2 utterances, 0.00 h", "translations into de: 2", "translations into fr: 1", "out"]
    assert (done.returncode, done.stdout.splitlines()) == (0, lines), done.stderr
    assert read_jsonl(tmp_path / "out/manifest.jsonl")[0]["audio"].startswith("en/audios/")


def test_each_recording_is_opened_once_and_order_is_kept(tmp_path, monkeypatch):
    names = [f"{i}.wav" for i in range(5)]
    for name in names:
        tone(tmp_path / name, 2)
    opened = []
    monkeypatch.setattr(
        utterances, "length", lambda file, length=utterances.length: opened.append(file) or length(file)
    )
    rows = [{"audio_filepath": names[i % 5], "offset": i / 1000, "duration": 0.5, "text": f"t{i}"} for i in range(900)]
    found = made(tmp_path / "out", nemo=nemo(tmp_path / "m.json", *rows))
    assert [row["text"] for row in found.values()] == [f"t{i}" for i in range(900)]
    assert sorted(opened) == [str(tmp_path / name) for name in names]


def test_memory_is_flat_but_for_the_ids(tmp_path):
    tone(tmp_path / "a.wav", 41, 1000)

    def peak(rows: int) -> int:
        text = "some text " * 50
        fields = ({"audio_filepath": "a.wav", "offset": i / 1000, "duration": 0.5, "text": text} for i in range(rows))
        path = nemo(tmp_path / f"{rows}.json", *fields)
        tracemalloc.start()
        make_manifest(tmp_path / f"out-{rows}", nemo=path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)  # what is imported
    assert (
        peak(40_000) - peak(10_000)
    ) / 30_000 < 200  # bytes a row; its text has 500, its id and that one's place 140
