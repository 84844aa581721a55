"""plan.py: its memory against that of real steps, and what it prints."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from continued_pretraining import memory, plan, train
from continued_pretraining.memory import GRADIENTS, KINDS, OPTIMIZER, WEIGHTS, Kind, rehearse
from towerspeech.errors import UserError

REPO = Path(__file__).resolve().parents[2]
SYSTEM = REPO / "systems/towerspeech_6b.yaml"
LENGTH = 64


def make_config(folder: Path, width: int, layers: int, vocabulary: int, heads: int = 8) -> Path:
    """A model folder without weights; two heads share their keys and values, lm_head is not tied."""
    LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


# --- Memory, measured -----------------------------------------------------------------------------
# Real steps, by the trainer's functions. Linux says the largest resident memory since clear_refs was written to.
MEASURE = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from continued_pretraining.network import allocate, divide, empty_network, recompute
from continued_pretraining.optimizer import make_optimizer

model, replicate, shard, length, dtype, recomputed, micro, micro_batches = json.loads(sys.argv[1])

def status(name):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name))

if "RANK" in os.environ:
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
network = empty_network(model)
recompute(network, recomputed)
divide(network, init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard")), dtype, False)
small = torch.ones(64, 64, requires_grad=True)
(small @ small).sum().backward()  # libraries are loaded with the first use
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
allocate(network, "cpu")
for weight in network.parameters():
    torch.nn.init.constant_(weight.to_local(), 0.01)
optimizer = make_optimizer(network, 1e-5, (0.9, 0.95), 0.1)
tokens = torch.zeros((micro, length), dtype=torch.int64)
for step in range(2):
    for number in range(micro_batches)[-1 - step :]:  # one in the first step, for AdamW's states
        network.set_requires_all_reduce(number == micro_batches - 1)
        loss, _ = network.window_losses(tokens, tokens, 1e-4)
        loss.backward()
        del loss
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
if dist.get_rank() == 0:
    print(status("VmHWM") - before)
dist.barrier()
dist.destroy_process_group()
"""


def measure(script: Path, kind: Kind, micro: int, micro_batches: int) -> int:
    """Bytes by which the first process's resident memory grew in two steps, at most."""
    script.write_text(MEASURE)
    processes = kind.mesh[0] * kind.mesh[1]
    launcher = [sys.executable]
    if processes > 1:
        launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={processes}"]
    given = [str(kind.model), *kind.mesh, kind.sequence_length, kind.dtype, kind.activation_checkpointing]
    # glibc keeps freed memory of up to 32 MB, unless told to ask the system for each tensor and to give it back.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    environment = {**os.environ, **malloc, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [*launcher, script, json.dumps([*given, micro, micro_batches])]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


SHAPES = {  # width, layers, vocabulary; mesh, length, dtype, checkpointing; micro-batch, micro-batches in a step
    "wide, all computed again": ((768, 3, 12_000), ((1, 1), 512, "bfloat16", "full"), 2, 2),
    "many layers, one micro-batch": ((256, 10, 4_000), ((1, 1), 512, "float32", "selective"), 5, 1),
    "many words": ((256, 2, 32_000), ((1, 1), 512, "float32", "none"), 3, 2),
    "two processes": ((512, 4, 8_000), ((1, 2), 512, "float32", "none"), 2, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_that_of_real_steps(tmp_path, shape):
    sizes, flags, micro, micro_batches = SHAPES[shape]
    kind = Kind(make_config(tmp_path / "model", *sizes), *flags)
    with rehearse(kind) as process:
        estimate = sum(process.peak(micro, micro_batches > 1).values())
    measured = measure(tmp_path / "measure.py", kind, micro, micro_batches)
    print(f"{shape}: estimate {estimate / 1e6:,.0f} MB, measured {measured / 1e6:,.0f} MB")
    assert measured > 300e6  # beside which what libraries keep is little
    assert estimate == pytest.approx(measured, rel=0.15)


# --- Memory, rehearsed ----------------------------------------------------------------------------
def peak(model: Path, micro: int = 2, accumulating: bool = True, **changes) -> dict[str, int]:
    flags = {"mesh": (1, 1), "sequence_length": LENGTH, "dtype": "float32", "activation_checkpointing": "none"}
    with rehearse(Kind(model, **{**flags, **changes})) as process:
        return process.peak(micro, accumulating)


def test_states_are_divided_by_shard_and_not_by_replicate(tmp_path):
    model = make_config(tmp_path / "model", 128, 2, 1000)
    numbers = sum(weight.numel() for weight in LlamaForCausalLM(LlamaConfig.from_pretrained(model)).parameters())
    for mesh in ((1, 1), (1, 4), (4, 1), (2, 4)):
        found = peak(model, mesh=mesh)
        own = 4 * numbers / mesh[1]
        assert found.keys() == {*KINDS}
        assert found[GRADIENTS] == own
        assert found[WEIGHTS] == pytest.approx(own, rel=1e-3)  # and the positions' frequencies
        assert found[OPTIMIZER] == pytest.approx(2 * own, rel=1e-3)  # and a count of steps for each weight
    with rehearse(Kind(model, (1, 1), LENGTH, "float32", "none")) as process:
        assert process.parameters == numbers
    assert not torch.distributed.is_initialized() and torch.UntypedStorage.resize_.__name__ == "resize_"


def test_activations_are_fewer_if_more_is_computed_again_and_in_bfloat16(tmp_path):
    model = make_config(tmp_path / "model", 128, 3, 1000)
    found = {what: peak(model, activation_checkpointing=what) for what in ("none", "selective", "full")}
    none, selective, full = (sum(each.values()) for each in found.values())
    assert none > selective > full
    half = peak(model, dtype="bfloat16")
    assert half[WEIGHTS] == found["none"][WEIGHTS] and half["activations"] < 0.8 * found["none"]["activations"]


def test_gradients_that_wait_for_the_end_of_a_step_are_those_of_the_whole_copy(tmp_path):
    model = make_config(tmp_path / "model", 128, 2, 1000)
    often, once = (peak(model, mesh=(1, 4), reduce_gradients=how) for how in ("micro_batch", "step"))
    whole = 4 * often[GRADIENTS]  # which are of a quarter
    assert sum(once.values()) - sum(often.values()) > 0.5 * whole


def test_one_process_is_asked_again_and_says_the_same(tmp_path):
    """In any order: whether gradients wait is not left over from the question before."""
    model = make_config(tmp_path / "model", 128, 1, 1000)
    asked = [(1, True), (4, True), (4, False), (1, False), (4, True)]
    with rehearse(Kind(model, (1, 2), LENGTH, "float32", "none")) as process:
        told = [process.peak(*each) for each in asked]
    assert told[1] == told[4] and told == [peak(model, *each, mesh=(1, 2)) for each in asked]
    assert sum(told[0].values()) < sum(told[1].values()) and sum(told[2].values()) < sum(told[1].values())


# --- Sizes -------------------------------------------------------------------------
def test_the_largest_that_fits():
    for limit in range(14):
        fitting = [size for size in (1, 2, 3, 4, 6, 12) if size <= limit]
        found = memory.largest_fitting([1, 2, 3, 4, 6, 12], lambda size, limit=limit: size <= limit)
        assert found == max(fitting, default=0)


# --- The command ----------------------------------------------------------------------------------
def run_script(name: str, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, f"continued_pretraining/{name}", *map(str, words)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True)


def test_it_takes_train_pys_block_and_the_mixtures_budget(tmp_path):
    words = ("--config", SYSTEM.relative_to(REPO), "--model", "x", "--num_gpus", 16)
    told = run_script("plan.py", *words, "--shard", 4, "--print_config")
    assert told.returncode == 0, told.stderr
    given, block = yaml.safe_load(told.stdout), yaml.safe_load(SYSTEM.read_text())["continued_pretraining"]
    assert (given["tokens"], given["shard"], given["system"]) == (6_000_000_000, 4, "systems/towerspeech_6b.yaml")
    for name in ("sequence_length", "global_batch_size", "micro_batch_size", "activation_checkpointing"):
        assert given[name] == block[name]
    assert "learning_rate" in block and "learning_rate" not in given
    refused = run_script("plan.py", *words, "--shrad", 4)
    assert refused.returncode == 2 and "unrecognized arguments: --shrad" in refused.stderr
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"continued_pretraining": {"shard": 2}, "plan": {"num_gpus": 4, "tokens": 5}}))
    given = yaml.safe_load(run_script("plan.py", "--config", mine, "--model", "x", "--print_config").stdout)
    assert (given["shard"], given["num_gpus"], given["tokens"]) == (2, 4, 5)
    mine.write_text("num_gpus: 4\nshrad: 2\n")  # flags alone, all of them its own
    assert "Option 'shrad' is not accepted" in run_script("plan.py", "--config", mine, "--model", "x").stderr
    mine.write_text(yaml.safe_dump({"continued_pretraining": {}, "build_mixture": {"sources": [{"nme": "a"}]}}))
    refused = run_script("plan.py", "--config", mine, "--model", "x", "--num_gpus", 4)
    assert refused.returncode == 1 and "build_mixture says no budgets" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_flags_and_defaults_are_train_pys():
    ours, theirs = ({field.name: field for field in fields(each.Settings)} for each in (plan, train))
    shared = ours.keys() & theirs.keys()
    decided = {"model", "replicate", "micro_batch_size", "peak_tflops"}  # what is not said, the plan decides
    assert shared >= {"sequence_length", "global_batch_size", "shard", "dtype", "activation_checkpointing"}
    for name in shared - decided:
        assert (ours[name].default, ours[name].type) == (theirs[name].default, theirs[name].type), name


@pytest.fixture
def settings(tmp_path) -> dict:
    """A run of 16 windows a step on two GPUs, of which each has an eighth of a GiB."""
    model = make_config(tmp_path / "model", 256, 2, 2000)
    sizes = {"sequence_length": 512, "global_batch_size": 16, "tokens": 16 * 512 * 100 + 1}
    return {"model": model, "num_gpus": 2, "gpu_memory": 0.125, **sizes}


def test_the_plan(settings, capsys):
    plan.plan(plan.Settings(**settings))
    told = capsys.readouterr().out
    assert "2 GPUs (h100), replicate 1 x shard 2, bfloat16, activation checkpointing: none" in told
    assert "Steps: 101 of 16 x 512 tokens, for 819,201 tokens" in told
    rows = dict(line.strip().rsplit(maxsplit=1) for line in told.split("GiB\n")[1].split("Largest")[0].splitlines())
    *parts, total, usable = map(float, rows.values())
    assert sum(parts) == pytest.approx(total, abs=0.005 * len(parts)) and total < usable == 0.12  # 92% of it
    [micro] = [int(line.split()[-2]) for line in told.splitlines() if line.startswith("Largest micro-batch")]
    assert micro in (1, 2, 4) and f"micro-batch of {micro} x 512 tokens" in told
    larger = peak(settings["model"], 2 * micro, 2 * micro < 8, mesh=(1, 2), sequence_length=512, dtype="bfloat16")
    assert sum(larger.values()) > 0.92 * settings["gpu_memory"] * plan.GIB
    command = told.split("\n\n")[-1].replace("\\\n", " ")
    assert command.startswith("torchrun --nproc_per_node 2 continued_pretraining/train.py")
    taken = run_script("train.py", *shlex.split(command)[4:], "--print_config")  # by its own parser
    assert taken.returncode == 0, taken.stderr
    given = yaml.safe_load(taken.stdout)
    assert (given["micro_batch_size"], given["replicate"], given["shard"]) == (micro, 1, 2)
    sixteen = {**settings, "num_gpus": 16, "shard": 8, "system": "systems/tiny.yaml"}  # a step of one micro-batch
    plan.plan(plan.Settings(**sixteen))
    told = capsys.readouterr().out
    assert "replicate 2 x shard 8" in told and "a GPU's 1 windows of a step: 1 windows" in told
    assert "torchrun --nproc_per_node 8 --nnodes 2 " in told and " --config systems/tiny.yaml --model " in told


def test_what_does_not_fit_says_how_much_and_what_to_do(settings, capsys):
    wanted = {**settings, "gpu_memory": 0.05, "micro_batch_size": 4}
    with pytest.raises(UserError) as refused:
        plan.plan(plan.Settings(**wanted, replicate=2, dtype="float32"))
    problem, remedy = str(refused.value).split("\n")
    assert problem.startswith("a micro-batch of 4 needs 0.") and "a GPU has 0.05 GiB for it" in problem
    for way in ("--micro_batch_size 1", "--activation_checkpointing full", "--dtype bfloat16", "--shard (up to 2)"):
        assert way in remedy
    told = capsys.readouterr().out
    assert "windows of a step: none" in told and "torchrun" not in told
    with pytest.raises(UserError, match="a micro-batch of 1 needs.*\n  -> more GPUs to shard over, or larger ones"):
        plan.plan(plan.Settings(**{**settings, "gpu_memory": 0.01}, activation_checkpointing="full"))


def test_what_train_py_would_refuse(settings, monkeypatch):
    def refused(message: str, **changes) -> None:
        with pytest.raises(UserError, match=message):
            plan.plan(plan.Settings(**{**settings, **changes}))

    monkeypatch.setattr(memory, "rehearse", lambda *given: pytest.fail("it was rehearsed"))
    refused("config.json does not exist", model=settings["model"] / "nothing")
    refused("--sequence_length 2048 exceeds the model's context of 1024", sequence_length=2048)
    refused("it is not said how many tokens", tokens=None)
    refused("replicate 2 x shard 2 is not 2 processes", replicate=2, shard=2)
    refused("replicate 1 x shard 3 is not 2 processes", shard=3)
    refused("--global_batch_size 16 is no multiple of 3 processes x 1", num_gpus=3)
    refused("--global_batch_size 16 is no multiple of 2 processes x 3", micro_batch_size=3)
