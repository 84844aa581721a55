"""Run the whole pipeline in miniature: the pocket language's audio -> units -> ... -> results table and plot.

Usage: python tiny/pipeline.py --size tiny/ci.yaml --output_dir runs/tiny

Reads a YAML of stage settings; runs the same scripts that a cluster runs, one after the other, each shown as the
command that one would type. What is done is skipped, and what was killed goes on, because every script does so.
Writes everything below output_dir; third-party logs go to files there.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from towerspeech.command import UserError, run
from towerspeech.files import check_exists, hash_file, read_json, write_json

REPO = Path(__file__).resolve().parent.parent
FINISHED = "finished.json"
PAIRS = ("de-en", "en-de")


def flags(settings: dict, prefix: str = "") -> list[str]:
    """{"num_units": 100, "keep_steps": [1, 2]} -> ["--num_units", "100", "--keep_steps", "1", "2"]."""
    words = []
    for name, value in settings.items():
        words.append(f"--{prefix}{name}")
        if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            words.append(json.dumps(value))
        elif isinstance(value, list | tuple):
            words += map(str, value)
        else:
            words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return words


def with_paths(mixture: dict, paths: dict[str, list[Path]]) -> dict:
    """The settings of build_mixture.py with each source's paths, which depend on output_dir."""
    sources = [{**source, "paths": [str(path) for path in paths[source["kind"]]]} for source in mixture["sources"]]
    return {**mixture, "sources": sources}


class Runner:
    """Runs one script after the other, each shown as the command that one would type."""

    def __init__(self, processes: int):
        self.processes = processes
        self.began = time.monotonic()
        self.number = 0
        self.bin_dir = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' own bars; ours stay
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",  # one thread a process: the same sums in the same order
        }

    def seconds(self) -> str:
        return f"{time.monotonic() - self.began:.0f} s"

    def __call__(self, script: str, **settings) -> None:
        launcher = [sys.executable]
        if script.endswith("/train.py"):
            launcher = [str(self.bin_dir / "torchrun"), "--standalone", "--nproc_per_node", str(self.processes)]
        words = [*launcher, str(REPO / script), *flags(settings)]
        shown = shlex.join(words).replace(f"{self.bin_dir}/", "").replace(f"{REPO}/", "")
        self.number += 1
        print(f"\n[stage {self.number}, {self.seconds()}] {shown}", flush=True)
        status = subprocess.run(words, env=self.environment).returncode
        if status:
            raise UserError(
                f"{script} ended with status {status}", "see above; run this again and it goes on from there"
            )


def last_checkpoint(run_dir: Path) -> Path:
    """A run's last checkpoint."""
    return max(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def scores(root: Path) -> list[Path]:
    """What the pipeline is run for, relative to its folder."""
    return sorted(path.relative_to(root) for path in [*root.glob("results/tiny/*.csv"), *root.glob("summary/[!.]*")])


def finished(root: Path, plan: dict) -> bool:
    """Whether a run of the same plan has ended here and its scores are as it left them.

    Asking each of thirty scripts, which all know, would take half a minute.
    """
    if not (root / FINISHED).is_file():
        return False
    found = read_json(root / FINISHED, "remove it")
    outputs = {str(path): hash_file(root / path) for path in scores(root)}
    return {**plan, "outputs": outputs} == found


def pipeline(
    output_dir: Path,
    size: Path = REPO / "tiny/ci.yaml",
    split: Literal["test", "tuning"] = "test",
    seed: int = 0,
    processes: int = 2,
) -> None:
    """Run all stages.

    Args:
        output_dir: Where everything goes.
        size: YAML of stage settings.
        split: Sentences to evaluate on. Settings are chosen on tuning alone.
        seed: Of initialisation, data order and sampling; the pocket language itself stays.
        processes: Processes of both trainings, under torchrun.
    """
    import yaml

    check_exists(size, "name a YAML such as tiny/ci.yaml")
    settings = yaml.safe_load(size.read_text(encoding="utf-8"))
    root = output_dir.resolve()
    data, models, units, generations = root / "data", root / "models", root / "units", root / "generations"
    parallel, audio = data / "parallel.jsonl", data / "audio"
    sources = {"text": [data / "mono.jsonl"], "parallel": [parallel], "speech": [units / "train"]}
    plan = {"settings": settings, "split": split, "seed": seed, "processes": processes}
    if finished(root, plan):
        print((root / "summary/table.md").read_text(encoding="utf-8"))
        print(f"all done before. Scores: {output_dir}/results/tiny/*.csv; plot: {output_dir}/summary/scores.png")
        return
    do = Runner(processes)
    mesh = {"device": "cpu", "replicate": processes}

    # The pocket language and a base model that has read it
    do("tiny/make_data.py", output_dir=data, **settings["make_data"])
    untrained, base_run, base = root / "base_untrained", root / "base_run", root / "base"
    do("tiny/make_base.py", mono=data / "mono.jsonl", output_dir=untrained, seed=seed, **settings["make_base"])
    mixture = with_paths(settings["base_mixture"], sources)
    do("data_mixture/build_mixture.py", tokenizer=untrained, output_dir=root / "base_mixture", seed=seed, **mixture)
    training = {"mixture": root / "base_mixture", "output_dir": base_run, **mesh, **settings["base_training"]}
    do("continued_pretraining/train.py", model=untrained, **training)
    export = {"checkpoint": last_checkpoint(base_run), "model": untrained, "dtype": "float32"}
    do("continued_pretraining/export_checkpoint.py", output_dir=base, **export)

    # Audio -> units
    manifest, kmeans = audio / "train.jsonl", root / "kmeans"
    do("speech_units/fit_kmeans.py", manifest=manifest, audio_root=audio, output_dir=kmeans, **settings["fit_kmeans"])
    for name in ("train", split):
        labelling = {"manifest": audio / f"{name}.jsonl", "audio_root": audio, "kmeans": kmeans, "num_workers": 2}
        do("speech_units/label_audio.py", output_dir=units / name, **labelling)

    # Units -> tokenizer and extended model
    bpe, tokenizer, extended = root / "units_bpe", root / "tokenizer", models / "base"
    do("train_bpe_tokenizer/train_bpe.py", units=[units / "train"], output_dir=bpe, **settings["train_bpe"])
    do("train_bpe_tokenizer/merge_tokenizer.py", base=base, units_bpe=bpe, output_dir=tokenizer)
    extension = {"model": base, "tokenizer": tokenizer, "seed": seed, **settings["extend_model"]}
    do("train_bpe_tokenizer/extend_model.py", output_dir=extended, **extension)

    # Continued pretraining
    mixture = with_paths(settings["cpt_mixture"], sources)
    do("data_mixture/build_mixture.py", tokenizer=extended, output_dir=root / "cpt_mixture", seed=seed, **mixture)
    training = {"mixture": root / "cpt_mixture", "output_dir": root / "cpt_run", **mesh, **settings["cpt_training"]}
    do("continued_pretraining/train.py", model=extended, **training)
    checkpoints = [f"checkpoint-{step}" for step in settings["cpt_training"]["keep_steps"]]
    for name in checkpoints:
        export = {"checkpoint": root / "cpt_run" / name, "model": extended, "dtype": "float32"}
        do("continued_pretraining/export_checkpoint.py", output_dir=models / name, **export)

    # Instruction tuning
    examples = {"units": [units / "train"], "parallel": [parallel], "seed": seed, **settings["build_sft_data"]}
    do("instruction_tuning/build_sft_data.py", output_dir=root / "sft_data", **examples)
    tuning = {f"sft.{name}": value for name, value in settings["sft_training"].items()}
    tuning = {"model": models / checkpoints[-1], "data": root / "sft_data/sft.jsonl", "seed": seed, **tuning}
    do("instruction_tuning/train.py", output_dir=models / "sft", **tuning)

    # Test sets -> prompts -> generations
    lines = {
        "test_set": "flores200",
        "data_root": data / "flores",
        "dataset": "tiny",
        "pairs": ",".join(PAIRS),
        "split": "devtest" if split == "test" else "dev",
        "test_lines": "1-100",
    }
    pool = {"example_split": "dev", "example_lines": "151-200"}  # never the test split; when tuning, other lines
    control = {"test": units / split, "shuffled_dir": units / f"{split}_shuffled"}
    do("tiny/make_controls.py", train=units / "train", nearest_dir=generations / "control_nearest", **control)
    scored = [generations / "control_nearest"]
    for style, names in (("original", ["base", *checkpoints]), ("chat", ["sft"])):
        prompts = root / "instructions" / style
        for shots in (0, 5):
            shown = {"shots": shots, "style": style, **(pool if shots else {})}
            do("instructions/build_instructions.py", output_dir=prompts, **shown, **lines)
        files = [prompts / f"{shots}_shot/tiny_{pair}.jsonl" for shots in (0, 5) for pair in PAIRS]
        heard = [units / split, *([units / f"{split}_shuffled"] if style == "chat" else [])]
        decoded = {"checkpoints": [models / name for name in names]}
        text, speech = {"prompts": files, **settings["generate"]}, {"units": heard, **settings["generate_ASR"]}
        do("generate/generate.py", output_dir=generations / "mt", **decoded, **text)
        do("generate/generate_ASR.py", output_dir=generations / "asr", style=style, **decoded, **speech)
        scored += [generations / task / name for name in names for task in ("mt", "asr")]

    # Scores
    facts = {"model": "tiny", "mixture": "5to1", "output_dir": root / "results/tiny"}
    do("results/score.py", generations=scored, **facts)
    do("results/summarize.py", results=[root / "results"], output_dir=root / "summary")
    limits = size.with_name(f"{size.stem}_limits.yaml")
    if split == "test" and limits.is_file():
        do("tiny/check_scores.py", results=root / "results/tiny", limits=limits)
    write_json(root / FINISHED, {**plan, "outputs": {str(path): hash_file(root / path) for path in scores(root)}})
    print(
        f"\nall done in {do.seconds()}. Scores: {output_dir}/results/tiny/*.csv; plot: {output_dir}/summary/scores.png"
    )


if __name__ == "__main__":
    run(pipeline)
