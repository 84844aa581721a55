"""Time evaluation beside the original's way and beside transformers, all in one run, with the same outputs.

Usage: bash tiny/run.sh runs/tiny && python tiny/make_smollm2.py --output_dir models/smollm2
       python benchmarks/bench_evaluation.py --tiny runs/tiny --smollm2 models/smollm2 --test_data data \\
           --output_dir runs/bench_evaluation

Reads a finished tiny run, a SmolLM2 folder, and a folder with flores200/, wmt23/ and towerspeech_outputs/. Compares
  tiny      all models but sft (it is asked in another style) on the whole tiny suite (MT in all directions, 0- and
            5-shot, and ASR): one engine a model, beside a new engine a test set (as the original's scripts) and
            beside transformers
  smollm2   100 FLORES de-en prompts: 0-shot, 5-shot with other examples a sentence, 5-shot with the same for all,
            beside transformers with batches of 8 and of 16
  published scoring all of the original's saved outputs with intervals: under 180 s
and ends with one JSON line a comparison. ``ours`` and ``theirs`` are seconds; ``same`` is the share of outputs with
the same text and number of tokens; below 98% no goal holds. Whole-run seconds include start, imports and loading,
steady ones do not.
"""

from pathlib import Path

from benchmarks.measure import apart, comparison, report, run_script
from benchmarks.other_ways import with_transformers, with_vllm
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, read_json
from towerspeech.records import read_jsonl, read_prompts

MAX_NEW_TOKENS = 64


def ours(models: list[Path], prompts: list[Path], output_dir: Path) -> tuple[float, float]:
    """generate.py over all models and prompt files at once; seconds of the whole run, and of the decoding in it."""
    words = ["--checkpoints", *models, "--prompts", *prompts, "--dtype", "float32"]
    whole = run_script("generate/generate.py", output_dir, *words, "--max_new_tokens", MAX_NEW_TOKENS).seconds
    infos = [read_json(output_dir / model.name / "run_info.json", "run again") for model in models]
    return whole, sum(info["counts"]["last_attempt"]["decode_s"] for info in infos)


def compare(folder: Path, outputs: dict[str, list[tuple[str, int]]]) -> list[bool]:
    """Whether each of our outputs in a folder is theirs: the same text (but for its borders) and number of tokens."""
    same = []
    for name, told in outputs.items():
        for row, (text, num_tokens) in zip(read_jsonl(folder / name), told, strict=True):
            same.append((row["text"].strip(), row["num_tokens"]) == (text.strip(), num_tokens))
    return same


def bench_tiny(root: Path, output_dir: Path) -> list[dict]:
    """The pocket models that complete texts, on the prompts of the tiny run."""
    models = [root / "tokenizer/base", *sorted((root / "models").glob("checkpoint-*"))]  # sft chats
    prompts = sorted((root / "instructions/original").glob("*_shot/*.jsonl"))
    words = ["--test_set", "units", "--data_root", root / "units/test"]
    run_script("instructions/build_instructions.py", output_dir / "prompts", *words)
    prompts.append(output_dir / "prompts/asr/test.jsonl")
    whole, steady = ours(models, prompts, output_dir / "tiny")
    lines = []
    for way, options, groups, label, goal in (
        (with_vllm, [], [[path] for path in prompts], "an engine a test set", 5.0),
        (with_transformers, [16], [prompts], "transformers, batches of 16", 1.0),
    ):
        their_whole, their_steady, equal = 0.0, 0.0, []
        for model in models:
            for group in groups:
                seconds, (outputs, decoding) = apart(way, model, read_prompts(group), MAX_NEW_TOKENS, *options)
                their_whole += seconds
                their_steady += decoding
                equal += compare(output_dir / "tiny" / model.name, outputs)
        same = sum(equal) / len(equal)
        lines += [
            comparison(f"tiny suite, whole run, beside {label}", whole, their_whole, goal, same),
            comparison(f"tiny suite, decoding alone, beside {label}", steady, their_steady, same=same),
        ]
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
        run_script("instructions/build_instructions.py", folder / "prompts", *common, *words)
        prompts = sorted((folder / "prompts").glob("*_shot/*.jsonl"))
        _, steady = ours([model], prompts, folder / "ours")
        outputs, others = {}, {}
        for size in (8, 16):
            told = apart(with_transformers, model, read_prompts(prompts), MAX_NEW_TOKENS, size)[1]
            outputs[size], others[size] = told
        fastest = min(others, key=others.get)
        equal = compare(folder / "ours" / model.name, outputs[fastest])
        counts = read_json(folder / "ours" / model.name / "run_info.json", "run again")["counts"]["last_attempt"]
        facts = {"batch_size": fastest, "cached": f"{counts['cached_tokens'] / counts['prompt_tokens']:.0%}"}
        name = f"SmolLM2 {kind}, beside transformers, decoding alone"
        lines.append(comparison(name, steady, others[fastest], goal, sum(equal) / len(equal), **facts))
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
    for path in (tiny, smollm2, test_data):
        if path:
            check_exists(path, "see --help for what makes it")
    lines = []
    if test_data:
        words = ["--outputs", test_data / "towerspeech_outputs", "--flores", test_data / "flores200"]
        words += ["--wmt23", test_data / "wmt23"]
        scored = run_script("results/published/score_published.py", output_dir / "published", *words)
        lines.append(comparison("all of results/published, with intervals: under 180 s", scored.seconds, 180, 1.0))
    if tiny:
        lines += bench_tiny(tiny, output_dir / "tiny")
    if smollm2 and test_data:
        lines += bench_smollm2(smollm2, test_data / "flores200", output_dir / "smollm2")
    if not lines:
        raise UserError("nothing to compare", "name --tiny, --test_data, or --smollm2 with --test_data")
    report(lines)


if __name__ == "__main__":
    run(bench_evaluation)
