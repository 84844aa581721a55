"""Model folders and the checkpoints of a run: which files belong beside the weights, does the tokenizer fit."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.stage import RUN_INFO

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "tekken.json",
    "speech_units.json",
)
NOT_SAVED = ("tokenizer.model", "speech_units.json")  # those that a tokenizer's save_pretrained leaves out
NOTES = (".json", ".md", ".txt", "")  # endings of settings, licence and README


def copy_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def notes(model: Path) -> list[str]:
    """Names of what belongs to a model beside weights and tokenizer: settings, licence, README."""
    return [
        path.name
        for path in sorted(model.iterdir())
        if path.is_file()
        and path.suffix in NOTES
        and path.name not in TOKENIZER_FILES
        and not path.name.startswith(".")
        and not path.name.endswith((RUN_INFO, ".index.json"))
    ]


def save_trained(network, model: Path, folder: Path) -> None:
    """Save a network in ``folder``, with what else belongs to ``model``, from which it was trained."""
    network.save_pretrained(folder)
    copy_files(model, folder, {*TOKENIZER_FILES, *notes(model)} - {"config.json"})


def check_tokenizer_fits(model: Path, num_tokens: int, num_rows: int) -> None:
    """Raise UserError if a model's tokenizer has more tokens than the model has embeddings."""
    if num_tokens > num_rows:
        raise UserError(
            f"{model}: its tokenizer has {num_tokens:,} tokens, its model only {num_rows:,} embedding rows",
            "keep together the tokenizer and the model that train_bpe_tokenizer/extend_model.py made for it",
        )


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint-<step> folders of a run, newest last.

    What else a user keeps under a name like that (checkpoint-4-backup, a file) is not among them.
    """
    named = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[1-9][0-9]*", path.name)]
    return sorted((path for path in named if path.is_dir()), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """3000 for .../checkpoint-3000."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
