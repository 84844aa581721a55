"""compare.py beside sacreBLEU's own --paired-ar and a plain loop over swaps; its level; pairing; what is refused."""

import csv
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from results.compare import COLUMNS, compare
from results.randomisation import compare_texts
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.records import write_jsonl

ROOT = Path(__file__).parents[2]

MT = {"task": "mt", "dataset": "flores", "shots": 0, "src_lang": "de", "tgt_lang": "en"}
ASR = {"task": "asr", "dataset": "clean", "shots": 0, "src_lang": "en", "tgt_lang": "en"}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "Dr.", "Smith", "doesn't", "see", "twenty-one", "colours,", "uh,")


def sentences(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 12))) for _ in range(count)]


def garbled(texts: list[str], share: float, seed: int) -> list[str]:
    """The texts with some words left out, doubled or replaced."""
    generator = random.Random(seed)

    def change(word: str) -> list[str]:
        return generator.choice(([], [word, word], ["dog"])) if generator.random() < share else [word]

    return [" ".join(part for word in text.split() for part in change(word)) for text in texts]


def generated(facts: dict, texts: list[str], references: list[str], **changes) -> list[dict]:
    name = f"{facts['dataset']}_{facts['src_lang']}-{facts['tgt_lang']}"
    return [
        {
            "id": f"{name}:{i}",
            **facts,
            "source": f"source {i}",
            "reference": reference,
            "prompt_sha256": "0",
            "text": text,
            "finish_reason": "stop",
            "num_tokens": 3,
            **changes,
        }
        for i, (text, reference) in enumerate(zip(texts, references, strict=True))
    ]


def write_generations(folder: Path, files: dict[str, list[dict]]) -> Path:
    """A checkpoint's folder as generate.py leaves it."""
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    outputs = {name: hash_file(folder / name) for name in files}
    (folder / "run_info.json").write_text(json.dumps({"outputs": outputs}))
    return folder


def read(folder: Path) -> list[dict]:
    with open(folder / "comparison.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_markdown(folder: Path) -> str:
    """comparison.md, without the blanks that line up its columns."""
    return re.sub(" +", " ", (folder / "comparison.md").read_text())


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


REFERENCES = sentences(60, seed=0)


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """A slightly and a heavily wrong system."""
    folders = []
    for seed, (name, share) in enumerate((("checkpoint-300", 0.1), ("sft", 0.25)), 1):
        texts = garbled(REFERENCES, share, seed)
        files = {
            "0_shot/flores_de-en.jsonl": generated(MT, texts, REFERENCES),
            "asr/clean.jsonl": generated(ASR, texts, REFERENCES),
        }
        folders.append(write_generations(tmp_path / "gen" / name, files))
    return tuple(folders)


# --- Numbers --------------------------------------------------------------------------------------
def sacrebleu_paired(references: Path, a: Path, b: Path, *options: str) -> dict[str, tuple[float, float, float]]:
    """metric -> (score of a, score of b, p) from sacreBLEU's own command line."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sacrebleu",
            references,
            "-i",
            a,
            b,
            "--paired-ar",
            "--paired-ar-n",
            "1000",
            "-w",
            "10",
            "-f",
            "latex",
            *options,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [re.sub(r"[\\$]", "", line).split("&") for line in done.stdout.splitlines() if "&" in line]
    names = [re.match(r"\s*(?:textbf\{)?([\w+]+)", cell)[1] for cell in rows[0][1:]]
    scores = [[float(re.search(r"\d+\.\d+", cell)[0]) for cell in row[1:]] for row in rows[1:] if "." in row[1]][:2]
    ps = [float(x) for x in re.findall(r"p\s*=\s*(\d\.\d+)", done.stdout)]
    return {name: (*numbers, p) for name, *numbers, p in zip(names, *scores, ps, strict=True)}


@pytest.mark.parametrize(
    ("languages", "systems"),
    [
        (("de", "en"), ("GPT4-5shot", "NLLB_Greedy")),
        (("de", "en"), ("GPT4-5shot", "ONLINE-B")),
        (("en", "zh"), ("ONLINE-B", "GPT4-5shot")),
    ],
)
def test_equals_sacrebleu_on_wmt23(tmp_path, test_data, languages, systems):
    root, (src, tgt) = test_data / "wmt23", languages
    a, b = (root / "systems" / f"generaltest2023.{src}-{tgt}.hyp.{system}.{tgt}" for system in systems)
    references = root / f"generaltest2023.{src}-{tgt}.ref.refA.{tgt}"
    compare([a], [b], tmp_path / "out", references=references, target_lang=tgt)
    rows = {row["metric"]: row for row in read(tmp_path / "out")}
    tokenizer = "zh" if tgt == "zh" else "13a"
    theirs = sacrebleu_paired(references, a, b, "-m", "bleu", "chrf", "--tokenize", tokenizer)
    theirs |= sacrebleu_paired(references, a, b, "-m", "chrf", "--chrf-word-order", "2")
    assert set(theirs) == {"BLEU", "chrF2", "chrF2++"}
    for name, (score_a, score_b, p) in theirs.items():
        row = rows[name.lower()]
        assert float(row["score_a"]) == pytest.approx(score_a, abs=1e-6)
        assert float(row["score_b"]) == pytest.approx(score_b, abs=1e-6)
        assert float(row["p"]) == pytest.approx(p, abs=5e-5)  # it prints four digits
        assert row["significant"] == ("yes" if p < 0.05 else "no")
        assert "|ar:1000|seed:12345|" in row["signature"]


def test_transcription_equals_a_plain_loop_over_swaps(tmp_path):
    outputs = [garbled(REFERENCES, share, seed) for seed, share in enumerate((0.2, 0.24), 1)]
    folders = [
        write_generations(tmp_path / f"{i}", {"asr/clean.jsonl": generated(ASR, texts, REFERENCES)})
        for i, texts in enumerate(outputs)
    ]
    compare([folders[0]], [folders[1]], tmp_path / "out")
    rows = {row["metric"]: row for row in read(tmp_path / "out")}
    assert list(rows) == ["wer_basic", "cer_basic", "wer_english", "cer_english"]
    assert all(0.01 < float(row["p"]) < 0.9 for row in rows.values())  # none at an end of the scale
    normalizers = {"basic": BasicTextNormalizer(), "english": EnglishTextNormalizer()}
    for metric, row in rows.items():
        unit, name = metric.split("_")
        rate = jiwer.wer if unit == "wer" else jiwer.cer
        spoken, *texts = [[normalizers[name](text).strip() for text in one] for one in (REFERENCES, *outputs)]
        scores = [rate(spoken, one) for one in texts]
        assert [float(row["score_a"]), float(row["score_b"])] == pytest.approx(scores, abs=1e-12)
        length = len if unit == "cer" else lambda text: len(text.split())
        errors = [[rate(r, h) * length(r) for r, h in zip(spoken, one, strict=True)] for one in texts]
        total = sum(length(text) for text in spoken)
        seen, as_far = abs(scores[1] - scores[0]), 1  # no swap is one try
        for swaps in np.random.default_rng(12345).integers(2, size=(1000, 60), dtype=bool):
            signed = [(b - a) * (-1 if swap else 1) for a, b, swap in zip(*errors, swaps, strict=True)]
            as_far += abs(sum(signed)) / total >= seen - 1e-9
        assert float(row["p"]) == pytest.approx(as_far / 1001, abs=1e-12)


@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize("task", ["asr", "mt"])
def test_one_equally_good_pair_in_twenty_is_marked_at_most(task, n):
    """Both systems make the same kind of errors, in few segments or many."""
    ps = []
    for seed in range(200):
        references = sentences(n, seed)
        a, b = (garbled(references, 0.2, 1000 * seed + i) for i in (1, 2))
        ps.append([p for *_, p, _, _ in compare_texts(task, a, b, references, "en").values()])
    marked = np.mean(np.array(ps) < 0.05, axis=0)  # (metrics,)
    assert np.all(marked < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5)  # three standard errors
    assert not marked.any() if n <= 5 else marked.any()


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (2, 1 / 2), (5, 1 / 16), (6, 1 / 32), (9, 1 / 256)])
def test_few_segments_by_hand(tmp_path, n, p):
    """Where b is wrong in one word of each segment and a in none, only no swap and all swaps are as far: 2 in 2^n."""
    references = ["a b c"] * n
    files = [write_lines(tmp_path / name, lines) for name, lines in (("a", references), ("b", ["a b d"] * n))]
    compare([files[0]], [files[1]], tmp_path / "out", references=files[0], target_lang="de", task="asr")
    [wer] = [row for row in read(tmp_path / "out") if row["metric"] == "wer_basic"]
    assert float(wer["p"]) == p and float(wer["difference"]) == pytest.approx(1 / 3)
    assert (wer["significant"], wer["better"]) == (("yes", "A") if n > 5 else ("no", ""))
    assert wer["note"] == ("" if n > 5 else f"only {n} segments differ")
    assert wer["note"] in (tmp_path / "out/comparison.md").read_text()


def test_other_languages_than_english_are_compared_under_basic_alone(tmp_path):
    lines = write_lines(tmp_path / "a", sentences(20, 0))
    for code, metrics in (("de", ["wer_basic", "cer_basic"]), ("ko", ["cer_basic", "wer_basic"])):
        compare([lines], [lines], tmp_path / code, references=lines, target_lang=code, task="asr")
        assert [row["metric"] for row in read(tmp_path / code)] == metrics


# --- The table ------------------------------------------------------------------------------------
def test_better_and_significant(tmp_path, pair, capsys):
    compare([pair[0]], [pair[1]], tmp_path / "out")
    rows = read(tmp_path / "out")
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 3 + 4 and {row["n"] for row in rows} == {"60"}
    assert {(row["significant"], row["better"]) for row in rows} == {("yes", "A")}  # lower WER, higher BLEU
    printed = capsys.readouterr().out
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    mt = next(row for row in rows if row["metric"] == "bleu")
    score_a, score_b, difference = (f"{float(mt[name]):.2f}" for name in ("score_a", "score_b", "difference"))
    assert ["flores de-en 0-shot", "BLEU", score_a, score_b, f"{difference}*", "0.0010", "A", "60"] in lines
    wer = next(row for row in rows if row["metric"] == "wer_english")
    shown = [f"{100 * float(wer[name]):.2f}" for name in ("score_a", "score_b", "difference")]
    assert ["ASR clean", "WER", *shown[:2], f"+{shown[2]}*", f"{float(wer['p']):.4f}", "A", "60"] in lines
    markdown = read_markdown(tmp_path / "out")
    assert f"| flores de-en 0-shot | BLEU | {score_a} | {score_b} | {difference}* | 0.0010 | A | 60 | |" in markdown
    for text in (printed, markdown):
        assert "not corrected for the number of rows" in text and f"A: {pair[0]}" in text
    assert f"- `bleu|{mt['signature']}`" in markdown


def test_swapped_systems_swap_and_keep_p(tmp_path, pair):
    compare([pair[0]], [pair[1]], tmp_path / "ab")
    compare([pair[1]], [pair[0]], tmp_path / "ba")
    for ab, ba in zip(read(tmp_path / "ab"), read(tmp_path / "ba"), strict=True):
        assert (ab["score_a"], ab["score_b"], ab["p"]) == (ba["score_b"], ba["score_a"], ba["p"])
        assert float(ab["difference"]) == -float(ba["difference"])
        assert (ab["better"], ba["better"]) == ("A", "B")


def test_a_system_beside_itself_is_never_significant(tmp_path, pair):
    compare([pair[0]], [pair[0]], tmp_path / "out")
    assert {(r["difference"], r["p"], r["significant"], r["better"]) for r in read(tmp_path / "out")} == {
        ("0.0", "1.0", "no", "")
    }


def test_sets_in_one_system_only_are_listed(tmp_path, pair, capsys):
    texts = garbled(REFERENCES, 0.1, 5)
    more = write_generations(
        tmp_path / "more/checkpoint-300",
        {"asr/other.jsonl": generated({**ASR, "dataset": "other"}, texts, REFERENCES)},
    )
    compare([pair[0], more], [pair[1]], tmp_path / "out")
    assert "Only in A, not compared: ASR other." in capsys.readouterr().out
    assert "Only in A, not compared: ASR other." in (tmp_path / "out/comparison.md").read_text()
    assert {row["dataset"] for row in read(tmp_path / "out")} == {"flores", "clean"}


def test_rows_are_paired_by_id(tmp_path, pair):
    compare([pair[0]], [pair[1]], tmp_path / "one")
    path = pair[1] / "asr/clean.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    path.write_text("".join(lines))
    outputs = {name: hash_file(pair[1] / name) for name in ("asr/clean.jsonl", "0_shot/flores_de-en.jsonl")}
    (pair[1] / "run_info.json").write_text(json.dumps({"outputs": outputs}))
    compare([pair[0]], [pair[1]], tmp_path / "two")
    assert read(tmp_path / "one") == read(tmp_path / "two")


def test_zero_shot_beside_five_shot_of_one_checkpoint(tmp_path):
    files = {
        f"{shots}_shot/flores_de-en.jsonl": generated(
            {**MT, "shots": shots}, garbled(REFERENCES, share, 3), REFERENCES
        )
        for shots, share in ((0, 0.4), (5, 0.1))
    }
    folder = write_generations(tmp_path / "checkpoint-300", files)
    compare([folder], [folder], tmp_path / "out", shots_a=0, shots_b=5)
    rows = read(tmp_path / "out")
    assert len(rows) == 3 and {(row["shots_a"], row["shots_b"], row["better"]) for row in rows} == {("0", "5", "B")}
    assert "| flores de-en 0/5-shot | BLEU |" in read_markdown(tmp_path / "out")


def test_speech_translation_is_compared_as_translation(tmp_path):
    facts = {"task": "st", "dataset": "covost", "shots": 0, "src_lang": "en", "tgt_lang": "de"}
    folders = [
        write_generations(
            tmp_path / name, {"st/covost_en-de.jsonl": generated(facts, garbled(REFERENCES, share, 1), REFERENCES)}
        )
        for name, share in (("a", 0.1), ("b", 0.3))
    ]
    compare([folders[0]], [folders[1]], tmp_path / "out")
    assert [row["metric"] for row in read(tmp_path / "out")] == ["bleu", "chrf2", "chrf2++"]


def test_done_again_and_other_inputs(tmp_path, pair, capsys):
    compare([pair[0]], [pair[1]], tmp_path / "out")
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in sorted((tmp_path / "out").glob("comparison*"))]
    capsys.readouterr()
    compare([pair[0]], [pair[1]], tmp_path / "out")
    printed = capsys.readouterr().out
    assert "already done" in printed and "| flores de-en 0-shot | BLEU |" in re.sub(" +", " ", printed)
    assert before == [(p.read_bytes(), p.stat().st_mtime_ns) for p in sorted((tmp_path / "out").glob("comparison*"))]
    with pytest.raises(UserError, match="the content of system_b differs"):
        compare([pair[0]], [pair[0]], tmp_path / "out")
    compare([pair[0]], [pair[0]], tmp_path / "out", overwrite=True)
    assert {row["p"] for row in read(tmp_path / "out")} == {"1.0"}


# --- Refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows[7].update(reference="?"),
            r"sft/0_shot/.*: id 'flores_de-en:7' has the reference '\?', but",
        ),
        (lambda rows: rows[7].update(source="?"), r"sft/0_shot/.*: id 'flores_de-en:7' has the source '\?', but"),
        (lambda rows: rows.pop(), r"sft/0_shot/flores_de-en\.jsonl lacks id 'flores_de-en:59', which .*-300"),
        (lambda rows: rows[3].update(id="x"), r"sft/0_shot/flores_de-en\.jsonl lacks id 'flores_de-en:3'"),
        (
            lambda rows: [row.update(dataset="wmt") for row in rows],
            "no test set is in both: A has flores de-en 0-shot;",
        ),
    ],
)
def test_segments_that_do_not_pair(tmp_path, change, message):
    texts = garbled(REFERENCES, 0.1, 1)
    sets = [generated(MT, texts, REFERENCES) for _ in range(2)]
    change(sets[1])
    a, b = (
        write_generations(tmp_path / name, {"0_shot/flores_de-en.jsonl": rows})
        for name, rows in zip(("checkpoint-300", "sft"), sets, strict=True)
    )
    with pytest.raises(UserError, match=message):
        compare([a], [b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_prompts_and_other_units_do_pair(tmp_path):
    texts = garbled(REFERENCES, 0.1, 1)
    folders = []
    for name, changes in (
        ("a", {"source": "units of one k-means"}),
        ("b", {"source": "others", "prompt_sha256": "1"}),
    ):
        rows = generated(ASR, texts, REFERENCES, **changes)
        folders.append(write_generations(tmp_path / name, {"asr/clean.jsonl": rows}))
    compare([folders[0]], [folders[1]], tmp_path / "out")
    assert len(read(tmp_path / "out")) == 4


def test_bad_calls(tmp_path, pair):
    def refused(message, a=pair[:1], b=pair[1:], **arguments):
        with pytest.raises(UserError, match=message):
            compare(list(a), list(b), tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    lines = write_lines(tmp_path / "h.de", ["a", "b"])
    refused("--references and --target_lang belong together", target_lang="de")
    refused("--shots_a and --shots_b belong together", shots_a=0)
    refused(r"no test sets with 5 shots in --system_b", shots_a=0, shots_b=5)
    refused("line files need --references", a=[lines])
    refused("one a system", a=[lines, lines], b=[lines], references=lines, target_lang="de")
    refused(
        "2 hypotheses in .* for 1 references",
        a=[lines],
        b=[lines],
        references=write_lines(tmp_path / "r", ["a"]),
        target_lang="de",
    )
    refused(r"h\.de: unknown language 'xx'", a=[lines], b=[lines], references=lines, target_lang="xx")
    refused("hold the same test set", a=[pair[0], pair[0]])
    for changes, message in (({"task": "qa"}, r"x\.jsonl: unknown task 'qa'"), ({"tgt_lang": "xx"}, "language 'xx'")):
        folder = write_generations(tmp_path / message, {"x.jsonl": generated({**MT, **changes}, ["a"], ["b"])})
        refused(message, a=[folder], b=[folder])
    (pair[0] / "run_info.json").unlink()
    refused("is not finished")


def test_command_line(tmp_path, pair):
    def call(*arguments):
        command = [sys.executable, str(ROOT / "results/compare.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = call("--system_a", pair[0], "--system_b", pair[1], "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("7 of 7 differences are significant; written: out/comparison.md")
    assert (tmp_path / "out/run_info.json").is_file()
    hypotheses = [write_lines(tmp_path / name, garbled(REFERENCES, 0.2, i)) for i, name in enumerate(("a.en", "b.en"))]
    references = write_lines(tmp_path / "ref.en", REFERENCES)
    options = ["--references", references, "--target_lang", "en", "--task", "asr", "--output_dir", "lines"]
    done = call("--system_a", hypotheses[0], "--system_b", hypotheses[1], *options)
    assert done.returncode == 0, done.stderr
    assert [row["metric"] for row in read(tmp_path / "lines")][0] == "wer_basic"
    failed = call("--system_a", tmp_path / "none", "--system_b", pair[1], "--output_dir", "no")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
