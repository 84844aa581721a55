"""Load a model onto processes that share it, in one of two ways: bench_training.py times them.

Usage: torchrun --nproc_per_node 2 benchmarks/loading.py --model model/ --output_dir out/ --way shards

Writes loading.json: the seconds, the largest peak of resident memory and of private memory over the processes (without
the pages of files that are mapped), and the float32 weights of one, in 1e9 bytes. ``shards`` is train.py's way; in
``whole`` the processes take turns to read a whole copy and divide it, as train.py did before.
"""

import json
import threading
import time
from pathlib import Path
from typing import Literal

from towerspeech.command import run
from towerspeech.processes import Processes


def memory_gb(*fields: str) -> float:
    """The sum of lines of this process's /proc/self/status, in 1e9 bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[field].split()[0]) * 1024 / 1e9 for field in fields)


def in_shards(model: Path, mesh):
    from continued_pretraining.network import allocate, divide, empty_network, fill

    network = empty_network(model)
    divide(network, mesh, "float32", compiled=False)
    allocate(network, "cpu")
    fill(network, model)
    return network


def whole(model: Path, mesh, processes: Processes):
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    for turn in range(processes.world):
        if turn == processes.rank:
            network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
            for layer in network.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(network, mesh=mesh)
        processes.wait()
    return network


def load(model: Path, output_dir: Path, way: Literal["shards", "whole"]) -> None:
    """Load a model once.

    Args:
        model: Model folder.
        output_dir: New folder.
        way: How to load it.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoModelForCausalLM  # noqa: F401 - imported before the clock starts

    import continued_pretraining.network  # noqa: F401

    processes = Processes()
    processes.join("cpu")
    mesh = init_device_mesh("cpu", (1, processes.world), mesh_dim_names=("replicate", "shard"))
    private, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            private[0] = max(private[0], memory_gb("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    processes.wait()
    began = time.monotonic()
    network = in_shards(model, mesh) if way == "shards" else whole(model, mesh, processes)
    processes.wait()
    seconds = time.monotonic() - began
    ended.set()
    watcher.join()
    own = sum(parameter.to_local().numel() for parameter in network.parameters()) * 4 / 1e9
    box = torch.tensor([memory_gb("VmHWM"), private[0], own])
    dist.all_reduce(box, dist.ReduceOp.MAX)
    if processes.rank == 0:
        names = ("memory_gb", "private_gb", "weights_gb")
        found = {"seconds": seconds, **dict(zip(names, box.tolist(), strict=True))}
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "loading.json").write_text(json.dumps(found), encoding="utf-8")
    processes.leave()


if __name__ == "__main__":
    run(load)
