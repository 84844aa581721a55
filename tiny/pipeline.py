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

from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, hash_file, read_json, write_json
from towerspeech.model_folder import checkpoints

REPO = Path(__file__).resolve().parent.parent
FINISHED = "finished.json"
PAIRS = ("de-en", "en-de")


def flags(settings: dict) -> list[str]:
    """{"num_units": 100, "keep_steps": [1, 2]} -> ["--num_units", "100", "--keep_steps", "1", "2"]."""
    words = []
    for name, value in settings.items():
        words.append(f"--{name}")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += map(str, value)
        else:
            words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return words


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


class Pipeline:
    """The stages in their order, each step on what the steps before it have written."""

    def __init__(self, root: Path, settings: dict, split: str, seed: int, processes: int):
        self.root, self.settings, self.split, self.seed = root, settings, split, seed
        self.runner = Runner(processes)
        self.mesh = {"device": "cpu", "replicate": processes}
        self.data, self.units, self.models = root / "data", root / "units", root / "models"
        self.checkpoints = [f"checkpoint-{step}" for step in settings["cpt_training"]["keep_steps"]]

    def do(self, script: str, **settings) -> None:
        """Run a script with these settings, and those that the YAML has under its name."""
        self.runner(script, **settings, **self.settings.get(Path(script).stem, {}))

    def make_base(self) -> None:
        """The pocket language, and a base model that has read it."""
        untrained = self.root / "base_untrained"
        self.do("tiny/make_data.py", output_dir=self.data)
        self.do("tiny/make_base.py", mono=self.data / "mono.jsonl", output_dir=untrained, seed=self.seed)
        self.train("base", untrained)
        self.export(checkpoints(self.root / "base_run")[-1], untrained, self.root / "base")

    def train(self, name: str, model: Path) -> None:
        """Build the mixture ``<name>_mixture``, and train a model on it in ``<name>_run``."""
        mixture, settings = self.root / f"{name}_mixture", self.settings[f"{name}_mixture"]
        paths = {"text": "data/mono.jsonl", "parallel": "data/parallel.jsonl", "speech": "units/train"}
        sources = [{**source, "paths": [str(self.root / paths[source["kind"]])]} for source in settings["sources"]]
        settings = {"output_dir": mixture, "seed": self.seed, **settings, "sources": sources}
        self.do("data_mixture/build_mixture.py", tokenizer=model, **settings)
        settings = {"output_dir": self.root / f"{name}_run", **self.mesh, **self.settings[f"{name}_training"]}
        self.do("continued_pretraining/train.py", model=model, mixture=mixture, **settings)

    def export(self, checkpoint: Path, model: Path, output_dir: Path) -> None:
        """Make a model folder of a training checkpoint."""
        script = "continued_pretraining/export_checkpoint.py"
        self.do(script, output_dir=output_dir, checkpoint=checkpoint, model=model, dtype="float32")

    def label_audio(self) -> None:
        """Audio -> units."""
        audio, kmeans = self.data / "audio", self.root / "kmeans"
        self.do("speech_units/fit_kmeans.py", manifest=audio / "train.jsonl", audio_root=audio, output_dir=kmeans)
        for name in ("train", self.split):
            inputs = {"manifest": audio / f"{name}.jsonl", "audio_root": audio, "kmeans": kmeans}
            self.do("speech_units/label_audio.py", output_dir=self.units / name, **inputs, num_workers=2)

    def extend_base(self) -> None:
        """Units -> tokenizer and extended model."""
        base, bpe, tokenizer = self.root / "base", self.root / "units_bpe", self.root / "tokenizer"
        self.do("train_bpe_tokenizer/train_bpe.py", units=[self.units / "train"], output_dir=bpe)
        self.do("train_bpe_tokenizer/merge_tokenizer.py", base=base, units_bpe=bpe, output_dir=tokenizer)
        inputs = {"model": base, "tokenizer": tokenizer, "seed": self.seed}
        self.do("train_bpe_tokenizer/extend_model.py", output_dir=self.models / "base", **inputs)

    def pretrain(self) -> None:
        """Continued pretraining on speech and text."""
        self.train("cpt", self.models / "base")
        for name in self.checkpoints:
            self.export(self.root / "cpt_run" / name, self.models / "base", self.models / name)

    def tune(self) -> None:
        """Instruction tuning."""
        examples, model = self.root / "sft_data", self.models / self.checkpoints[-1]
        inputs = {"units": [self.units / "train"], "parallel": [self.data / "parallel.jsonl"], "seed": self.seed}
        self.do("instruction_tuning/build_sft_data.py", output_dir=examples, **inputs)
        tuning = {f"sft.{name}": value for name, value in self.settings["sft_training"].items()}
        inputs = {"model": model, "data": examples / "sft.jsonl", "seed": self.seed}
        self.do("instruction_tuning/train.py", output_dir=self.models / "sft", **inputs, **tuning)

    def evaluate(self, limits: Path) -> None:
        """Controls, prompts, outputs and scores; on the test split, compared with the limits if there are any."""
        test, shuffled = self.units / self.split, self.units / f"{self.split}_shuffled"
        control, results = self.root / "generations/control_nearest", self.root / "results"
        inputs = {"train": self.units / "train", "nearest_dir": control, "test": test, "shuffled_dir": shuffled}
        self.do("tiny/make_controls.py", **inputs)
        outputs = [
            control,
            *self.decode("original", ["base", *self.checkpoints], [test]),
            *self.decode("chat", ["sft"], [test, shuffled]),
        ]
        facts = {"model": "tiny", "mixture": "5to1"}
        self.do("results/score.py", generations=outputs, **facts, output_dir=results / "tiny")
        self.do("results/summarize.py", results=[results], output_dir=self.root / "summary")
        if self.split == "test" and limits.is_file():
            self.do("tiny/check_scores.py", results=results / "tiny", limits=limits)

    def decode(self, style: str, names: list[str], units: list[Path]) -> list[Path]:
        """Have models translate the test sentences and transcribe units, asked in one style; returns the outputs."""
        prompts, generations = self.root / "instructions" / style, self.root / "generations"
        test = {
            "test_set": "flores200",
            "data_root": self.data / "flores",
            "dataset": "tiny",
            "pairs": ",".join(PAIRS),
            "split": "devtest" if self.split == "test" else "dev",
            "test_lines": "1-100",
        }
        pool = {"example_split": "dev", "example_lines": "151-200"}  # never the test split; when tuning, other lines
        for shots, examples in ((0, {}), (5, pool)):
            asked = {"shots": shots, "style": style, **examples, **test}
            self.do("instructions/build_instructions.py", output_dir=prompts, **asked)
        files = [prompts / f"{shots}_shot/tiny_{pair}.jsonl" for shots in (0, 5) for pair in PAIRS]
        models = [self.models / name for name in names]
        self.do("generate/generate.py", output_dir=generations / "mt", checkpoints=models, prompts=files)
        inputs = {"style": style, "checkpoints": models, "units": units}
        self.do("generate/generate_ASR.py", output_dir=generations / "asr", **inputs)
        return [generations / task / name for name in names for task in ("mt", "asr")]


def score_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of each file that the pipeline is run for, by its path below the pipeline's folder."""
    paths = sorted([*root.glob("results/tiny/*.csv"), *root.glob("summary/[!.]*")])
    return {str(path.relative_to(root)): hash_file(path) for path in paths}


def finished(root: Path, request: dict) -> bool:
    """Whether a run of the same request has ended here, and its scores are as it left them.

    Asking each of thirty scripts, which all know, would take half a minute.
    """
    if not (root / FINISHED).is_file():
        return False
    ended = read_json(root / FINISHED, "remove it")
    same_request = all(ended.get(name) == value for name, value in request.items())
    return same_request and ended.get("outputs") == score_hashes(root)


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
        seed: Seed of initialisation, data order and sampling; the pocket language itself stays.
        processes: Processes of both trainings, under torchrun.
    """
    import yaml

    check_exists(size, "name a YAML such as tiny/ci.yaml")
    settings = yaml.safe_load(size.read_text(encoding="utf-8"))
    root = output_dir.resolve()
    request = {"settings": settings, "split": split, "seed": seed, "processes": processes}
    where = f"Scores: {output_dir}/results/tiny/*.csv; plot: {output_dir}/summary/scores.png"
    if finished(root, request):
        print((root / "summary/table.md").read_text(encoding="utf-8"))
        print(f"all done before. {where}")
        return
    steps = Pipeline(root, settings, split, seed, processes)
    steps.make_base()
    steps.label_audio()
    steps.extend_base()
    steps.pretrain()
    steps.tune()
    steps.evaluate(limits=size.with_name(f"{size.stem}_limits.yaml"))
    write_json(root / FINISHED, {**request, "outputs": score_hashes(root)})
    print(f"\nall done in {steps.runner.seconds()}. {where}")


if __name__ == "__main__":
    run(pipeline)
