"""Say what a run of train.py will need, before an hour of a GPU is spent: memory, steps, hours, the command.

Usage: python continued_pretraining/plan.py --config systems/towerspeech_6b.yaml --model extended_model/ --num_gpus 8

Reads a model folder's config.json; weights are not needed. Of a system's YAML it takes the flags of train.py's block,
and the budget of its mixture; a block `plan` may hold more. Prints a table; writes nothing. The memory is that of
train.py's own steps, run on tensors without values (memory.py); the hours are what the assumed --mfu makes of the
number of operations.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_number_type

from continued_pretraining.checks import mesh_shape, read_config
from continued_pretraining.flops import CARDS
from towerspeech.command import run
from towerspeech.errors import UserError

if TYPE_CHECKING:
    from continued_pretraining.memory import Needs

GIB = 2**30
# A CUDA context, NCCL's and cuBLAS's buffers and the allocator's gaps take this share of a card: our guess.
HEADROOM = 0.08
GPUS_PER_NODE = 8
LINES = {  # of the table, by memory.py's names
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimizer states": "AdamW's states, twice fp32",
    "activations": "activations of the forward pass",
    "loss": "loss: logits of some tokens, gradient of lm_head",
    "gathered weights": "weights that FSDP has gathered",
    "backward pass": "backward pass: what is computed again, gradients on their way",
}
Share = restricted_number_type("Share", float, [(">", 0), ("<=", 1)])


@dataclass(frozen=True)
class Settings:
    """The command's flags.

    Args:
        model: Model folder; its config.json is enough.
        num_gpus: Number of GPUs, which is train.py's number of processes.
        tokens: Tokens to train on; default: the budget of the mixture in the system's YAML.
        card: What the GPUs are.
        gpu_memory: Memory of a GPU in GiB (2^30 bytes), instead of the card's: a100 80, h100 80, h200 140.
        peak_tflops: TFLOP/s of a GPU, instead of the card's: in bfloat16 a100 312, h100 and h200 989.
        mfu: Model FLOPs utilization, the share of the peak that is reached: an assumption.
        sequence_length: As train.py's.
        global_batch_size: As train.py's.
        micro_batch_size: As train.py's; default: the largest that fits.
        replicate: As train.py's; default: num_gpus / shard.
        shard: As train.py's; default: num_gpus / replicate.
        dtype: As train.py's.
        activation_checkpointing: As train.py's.
        reduce_gradients: As train.py's.
        system: A system's YAML, for the command that is printed; --config systems/<name>.yaml says it, too.
    """

    model: Path
    num_gpus: PositiveInt
    tokens: PositiveInt | None = None
    card: Literal["a100", "h100", "h200"] = "h100"
    gpu_memory: PositiveFloat | None = None
    peak_tflops: PositiveFloat | None = None
    mfu: Share = 0.4
    sequence_length: PositiveInt = 2048
    global_batch_size: PositiveInt = 512
    micro_batch_size: PositiveInt | None = None
    replicate: PositiveInt | None = None
    shard: PositiveInt | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    reduce_gradients: Literal["micro_batch", "step"] = "micro_batch"
    system: str | None = None


def from_system(config: str) -> dict | None:
    """Flags of a system's YAML: of its block for train.py those that a plan needs, and the budget of its mixture."""
    from towerspeech.mixture import Group, Source, with_budgets
    from towerspeech.system import read_block

    training = read_block(config, "continued_pretraining")
    if training is None:
        return None
    known = {field.name for field in fields(Settings)}
    flags = {name: value for name, value in training.items() if name in known} | {"system": config}
    if mixture := read_block(config, "build_mixture"):
        try:
            sources = [Source(**source) for source in mixture["sources"]]
            groups = {name: Group(**group) for name, group in (mixture.get("groups") or {}).items()}
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{config}: build_mixture says no budgets: {error}", "mend it, or give flags alone"
            ) from None
        flags["tokens"] = sum(source.budget for source in with_budgets(sources, groups))
    return flags | read_block(config, "plan")


# --- The parts of a plan --------------------------------------------------------------------------
def divisors(number: int) -> list[int]:
    """The numbers that divide it, in order."""
    return [each for each in range(1, number + 1) if number % each == 0]


def train_command(settings: Settings, micro: int, replicate: int, shard: int) -> str:
    """The line to type on each node; what is in capitals is for the user to say."""
    per_node = max(each for each in divisors(settings.num_gpus) if each <= GPUS_PER_NODE)
    nodes = settings.num_gpus // per_node
    several = f" --nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500" if nodes > 1 else ""
    same = {name: getattr(settings, name) for name in ("sequence_length", "global_batch_size")}
    same |= {"micro_batch_size": micro, "replicate": replicate, "shard": shard, "dtype": settings.dtype}
    same |= {name: getattr(settings, name) for name in ("activation_checkpointing", "reduce_gradients")}
    lines = [
        f"torchrun --nproc_per_node {per_node}{several} continued_pretraining/train.py",
        f"{f'--config {settings.system} ' if settings.system else ''}--model {settings.model}",
        "--mixture MIXTURE --output_dir RUN",
        " ".join(f"--{name} {value}" for name, value in same.items()),
    ]
    return " \\\n    ".join(lines)


def remedies(settings: Settings, needs: "Needs", shard: int) -> str:
    """What makes a run need less memory, and is not done yet."""
    ways = []
    if needs.micro > 1:
        ways.append(f"--micro_batch_size {needs.largest or 1}")
    if settings.activation_checkpointing != "full":
        ways.append("--activation_checkpointing full")
    if settings.reduce_gradients == "step":
        ways.append("--reduce_gradients micro_batch")
    if settings.dtype == "float32":
        ways.append("--dtype bfloat16")
    if shard < settings.num_gpus:
        ways.append(f"a larger --shard (up to {settings.num_gpus})")
    return ", or ".join([*ways, "more GPUs to shard over, or larger ones"])


# --- The plan -------------------------------------------------------------------------------------
def table(needs: "Needs", settings: Settings, of_card: float) -> str:
    """The lines on memory, in GiB."""
    rows = [(LINES[kind], size) for kind, size in needs.peak.items()]
    rows += [
        ("sum", sum(needs.peak.values())),
        (f"usable: {1 - HEADROOM:.0%} of {of_card:g} GiB", (1 - HEADROOM) * of_card * GIB),
    ]
    head = f"Memory of a GPU at its peak, micro-batch of {needs.micro} x {settings.sequence_length:,} tokens"
    windows = settings.global_batch_size // settings.num_gpus
    largest = f"{needs.largest} windows" if needs.largest else "none"
    return "\n".join(
        [
            f"{head:66}{'GiB':>8}",
            *(f"  {name:64}{size / GIB:8.2f}" for name, size in rows),
            f"Largest micro-batch that fits, of those that divide a GPU's {windows} windows of a step: {largest}",
        ]
    )


def plan(settings: Settings) -> None:
    """Print the plan.

    Raises:
        UserError: What train.py would refuse, or a run that does not fit the GPUs' memory.
    """
    batch, length, tokens = settings.global_batch_size, settings.sequence_length, settings.tokens
    read_config(settings.model, length)
    if tokens is None:
        raise UserError("it is not said how many tokens there are", "give --tokens, or --config with a system's YAML")
    given = settings.replicate, settings.shard
    replicate, shard = mesh_shape(*given, settings.num_gpus, batch, settings.micro_batch_size or 1)
    from continued_pretraining.memory import Kind, find_needs

    card = CARDS[settings.card]
    of_card = settings.gpu_memory or card.memory
    peak_tflops = settings.peak_tflops or getattr(card, settings.dtype)
    usable = (1 - HEADROOM) * of_card * GIB
    recomputed, reduced = settings.activation_checkpointing, settings.reduce_gradients
    kind = Kind(settings.model, (replicate, shard), length, settings.dtype, recomputed, reduced)
    needs = find_needs(kind, divisors(batch // settings.num_gpus), settings.micro_batch_size, usable)
    hours = tokens * needs.flops / (peak_tflops * 1e12 * settings.mfu) / 3600
    print(
        f"{settings.model}: {needs.parameters:,} parameters\n"
        f"{settings.num_gpus} GPUs ({settings.card}), replicate {replicate} x shard {shard}, {settings.dtype}, "
        f"activation checkpointing: {settings.activation_checkpointing}\n\n"
        f"{table(needs, settings, of_card)}\n\n"
        f"Steps: {math.ceil(tokens / (batch * length)):,} of {batch} x {length:,} tokens, for {tokens:,} tokens\n"
        f"Operations: {needs.flops / 1e9:,.4g} GFLOP a token, {needs.flops * tokens:.3g} FLOP in all\n"
        f"Time: {hours:,.4g} GPU hours, {hours / settings.num_gpus / 24:,.3g} days, if {settings.mfu:.0%} of "
        f"{peak_tflops:g} TFLOP/s are reached (--mfu: an assumption)"
    )
    if settings.activation_checkpointing == "full":
        print("  The layers' forward pass is computed twice; the MFU does not count the second time.")
    if (needed := sum(needs.peak.values())) > usable:
        raise UserError(
            f"a micro-batch of {needs.micro} needs {needed / GIB:.2f} GiB, a GPU has {usable / GIB:.2f} GiB for it; "
            f"most of what is needed are {max(needs.peak, key=needs.peak.get)}",
            remedies(settings, needs, shard),
        )
    print(f"\n{train_command(settings, needs.micro, replicate, shard)}")


if __name__ == "__main__":
    run(plan, Settings, from_system)
