"""Time evaluation beside the original's way, transformers and plain sacreBLEU, all in one run, with the same outputs.

Usage: bash tiny/run.sh runs/tiny && python tiny/make_smollm2.py --output_dir models/smollm2
       python benchmarks/bench_evaluation.py --tiny runs/tiny --smollm2 models/smollm2 --test_data data \\
           --output_dir runs/bench_evaluation

Reads a finished tiny run, a SmolLM2 folder, and a folder with flores200/, wmt23/ and towerspeech_outputs/. Compares
  tiny      all models but sft (it is asked in another style) on the whole tiny suite (MT in all directions, 0- and
            5-shot, and ASR): one engine a model, beside a new engine a test set (as the original's scripts) and
            beside transformers
  smollm2   100 FLORES de-en prompts: 0-shot, 5-shot with other examples a sentence, 5-shot with the same for all,
            beside transformers with batches of 8 and of 16
  published scoring all of the original's saved outputs with intervals, beside plain sacreBLEU on a part of them
and ends with one JSON line a comparison. ``ours`` and ``theirs`` are seconds; ``same`` is the share of outputs with
the same text and number of tokens; below 98% no goal holds. Whole-run seconds include start, imports and loading,
steady ones do not.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from towerspeech.command import UserError, run
from towerspeech.files import check_exists, read_json
from towerspeech.records import read_jsonl

REPO = Path(__file__).resolve().parent.parent
TINY_TOKENS, SMOLLM2_TOKENS = 64, 64  # limits of a generation


def call(script: str, output_dir: Path, *words) -> float:
    """Run a script of the repo; its seconds, from outside. Its output goes to a file beside output_dir."""
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    log = output_dir.with_suffix(".log")
    command = [sys.executable, REPO / script, *words, "--output_dir", output_dir]
    print(" ".join(["$ python", script, *map(str, command[2:])])[:300], flush=True)
    began = time.perf_counter()
    with open(log, "w") as file:
        status = subprocess.run(list(map(str, command)), stdout=file, stderr=file).returncode
    if status:
        raise UserError(f"{script} ended with status {status}", f"see {log}")
    return time.perf_counter() - began


def ours(models: list[Path], prompts: list[Path], limit: int, output_dir: Path) -> dict[str, float]:
    """generate.py over all models and prompt files at once."""
    words = ["--checkpoints", *models, "--prompts", *prompts, "--dtype", "float32", "--max_new_tokens", limit]
    whole = call("generate/generate.py", output_dir, *words)
    infos = [read_json(output_dir / model.name / "run_info.json", "run again") for model in models]
    return {"whole": whole, "steady": sum(info["counts"]["last_attempt"]["decode_s"] for info in infos)}


def theirs(way: str, model: Path, prompts: list[Path], limit: int, output_dir: Path, *words) -> dict[str, float]:
    """other_ways.py on some prompt files."""
    words = ["--way", way, "--model", model, "--prompts", *prompts, "--max_new_tokens", limit, *words]
    whole = call("benchmarks/other_ways.py", output_dir, *words)
    return {"whole": whole, "steady": read_json(output_dir / "seconds.json", "run again")["decode_s"]}


def same(left: Path, right: Path, names: list[str]) -> tuple[int, int]:
    """How many outputs of two folders are equal, and of how many: text (but for its borders) and tokens."""
    equal = total = 0
    for name in names:
        for a, b in zip(read_jsonl(left / name), read_jsonl(right / name), strict=True):
            equal += (
                a["id"] == b["id"] and a["text"].strip() == b["text"].strip() and a["num_tokens"] == b["num_tokens"]
            )
            total += 1
    return equal, total


def line(name: str, our_s: float, their_s: float, goal: float, **facts) -> dict:
    """One comparison; the ratio is how many times as long theirs took."""
    ratio = their_s / our_s
    told = {"name": name, "ours": round(our_s, 2), "theirs": round(their_s, 2), "unit": "s", "ratio": round(ratio, 2)}
    return {**told, "goal": goal, "holds": ratio >= goal and facts.get("same_share", 1) >= 0.98, **facts}


def bench_tiny(root: Path, output_dir: Path) -> list[dict]:
    """The pocket models that complete texts, on the prompts of the tiny run."""
    models = sorted(path for path in (root / "models").iterdir() if (path / "speech_units.json").is_file())
    models = [path for path in models if path.name != "sft"]  # it is asked in another style
    prompts = sorted((root / "instructions/original").glob("*_shot/*.jsonl"))
    asr = output_dir / "prompts/asr"
    call("instructions/build_instructions.py", asr.parent, "--test_set", "units", "--data_root", root / "units/test")
    prompts.append(asr / "test.jsonl")
    names = [f"{path.parent.name}/{path.name}" for path in prompts]
    mine = ours(models, prompts, TINY_TOKENS, output_dir / "tiny")
    lines, others = [], {}
    for way in ("vllm", "transformers"):
        others[way] = {"whole": 0.0, "steady": 0.0}
        counts = [0, 0]
        for model in models:
            groups = [[path] for path in prompts] if way == "vllm" else [prompts]
            for group in groups:
                target = output_dir / way / model.name
                part = target if way != "vllm" else target / group[0].parent.name / group[0].stem
                seconds = theirs(way, model, group, TINY_TOKENS, part)
                others[way] = {key: others[way][key] + seconds[key] for key in seconds}
                shown = [name for name, path in zip(names, prompts, strict=True) if path in group]
                equal = same(output_dir / "tiny" / model.name, part, shown)
                counts = [a + b for a, b in zip(counts, equal, strict=True)]
        share = {
            "same": f"{counts[0]}/{counts[1]}",
            "same_share": counts[0] / counts[1],
            "engines": len(models) * (len(prompts) if way == "vllm" else 1),
        }
        label = {"vllm": "an engine a test set", "transformers": "transformers, batches of 16"}[way]
        goal = 5.0 if way == "vllm" else 1.0
        lines.append(
            line(f"tiny suite, whole run, beside {label}", mine["whole"], others[way]["whole"], goal, **share)
        )
        lines.append(line(f"tiny suite, decoding alone, beside {label}", mine["steady"], others[way]["steady"], 1.0))
    return lines


def bench_smollm2(model: Path, flores: Path, output_dir: Path) -> list[dict]:
    """A model that nobody here trained, on the first 100 sentences; examples come from lines 101-300."""
    lines = []
    common = ["--test_set", "flores200", "--data_root", flores, "--pairs", "de-en", "--test_lines", "1-100"]
    pool = ["--shots", 5, "--example_split", "devtest", "--example_lines", "101-300"]
    for kind, words, goal in (
        ("0-shot", [], 4.0),
        ("5-shot per sentence", pool, 2.5),
        ("5-shot fixed", [*pool, "--examples", "fixed"], 6.0),
    ):
        folder = output_dir / kind.replace(" ", "_")
        call("instructions/build_instructions.py", folder / "prompts", *common, *words)
        prompts = sorted((folder / "prompts").glob("*_shot/*.jsonl"))
        names = [f"{path.parent.name}/{path.name}" for path in prompts]
        mine = ours([model], prompts, SMOLLM2_TOKENS, folder / "ours")
        counts = read_json(folder / "ours" / model.name / "run_info.json", "run again")["counts"]["last_attempt"]
        others = {}
        for size in (8, 16):
            others[size] = theirs(
                "transformers", model, prompts, SMOLLM2_TOKENS, folder / f"batch_{size}", "--batch_size", size
            )
        fastest = min(others, key=lambda size: others[size]["steady"])
        equal, total = same(folder / "ours" / model.name, folder / f"batch_{fastest}", names)
        facts = {
            "same": f"{equal}/{total}",
            "same_share": equal / total,
            "batch_size": fastest,
            "tokens_per_s": round(counts["new_tokens"] / mine["steady"]),
            "cached": f"{counts['cached_tokens'] / counts['prompt_tokens']:.0%}",
        }
        name = f"SmolLM2 {kind}, beside transformers"
        lines.append(line(f"{name}, decoding alone", mine["steady"], others[fastest]["steady"], goal, **facts))
        whole = min(seconds["whole"] for seconds in others.values())
        lines.append(line(f"{name}, whole run", mine["whole"], whole, 1.0))
    return lines


def bench_published(data: Path, output_dir: Path) -> list[dict]:
    """Score all of the saved outputs, and 12 test sets (drawn with a seed) both ways."""
    from sacrebleu.metrics import BLEU, CHRF

    from towerspeech import metrics
    from towerspeech.records import read_lines

    words = ["--outputs", data / "towerspeech_outputs", "--flores", data / "flores200", "--wmt23", data / "wmt23"]
    seconds = call("results/published/score_published.py", output_dir / "published", *words)
    limit = {"name": "all of results/published, with intervals: under 180 s", "ours": round(seconds, 1), "theirs": 180}
    lines = [{**limit, "unit": "s", "ratio": round(180 / seconds, 2), "goal": 1.0, "holds": seconds < 180}]
    files = sorted((data / "towerspeech_outputs/MT/5_shot").glob("*/flores_5to1_*-en"))
    references = read_lines(data / "flores200/devtest/eng_Latn.devtest")
    sets = [read_lines(path)[:1012] for path in random.Random(0).sample(files, 12)]
    began = time.perf_counter()
    mine = [
        metrics.score("mt", hypotheses, references, "en", rows=["bleu", "chrf2", "chrf2++"]) for hypotheses in sets
    ]
    our_s = time.perf_counter() - began
    began = time.perf_counter()
    for hypotheses, found in zip(sets, mine, strict=True):
        for metric, score in zip((BLEU(force=True), CHRF(), CHRF(word_order=2)), found, strict=True):
            result = metric.corpus_score(hypotheses, [references], n_bootstrap=metrics.BOOTSTRAP_SAMPLES)
            assert abs(result.score - score.score) < 1e-9 and abs(result._mean - result._ci - score.ci_low) < 1e-9
    their_s = time.perf_counter() - began
    lines.append(line("12 test sets, one process, beside sacreBLEU's own corpus_score", our_s, their_s, 1.0))
    return lines


def bench_evaluation(
    output_dir: Path, tiny: Path | None = None, smollm2: Path | None = None, test_data: Path | None = None
) -> None:
    """Run the comparisons whose data are given.

    Args:
        output_dir: Scratch folder.
        tiny: A finished tiny/run.sh folder.
        smollm2: Folder that tiny/make_smollm2.py wrote; with test_data.
        test_data: Folder with flores200/, wmt23/ and towerspeech_outputs/.
    """
    for path, remedy in (
        (tiny, "bash tiny/run.sh"),
        (smollm2, "python tiny/make_smollm2.py"),
        (test_data, "check it"),
    ):
        if path:
            check_exists(path, remedy)
    output_dir = output_dir.resolve()
    lines = []
    if test_data:
        lines += bench_published(test_data.resolve(), output_dir / "published")
    if tiny:
        lines += bench_tiny(tiny.resolve(), output_dir / "tiny")
    if smollm2 and test_data:
        lines += bench_smollm2(smollm2.resolve(), test_data.resolve() / "flores200", output_dir / "smollm2")
    if not lines:
        raise UserError("nothing to compare", "name --tiny, --test_data, or --smollm2 with --test_data")
    for told in lines:
        print(json.dumps(told))


if __name__ == "__main__":
    run(bench_evaluation)
