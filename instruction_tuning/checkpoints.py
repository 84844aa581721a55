"""The Trainer's checkpoints, which it writes in place: which of them are whole."""

from pathlib import Path

from towerspeech.files import read_json, remove, sync, write_json
from towerspeech.model_folder import checkpoints
from towerspeech.stage import RUN_INFO


def own_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-<step> folders, newest last; a link was put there by the user."""
    return [path for path in checkpoints(folder) if not path.is_symlink()]


def mark_whole(checkpoint: Path, step: int, steps: int) -> None:
    """Write run_info.json (step, and steps of the run) when all else is written: without it no checkpoint is whole."""
    for path in checkpoint.rglob("*"):
        sync(path)
    write_json(checkpoint / RUN_INFO, {"step": step, "steps": steps})


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; deletes those that are not whole."""
    whole = None
    for path in own_checkpoints(folder):
        if (path / RUN_INFO).is_file():
            whole = path
        else:
            remove(path)
    return whole


def is_last(checkpoint: Path | None) -> bool:
    """Whether a checkpoint holds the weights of the run's last step (an FSDP one is left to the Trainer)."""
    if checkpoint is None or not any(checkpoint.glob("model*.safetensors")):
        return False
    info = read_json(checkpoint / RUN_INFO, "remove this checkpoint")
    return info["step"] >= info["steps"]
