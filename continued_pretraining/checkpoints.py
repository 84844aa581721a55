"""The checkpoints of a training run, which appear whole or not at all."""

import contextlib
import json
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import publish, remove, write_json
from towerspeech.model_folder import checkpoint_step, checkpoints
from towerspeech.processes import Processes
from towerspeech.stage import RUN_INFO


def finished(run_dir: Path) -> list[Path]:
    """The checkpoints that save has written, newest last."""
    return [path for path in checkpoints(run_dir) if (path / RUN_INFO).is_file()]


def check_free(path: Path) -> None:
    """Raise UserError if something that is no checkpoint of ours lies where one must be written."""
    if path.exists() and not (path / RUN_INFO).is_file():
        raise UserError(f"{path} is no checkpoint, but one must be written there", "move it away")


def save(target: Path, model, optimizer, info: dict, processes: Processes) -> None:
    """Publish a checkpoint; called by all processes."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    check_free(target)
    weights, states = get_state_dict(model, optimizer)
    with publish(target) if processes.rank == 0 else contextlib.nullcontext() as path:
        path = processes.agree(path)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)
        if processes.rank == 0:
            write_json(path / RUN_INFO, info)
    dist.barrier()


def load(checkpoint: Path, model, optimizer) -> dict:
    """Load a checkpoint into model and optimizer, whatever mesh wrote it; returns its run_info."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return json.loads((checkpoint / RUN_INFO).read_text(encoding="utf-8"))


def remove_old(run_dir: Path, keep: list[int]) -> None:
    """Remove all checkpoints but the newest and those of the steps to keep."""
    for path in finished(run_dir)[:-1]:
        if checkpoint_step(path) not in keep:
            remove(path)
