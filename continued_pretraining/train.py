"""Continue pretraining on a mixture, with FSDP2 on a replicate x shard mesh.

Usage: torchrun --nproc_per_node 8 continued_pretraining/train.py \\
           --config continued_pretraining/configs/towerspeech_6b.yaml \\
           --model extended_model/ --mixture mixture/towerspeech_6b --output_dir runs/towerspeech_6b

Reads a Hugging Face model folder and a mixture; writes checkpoint-<step>/ (torch.distributed.checkpoint: fp32 weights
and AdamW states; run_info.json: step, loss, tokens of each source) and train.log (JSON lines). Every step is a pure
function of the checkpoint before it, so a run that was killed goes on as if nothing had happened. A checkpoint of one
mesh can be continued on another one. Also runs without torchrun, and on CPU. A file named .stop in the output folder
asks it to write a checkpoint and end (sbatch/job.sh does so before a time limit).
"""

import contextlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Literal

from towerspeech.command import UserError, run
from towerspeech.files import publish, read_json, remove, write_json
from towerspeech.stage import RUN_INFO, stage


# --- Set-up ---------------------------------------------------------------------------------------
def check_inputs(model: Path, mixture: Path, sequence_length: int) -> None:
    """Refuse a model without weights, a mixture of another tokenizer, and windows beyond the model's context."""
    from towerspeech.tokenizer import tokenizer_hash

    made_by = "make the model with train_bpe_tokenizer/extend_model.py"
    config = read_json(model / "config.json", made_by, ["vocab_size", "max_position_embeddings"])
    if not list(model.glob("*.safetensors")):
        raise UserError(f"{model} holds no safetensors weights", made_by)
    made_by = "make the mixture with data_mixture/build_mixture.py"
    manifest = read_json(mixture / "manifest.json", made_by, ["tokenizer_sha256", "vocab_size"])
    if manifest["tokenizer_sha256"] != tokenizer_hash(model):
        raise UserError(
            f"mixture {mixture} was tokenized with another tokenizer than that of {model}",
            f"run data_mixture/build_mixture.py with --tokenizer {model}",
        )
    if config["vocab_size"] < manifest["vocab_size"]:
        raise UserError(
            f"{model} has {config['vocab_size']} embedding rows for a tokenizer of {manifest['vocab_size']}",
            "run train_bpe_tokenizer/extend_model.py",
        )
    if sequence_length > config["max_position_embeddings"]:
        raise UserError(
            f"--sequence_length {sequence_length} exceeds the model's context of {config['max_position_embeddings']}",
            "lower it",
        )


def start_processes(device: str) -> tuple[int, int]:
    """Join torchrun's process group, or make one of a single process; returns rank and world size."""
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"  # objects and files are agreed on over gloo
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def agree(value):
    """Rank 0's value, on all ranks."""
    import torch
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def agree_on_flag(value: bool) -> bool:
    """Rank 0's flag, on all ranks: an ``agree`` that is quick enough for every step."""
    import torch
    import torch.distributed as dist

    flag = torch.tensor(value)
    dist.broadcast(flag, src=0)
    return bool(flag)


def leave() -> None:
    """Leave the process group together: a process that goes first takes its connections from under the others."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def load_model(folder: Path, mesh, dtype: str, gradient_checkpointing: bool):
    """Load in fp32 and shard. The processes of a machine take turns, so that it holds one whole copy at a time."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        if turn == int(os.environ.get("LOCAL_RANK", "0")):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
        dist.barrier()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def learning_rate_at(step: int, steps: int, peak: float, warmup_steps: int, final_share: float) -> float:
    """Linear warm-up, then half a cosine to ``final_share`` of the peak; ``step`` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress)))


# --- Checkpoints ----------------------------------------------------------------------------------
def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints of a run, in order. They are published whole, so each is complete.

    What else a user keeps under a name like that (checkpoint-4-backup, a file) is not ours.
    """
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[1-9][0-9]*", path.name)]
    return sorted((int(path.name.removeprefix("checkpoint-")), path) for path in named if (path / RUN_INFO).is_file())


def check_free(path: Path) -> None:
    """Raise UserError if something that is no checkpoint of ours lies where one must be written."""
    if path.exists() and not (path / RUN_INFO).is_file():
        raise UserError(f"{path} is no checkpoint, but one must be written there", "move it away")


def save(target: Path, model, optimizer, info: dict) -> None:
    """Publish a checkpoint; called by all ranks."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    check_free(target)
    weights, states = get_state_dict(model, optimizer)
    with publish(target) if dist.get_rank() == 0 else contextlib.nullcontext() as path:
        path = agree(path)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)
        if dist.get_rank() == 0:
            write_json(path / RUN_INFO, info)
    dist.barrier()


def load(folder: Path, model, optimizer) -> dict:
    """Load a checkpoint into model and optimizer, whatever mesh wrote it; returns its run_info."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return json.loads((folder / RUN_INFO).read_text(encoding="utf-8"))


def remove_old(folder: Path, keep: list[int]) -> None:
    """Remove all checkpoints but the newest and those to keep."""
    for step, path in checkpoints(folder)[:-1]:
        if step not in keep:
            remove(path)


class Log:
    """train.log, one JSON object a line; lines after the step that a run goes on from are taken out."""

    def __init__(self, path: Path, step: int):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with publish(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, row: dict) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


# --- Training -------------------------------------------------------------------------------------
def read_mixture(mixture: Path, sequence_length: int, global_batch_size: int, keep_steps: list[int] | None):
    """The Mixture, the number of steps, and the steps whose checkpoints are kept, the last one among them.

    Raises:
        UserError: The mixture is not whole, or a step to keep lies outside the run.
    """
    from continued_pretraining.packing import Mixture

    data = Mixture(mixture, sequence_length)
    steps = -(-data.num_windows // global_batch_size)
    wanted = sorted({*(keep_steps or []), steps})
    if wanted[-1] > steps or wanted[0] < 1:
        raise UserError(f"--keep_steps {keep_steps} lies outside the run's 1..{steps} steps", "change --keep_steps")
    return data, steps, wanted


def train(
    model: Path,
    mixture: Path,
    output_dir: Path,
    sequence_length: int = 2048,
    global_batch_size: int = 512,
    micro_batch_size: int = 1,
    learning_rate: float = 2e-5,
    final_learning_rate_share: float = 0.1,
    warmup_share: float = 0.01,
    beta1: float = 0.9,
    beta2: float = 0.95,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    keep_steps: list[int] | None = None,
    save_every: int = 250,
    log_every: int = 10,
    replicate: int = 1,
    shard: int | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    gradient_checkpointing: bool = False,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    overwrite: bool = False,
) -> None:
    """Train until the mixture's budget is spent.

    Args:
        model: Model folder with the tokenizer that made the mixture.
        mixture: Folder written by build_mixture.py.
        output_dir: Run folder.
        sequence_length: Tokens of a window.
        global_batch_size: Windows of an optimizer step, over all processes.
        micro_batch_size: Windows that a process computes at once.
        learning_rate: Peak.
        final_learning_rate_share: Where the cosine ends, as a share of the peak.
        warmup_share: Share of all steps that warms up.
        beta1: AdamW's.
        beta2: AdamW's.
        weight_decay: AdamW's, on matrices.
        clip_norm: Largest norm of the gradient.
        keep_steps: Steps whose checkpoints are kept, besides the last.
        save_every: Steps between checkpoints to go on from; only the newest of them stays.
        log_every: Steps between lines in train.log.
        replicate: Data-parallel copies of the model.
        shard: Processes that share one copy; default: all processes / replicate.
        dtype: Of the computation; weights, gradients' sums and optimizer states are fp32.
        gradient_checkpointing: Recompute activations to save memory.
        device: auto takes CUDA if it is there.
        overwrite: Replace the output of a run with other arguments.
    """
    arguments = dict(locals())
    counts = ("sequence_length", "global_batch_size", "micro_batch_size", "save_every", "log_every", "replicate")
    for names, fits, wanted in (
        (counts, lambda value: value >= 1, "at least 1"),
        (("learning_rate", "clip_norm"), lambda value: 0 < value < math.inf, "more than 0"),
        (("final_learning_rate_share", "warmup_share"), lambda value: 0 <= value <= 1, "0 to 1"),
        (("beta1", "beta2"), lambda value: 0 <= value < 1, "0 or more, but less than 1"),
        (("weight_decay",), lambda value: 0 <= value < math.inf, "0 or more"),
    ):
        for name in names:
            if not fits(arguments[name]):
                raise UserError(f"--{name} is {arguments[name]}", f"give {wanted}")
    check_inputs(model, mixture, sequence_length)
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from tqdm import tqdm

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but there is no CUDA GPU", "leave --device out")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = start_processes(device)
    shard = shard or max(1, world // replicate)
    if replicate * shard != world:
        raise UserError(f"replicate {replicate} x shard {shard} is not {world} processes", "set --replicate, --shard")
    if global_batch_size % (world * micro_batch_size):
        raise UserError(
            f"--global_batch_size {global_batch_size} is no multiple of {world} processes x {micro_batch_size}",
            "change --global_batch_size or --micro_batch_size",
        )
    if overwrite or not (output_dir / RUN_INFO).is_file():  # else the stage's answer is enough, and quick
        read_mixture(mixture, sequence_length, global_batch_size, keep_steps)  # before a finished run is replaced
    with contextlib.ExitStack() as stack:
        work, problem = None, None
        if rank == 0:
            speed = [
                "micro_batch_size",
                "save_every",
                "log_every",
                "replicate",
                "shard",
                "gradient_checkpointing",
                "device",
            ]
            try:
                work = stack.enter_context(stage(output_dir, arguments, inputs=["model", "mixture"], ignore=speed))
            except UserError as error:
                problem = error
        problem, done = agree((str(problem) if problem else None, bool(work and work.done)))
        if problem or done:
            leave()
        if problem:
            if rank:
                sys.exit(1)  # the first process says it for all
            raise UserError(problem)
        if done:
            return

        data, steps, wanted = read_mixture(mixture, sequence_length, global_batch_size, keep_steps)
        for step in sorted({*wanted, *range(save_every, steps, save_every)}):
            check_free(output_dir / f"checkpoint-{step}")
        if rank == 0:
            print(
                f"{data.budgets.sum():,} tokens in {steps:,} steps of {global_batch_size} x {sequence_length};"
                f" {world} processes: replicate {replicate} x shard {shard} on {device}, {dtype}",
                flush=True,
            )
        mesh = init_device_mesh(device, (replicate, shard), mesh_dim_names=("replicate", "shard"))
        network = load_model(model, mesh, dtype, gradient_checkpointing)
        matrices = [p for p in network.parameters() if p.dim() > 1]
        vectors = [p for p in network.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=learning_rate,
            betas=(beta1, beta2),
            fused=True,
        )
        step = 0
        found = agree(checkpoints(output_dir) if rank == 0 else None)
        if found:
            step = load(found[-1][1], network, optimizer)["step"]
            if rank == 0:
                print(f"going on after step {step:,} from {found[-1][1]}", flush=True)
        log = Log(output_dir / "train.log", step) if rank == 0 else None

        share = global_batch_size // world  # windows of this process in a step
        loss_sum, logged_targets, last_time = torch.zeros((), device=device), 0, time.monotonic()
        progress = tqdm(initial=step, total=steps, unit=" steps", desc="train", mininterval=1, disable=rank > 0)
        while step < steps:
            first = step * global_batch_size
            inputs, targets = data.batch(range(first + rank * share, first + (rank + 1) * share))
            num_targets = data.num_targets(range(first, first + global_batch_size))
            for start in range(0, share, micro_batch_size):
                # The copies' gradients are summed once a step; the shards' with every micro-batch, to save memory.
                network.set_requires_all_reduce(start + micro_batch_size == share)
                x = torch.from_numpy(inputs[start : start + micro_batch_size]).to(device)  # (micro batch, length)
                y = torch.from_numpy(targets[start : start + micro_batch_size]).to(device)
                logits = network(input_ids=x, use_cache=False).logits.float()  # (micro batch, length, rows)
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
                (loss * (world / num_targets)).backward()  # FSDP averages over processes; we want the tokens' mean
                loss_sum += loss.detach()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(
                    step, steps, learning_rate, round(warmup_share * steps), final_learning_rate_share
                )
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            logged_targets += num_targets
            progress.update()

            stopping = step < steps and agree_on_flag(bool(work and work.asked_to_stop()))
            saving = stopping or step in wanted or step % save_every == 0
            if saving or step % log_every == 0:
                dist.all_reduce(loss_sum)
                mean_loss = loss_sum.item() / logged_targets
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                if not (math.isfinite(mean_loss) and math.isfinite(norm.item())):  # never into a checkpoint
                    problem = f"at step {step} the loss is {mean_loss}, the gradient's norm {norm.item()}"
                    raise UserError(problem, "lower --learning_rate, then run this again with another --output_dir")
                info = {"step": step, "loss": mean_loss, "learning_rate": optimizer.param_groups[0]["lr"]}
                if rank == 0:
                    now = time.monotonic()
                    speed = round(logged_targets / (now - last_time))
                    log.write({**info, "gradient_norm": norm.item(), "tokens_per_s": speed})
                    progress.set_postfix(loss=f"{mean_loss:.3f}", tokens_per_s=f"{speed:,}")
                    last_time = now
                loss_sum.zero_()
                logged_targets = 0
            if saving:
                tokens = data.tokens_seen(step * global_batch_size)
                plan = work.request if rank == 0 else None
                save(
                    output_dir / f"checkpoint-{step}",
                    network,
                    optimizer,
                    {**info, "tokens": tokens, "plan": plan, "outputs": {**info, "tokens": tokens, "plan": plan}},
                )
                if rank == 0:
                    remove_old(output_dir, wanted)
            if stopping:
                progress.close()
                leave()
                if rank:
                    sys.exit(1)  # the first process says it for all
                problem = f"asked to stop: saved {output_dir}/checkpoint-{step} of {steps:,} steps"
                raise UserError(problem, "run this again, and it goes on from there")
        progress.close()
        if rank == 0:
            remove_old(output_dir, wanted)  # also what a kill after the last save left
            work.counts.update({"steps": steps, "tokens": data.tokens_seen(data.num_windows)})
            print(f"trained on {data.budgets.sum():,} tokens: {output_dir}/checkpoint-{steps}", flush=True)
    leave()


if __name__ == "__main__":
    run(train)
