"""The Trainer's checkpoints, which it writes and deletes in place: which of them are whole."""

import json
import zipfile
from pathlib import Path

from towerspeech.files import remove
from towerspeech.model_folder import checkpoints

WEIGHTS = (
    "model.safetensors",  # one process, or DDP
    "model.safetensors.index.json",
    "pytorch_model_fsdp.bin",  # FSDP, gathered
    "pytorch_model_fsdp_0/.metadata",  # FSDP, sharded: written last
)
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata")


def own_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-<step> folders, newest last; a link was put there by the user."""
    return [path for path in checkpoints(folder) if not path.is_symlink()]


def is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether a checkpoint was written to its end (and its deletion not begun).

    The Trainer writes weights, optimizer, scheduler, random states, and trainer_state.json last; yet other processes'
    random states may come later. torch's files are zip files, whose directory is at their end.
    """

    def ended(name: str) -> bool:
        path = checkpoint / name
        if path.suffix in {".pt", ".pth", ".bin"}:
            return zipfile.is_zipfile(path)
        return path.is_file() and path.stat().st_size > 0

    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    return (
        all(ended(name) for name in ("scheduler.pt", *random_states))
        and any(ended(name) for name in WEIGHTS)
        and any(ended(name) for name in OPTIMIZER)
    )


def newest_checkpoint(folder: Path, processes: int) -> Path | None:
    """The newest whole checkpoint; deletes those that are not whole."""
    whole = None
    for path in own_checkpoints(folder):
        if is_whole(path, processes):
            whole = path
        else:
            remove(path)
    return whole


def is_last(checkpoint: Path | None) -> bool:
    """Whether a checkpoint holds the weights of the run's last step (an FSDP one is left to the Trainer)."""
    if checkpoint is None or not any(checkpoint.glob("model*.safetensors")):
        return False
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]
