"""Score segments with COMET models, for results/score.py, which runs this in COMET's own environment.

Usage: .venv-comet/bin/python results/predict_comet.py --comet22 Unbabel/wmt22-comet-da   (then requests on stdin)

A model is a name on the Hugging Face hub, or a local checkpoint: its folder, or checkpoints/model.ckpt in it.
Reads requests from stdin and answers each on stdout, one JSON object a line:
  {"metric": "comet22"}                   what the model is: {"model": ..., "version": unbabel-comet's}
  {"metric": "comet22", "samples": [{"src": ..., "mt": ..., "ref": ...}, ...]}     {"scores": [...], "mean": ...}
CometKiwi's samples have no "ref". A model is loaded when the first samples for it come, in place of the one before it.
What cannot be done is answered with {"error": ..., "remedy": ...}. Nothing of towerspeech is imported: it is not
installed there.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path

METRICS = ("comet22", "cometkiwi22")


class UserError(Exception):
    """What is wrong, and what to do about it."""


def find_checkpoint(model: str, flag: str) -> tuple[Path, str]:
    """A model's checkpoint and how a signature names it: by the hub's revision, or by a local file's hash."""
    if Path(model).exists():
        path = Path(model).resolve()
        checkpoint = path / "checkpoints" / "model.ckpt" if path.is_dir() else path
        for needed in (checkpoint, checkpoint.parents[1] / "hparams.yaml"):
            if not needed.is_file():
                raise UserError(f"{model} is no COMET checkpoint: there is no {needed}", f"check {flag}")
        with open(checkpoint, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return checkpoint, f"model:{checkpoint.parents[1].name}|sha256:{sha256[:16]}"
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


def load(metric: str, checkpoint: Path, flag: str):
    """Load a model."""
    from comet import load_from_checkpoint

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


def serve(models: dict[str, str], requests, replies) -> None:
    """Answer requests until there are no more."""
    find = cache(lambda metric: find_checkpoint(models[metric], flags[metric]))
    flags = {"comet22": "--comet_model", "cometkiwi22": "--cometkiwi_model"}  # score.py's
    loaded = {}
    for line in requests:
        request = json.loads(line)
        metric = request["metric"]
        try:
            checkpoint, name = find(metric)
            if "samples" not in request:
                reply = {"model": name, "version": metadata.version("unbabel-comet")}
            else:
                import torch

                if metric not in loaded:
                    loaded.clear()
                    loaded[metric] = load(metric, checkpoint, flags[metric])
                found = loaded[metric].predict(
                    request["samples"], gpus=int(torch.cuda.is_available()), progress_bar=sys.stderr.isatty()
                )
                reply = {"scores": found.scores, "mean": found.system_score}
        except UserError as error:
            reply = dict(zip(("error", "remedy"), error.args, strict=True))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for metric in METRICS:
        parser.add_argument(f"--{metric}", metavar="MODEL", help="hub name or local checkpoint")
    models = vars(parser.parse_args())
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not get between the replies
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns of every data loader's fork
    logging.disable(logging.INFO)  # Lightning tells of devices at every test set
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torchmetrics")
    serve(models, sys.stdin, replies)


if __name__ == "__main__":
    main()
