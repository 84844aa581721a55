"""Score translations with COMET-22 and CometKiwi-22, beside the scores that results/score.py has written.

Usage: .venv-comet/bin/python results/score_comet.py --generations runs/generations/checkpoint-300 \\
           --model TowerSpeech --mixture 5to1 --output_dir results/TowerSpeech --metrics comet22,cometkiwi22
       .venv-comet/bin/python results/score_comet.py --hypotheses out.de --references ref.de --sources src.en \\
           --target_lang de --output scores.csv

Runs in COMET's own environment: bash install.sh comet. Reads checkpoints' folders of generations, or plain files, one
segment a line, and adds to the same CSVs as results/score.py, test set by test set. A score is the mean of the
segments' scores, mostly in 0..1, with a 95% interval. A model is a name on the Hugging Face hub, or a local
checkpoint: its folder, or checkpoints/model.ckpt in it. Offline, its encoder's config and tokenizer must be in the
hub's cache.
"""

import argparse
import importlib.util
import json
import logging
import math
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

from results.scores_csv import COMET_METRICS, choose_metrics, opened, read_test_sets
from towerspeech.errors import UserError, space_needed
from towerspeech.files import hash_file
from towerspeech.generations import Outputs
from towerspeech.metrics import BOOTSTRAP_SAMPLES, SEED, TRANSLATION_TASKS, Score, with_interval
from towerspeech.stage import record
from towerspeech.system import read_block

MODELS = {"comet22": "comet_model", "cometkiwi22": "cometkiwi_model"}  # the arguments that name them


def find_checkpoint(model: str, flag: str) -> tuple[Path, str]:
    """A model's checkpoint and how a signature names it: by the hub's revision, or by a local file's hash."""
    if Path(model).exists():
        path = Path(model).resolve()
        checkpoint = path / "checkpoints" / "model.ckpt" if path.is_dir() else path
        for needed in (checkpoint, checkpoint.parents[1] / "hparams.yaml"):
            if not needed.is_file():
                raise UserError(f"{model} is no COMET checkpoint: there is no {needed}", f"check {flag}")
        return checkpoint, f"model:{checkpoint.parents[1].name}|sha256:{hash_file(checkpoint)[:16]}"
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise UserError(f"{model} does not exist", f"check {flag}")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model))
    except Exception as error:  # of the network, of the hub, of its rights
        raise UserError(
            f"{model} cannot be had from the Hugging Face hub: {first_line(error)}",
            "CometKiwi wants its licence accepted on its page and a login (.venv-comet/bin/hf auth login); "
            f"without a network, fetch the model elsewhere and name its checkpoint with {flag}",
        ) from None
    return folder / "checkpoints" / "model.ckpt", f"model:{model}|revision:{folder.name}"


def first_line(error: Exception) -> str:
    """An exception's kind and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def load(metric: str, checkpoint: Path):
    """Load a model; UserError unless it can be this metric's."""
    from comet import load_from_checkpoint

    flag = f"--{MODELS[metric]}"
    try:
        model = load_from_checkpoint(str(checkpoint))
    except Exception as error:  # of the file, or of the hub: the encoder's tokenizer is not in the checkpoint
        raise UserError(
            f"{checkpoint} cannot be loaded: {first_line(error)}",
            f"check {flag}; COMET also takes its encoder's config and tokenizer from the hub or its cache "
            "(xlm-roberta-large; CometKiwi: microsoft/infoxlm-large)",
        ) from None
    needs = model.requires_references()
    if metric == "cometkiwi22" and needs:
        raise UserError(f"{checkpoint} is a {type(model).__name__} that needs references", f"check {flag}")
    if metric == "comet22" and not needs and "ref" not in model.hparams.get("input_segments", ()):
        raise UserError(f"{checkpoint} is a {type(model).__name__} that reads no references", f"check {flag}")
    return model


def predict(model, metric: str, outputs: Outputs, signature: str) -> Score:
    """Score one test set."""
    import torch

    columns = {"src": outputs.sources, "mt": outputs.hypotheses}
    if metric == "comet22":
        columns["ref"] = outputs.references
    samples = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
    answer = model.predict(samples, gpus=int(torch.cuda.is_available()), progress_bar=sys.stderr.isatty())
    if not all(map(math.isfinite, answer.scores)):
        raise UserError(f"{outputs.file}: {metric} gives scores that are no numbers", "check the model")
    _, low, high = with_interval(answer.scores, [1] * len(samples))
    return Score(metric, answer.system_score, low, high, len(samples), signature)


def score_comet(arguments: dict) -> None:
    """Bring the CSVs up to date; arguments as ``parse`` gives them."""
    metrics = choose_metrics(arguments["metrics"], COMET_METRICS)
    sets = []
    for path, outputs in read_test_sets(arguments):
        if outputs.facts["task"] in TRANSLATION_TASKS and outputs.sources is not None:
            sets.append((path, outputs))
        elif outputs.facts["task"] in TRANSLATION_TASKS:
            print(f"no {', '.join(metrics)} for {outputs.file}: it has no sources", flush=True)
    if not sets:
        raise UserError(f"{', '.join(metrics)} read translations and their sources, and there are none")
    models = {metric: find_checkpoint(arguments[MODELS[metric]], f"--{MODELS[metric]}") for metric in metrics}
    with opened(sets) as tables:
        for metric, (checkpoint, name) in models.items():
            version = f"bs:{BOOTSTRAP_SAMPLES}|seed:{SEED}|version:unbabel-comet-{metadata.version('unbabel-comet')}"
            model = None  # the one before it makes room
            for path, outputs in sets:
                end = f"|sources:{outputs.sources_sha256[:16]}" if outputs.sources_sha256 else ""
                signature = f"{name}|{version}{end}"
                if not tables[path].missing(outputs, {metric: signature}):
                    print(f"already scored: {outputs.file} ({metric})", flush=True)
                    continue
                if model is None:
                    model = load(metric, checkpoint)
                tables[path].add(outputs, [predict(model, metric, outputs, signature)])
    if arguments["output_dir"]:
        record(__file__, "score_comet", arguments["output_dir"], arguments, ["generations"], list(tables))


def parse() -> dict:
    """The command line's arguments; COMET pins a jsonargparse that cannot make them of a function."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--generations", type=Path, nargs="+", help="checkpoints' folders of generations")
    parser.add_argument("--model", default="", help="the model's name, for the CSV")
    parser.add_argument("--mixture", default="", help="the training mixture's name, for the CSV")
    parser.add_argument("--output_dir", type=Path, help="folder of the checkpoints' CSVs: results/<model>")
    parser.add_argument("--prompts", type=Path, nargs="+", help="prompt files that they must have come from")
    parser.add_argument("--hypotheses", type=Path, help="outputs, one a line, instead of generations")
    parser.add_argument("--references", type=Path, help="references, one a line")
    parser.add_argument("--sources", type=Path, help="sources, one a line")
    parser.add_argument("--target_lang", help="the hypotheses' language, such as de")
    parser.add_argument("--task", choices=TRANSLATION_TASKS, default="mt", help="what the line files hold")
    parser.add_argument("--output", type=Path, help="CSV to write for line files")
    parser.add_argument("--metrics", nargs="+", default=["comet22"], help="comet22, cometkiwi22 (default: comet22)")
    parser.add_argument("--comet_model", default="Unbabel/wmt22-comet-da", help="hub name or local checkpoint")
    parser.add_argument("--cometkiwi_model", default="Unbabel/wmt22-cometkiwi-da", help="likewise")
    parser.add_argument("--config", help="YAML of a system; flags override")
    parser.add_argument("--print_config", action="store_true", help="show what all flags are, and end")
    config = parser.parse_known_args()[0].config
    block = (read_block(config, "score_comet") if config else {}) or {}
    if unknown := block.keys() - vars(parser.parse_args()).keys():
        parser.error(f"{config}: score_comet takes no {min(unknown)}")
    parser.set_defaults(**block)
    arguments = vars(parser.parse_args())
    del arguments["config"]
    if arguments.pop("print_config"):
        print(json.dumps(arguments, default=str))
        sys.exit()
    return arguments


if __name__ == "__main__":
    asked = parse()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns of every data loader's fork
    logging.disable(logging.INFO)  # Lightning tells of devices at every test set
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torchmetrics")
    try:
        if not importlib.util.find_spec("comet"):
            raise UserError("COMET is not installed here", "bash install.sh comet, then run .venv-comet/bin/python")
        with space_needed():
            score_comet(asked)
    except UserError as error:
        sys.exit(f"error: {error}")
