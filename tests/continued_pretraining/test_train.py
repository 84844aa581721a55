"""train.py and export_checkpoint.py against a plain PyTorch loop over the same windows; SIGKILL, meshes, bad input."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from continued_pretraining import checkpoints, network
from continued_pretraining import train as script
from continued_pretraining.export_checkpoint import export_checkpoint
from continued_pretraining.flops import flops_a_token
from continued_pretraining.optimizer import learning_rate_at
from continued_pretraining.packing import IGNORE, Mixture
from data_mixture.build_mixture import Source, build_mixture
from towerspeech import command as command_line
from towerspeech.errors import UserError
from towerspeech.indexed import IndexedTokens

LENGTH, BATCH, STEPS = 64, 4, 12
SETTINGS = dict(
    sequence_length=LENGTH, global_batch_size=BATCH, learning_rate=1e-3, warmup_share=0.25, save_every=5, log_every=1
)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, model_dir, make_units) -> Path:
    folder = tmp_path_factory.mktemp("cpt")
    path = folder / "mono.jsonl"
    path.write_text("".join(json.dumps({"text": f"the old captain sees {i} boats"}) + "\n" for i in range(1000)))
    units = make_units(folder / "units", 600)
    # 12 steps of 4 windows of 64 tokens, the last of them not full; of all documents a hundredth is held out
    sources = [Source("speech", "speech", [str(units)], 2000), Source("mono", "text", [str(path)], 1000)]
    build_mixture(model_dir, folder / "mixture", sources, reserve=100)
    return folder / "mixture"


def command(model_dir, mixture, output_dir, processes: int = 1, **changes) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    settings = {**SETTINGS, "dtype": "float32", "device": "cpu", **changes}
    settings |= {"model": model_dir, "mixture": mixture, "output_dir": output_dir}
    return [
        *launcher,
        script.__file__,
        *(word for name, value in settings.items() for word in (f"--{name}", str(value))),
    ]


def train(*args, **changes) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOWERSPEECH_LOCK_WAIT_S": "5"}
    return subprocess.run(command(*args, **changes), capture_output=True, text=True, env=environment)


def log(run: Path) -> list[dict]:
    """The lines of train.log, without what a clock says; the first one is of no step."""
    rows = [json.loads(line) for line in (run / "train.log").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    measured = ("tokens_per_s", "mfu", "memory_gb", "seconds")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in log(run)[1:]]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, model_dir, mixture) -> Path:
    """An uninterrupted run of two processes."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    result = train(model_dir, mixture, output_dir, processes=2, replicate=2, keep_steps="[6, 9]")
    assert result.returncode == 0, result.stderr
    return output_dir


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model_dir, whole_run) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_checkpoint(whole_run / f"checkpoint-{STEPS}", model_dir, folder, dtype="float32")
    return folder


def schedule() -> list[float]:
    """The learning rates of STEPS steps, by torch: three of warm-up, then a cosine from the peak to a tenth of it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 1 - 3, eta_min=1e-4)
    rates = [1e-3 / 3, 2e-3 / 3, 1e-3]
    while len(rates) < STEPS:
        rates.append(falling.get_last_lr()[0])
        optimizer.step()
        falling.step()
    return rates


def reference_loop(model_dir, mixture) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
    """The same training as a plain loop: transformers' model, torch's AdamW, whole batches; log and weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    data, known = Mixture(mixture, LENGTH), {"loss": [], "gradient_norm": [], "learning_rate": schedule()}
    for step in range(STEPS):
        inputs, targets = map(torch.from_numpy, data.batch(range(step * BATCH, (step + 1) * BATCH)))
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        known["gradient_norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = known["learning_rate"][step]
        optimizer.step()
        optimizer.zero_grad()
        known["loss"].append(loss.item())
    return known, model.state_dict()


def test_equals_a_plain_loop(model_dir, mixture, whole_run, exported):
    known, weights = reference_loop(model_dir, mixture)
    rows = log(whole_run)[1:]
    for name, values in known.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=1e-5), name
    ours = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).state_dict()
    assert ours.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=2e-3)


@pytest.fixture(scope="module")
def held_out(mixture) -> dict[str, list[int]]:
    """The tokens of each source's held-out documents, in the order in which they are packed."""
    manifest = json.loads((mixture / "manifest.json").read_text())
    found = {}
    for number, source in enumerate(manifest["sources"]):
        tokens = IndexedTokens(mixture / "validation" / source["name"])
        order = np.random.default_rng([manifest["seed"], number, 0]).permutation(len(tokens.sizes))
        documents = np.split(tokens.tokens.astype(np.int64), tokens.offsets[1:])
        found[source["name"]] = [token for document in order for token in documents[document].tolist()]
    assert all(len(tokens) > LENGTH + 1 for tokens in found.values())
    return found


def loss_of(model, tokens: list[int]) -> float:
    """transformers' own loss of each window, weighed by its targets."""
    total = 0.0
    for start in range(0, len(tokens) - 1, LENGTH):
        ids = torch.tensor([tokens[start : start + LENGTH + 1]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    return total / (len(tokens) - 1)


def test_losses_by_source_are_transformers_own(model_dir, mixture, whole_run, exported, held_out):
    """Of held-out documents before the first step and after the last; of training in the first step."""
    rows = log(whole_run)
    for row, folder in ((rows[0], model_dir), (rows[-1], exported)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = {name: loss_of(model, tokens) for name, tokens in held_out.items()}
        assert row["validation"] == pytest.approx(expected, rel=1e-5)
        assert row["perplexity"] == pytest.approx({name: math.exp(loss) for name, loss in expected.items()}, rel=1e-4)
    assert [row["step"] for row in rows if "validation" in row] == [0, 6, 9, 12]
    model, data = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), Mixture(mixture, LENGTH)
    sums, counts = {}, {}
    for number in range(BATCH):
        inputs, targets = (torch.from_numpy(part)[None] for part in data.window(number))
        name = ("speech", "mono")[data.owner[number]]
        loss = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits[0], targets[0], reduction="sum")
        sums[name] = sums.get(name, 0) + loss.item()
        counts[name] = counts.get(name, 0) + int((targets != IGNORE).sum())
    assert rows[1]["losses"] == pytest.approx({name: sums[name] / counts[name] for name in sums}, rel=1e-5)
    assert (whole_run / "losses.png").read_bytes().startswith(b"\x89PNG")
    last = json.loads((whole_run / f"checkpoint-{STEPS}/run_info.json").read_text())
    assert {key: last[key] for key in rows[-1] if key in last} == {
        key: value for key, value in rows[-1].items() if key != "gradient_norm"
    }


def test_the_log_by_source_adds_up(mixture, whole_run):
    """Each line's losses, weighed by the tokens that were seen since the last line, are its loss."""
    data, seen = Mixture(mixture, LENGTH), {"speech": 0, "mono": 0}
    for row in log(whole_run)[1:]:
        before, seen = seen, data.tokens_seen(row["step"] * BATCH)
        new = {name: seen[name] - before[name] for name in seen if seen[name] > before[name]}
        assert row["losses"].keys() == new.keys()
        assert row["loss"] * sum(new.values()) == pytest.approx(sum(row["losses"][name] * new[name] for name in new))


def test_checkpoints_and_counts(whole_run, mixture):
    assert sorted(p.name for p in whole_run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-6", "checkpoint-9"]
    info = json.loads((whole_run / "run_info.json").read_text())
    assert info["counts"] == {"steps": STEPS, "tokens": {"speech": 2000, "mono": 1000}}
    middle = json.loads((whole_run / "checkpoint-6/run_info.json").read_text())
    assert middle["step"] == 6 and sum(middle["tokens"].values()) == 6 * LENGTH * BATCH
    last = json.loads((whole_run / "checkpoint-12/run_info.json").read_text())
    assert last["tokens"] == {"speech": 2000, "mono": 1000}


def rates(steps: int, warmup_steps: int, decay: str, decay_steps: int, final: float) -> list[float]:
    shape = {"warmup_steps": warmup_steps, "decay": decay, "decay_steps": decay_steps, "final_share": final}
    return [learning_rate_at(step, steps, 1.0, **shape) for step in range(steps)]


def test_learning_rate_schedule():
    cosine = rates(100, 10, "cosine", 100, 0.1)
    assert cosine[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert cosine[10] == 1.0 and cosine[99] == pytest.approx(0.1)
    assert cosine[9:] == sorted(cosine[9:], reverse=True)
    assert [1e-3 * rate for rate in rates(STEPS, 3, "cosine", STEPS, 0.1)] == pytest.approx(schedule())
    assert rates(1, 0, "cosine", 1, 0.1) == [1.0]  # one step alone is taken at the peak
    linear = rates(100, 10, "linear", 100, 0.1)
    assert linear[:10] == cosine[:10] and linear[10:] == pytest.approx(np.linspace(1, 0.1, 90).tolist())
    late = rates(100, 10, "linear", 20, 0)
    assert late[:10] == cosine[:10] and late[10:80] == [1.0] * 70
    assert late[80:] == pytest.approx(np.linspace(1, 0, 20).tolist())
    assert rates(100, 10, "cosine", 20, 0.1)[80:] == pytest.approx(rates(20, 0, "cosine", 20, 0.1))
    assert rates(100, 10, "cosine", 0, 0.1)[10:] == [1.0] * 90


def test_a_late_line_is_logged(tmp_path, model_dir, mixture):
    train_here(model_dir, mixture, tmp_path / "run", decay="linear", decay_share=0.25, keep_steps=None)
    expected = [1 / 3, 2 / 3, *[1] * 7, 1, 0.55, 0.1]
    assert [row["learning_rate"] for row in log(tmp_path / "run")[1:]] == pytest.approx([1e-3 * x for x in expected])


def test_the_share_of_the_peak_is_logged(tmp_path, model_dir, mixture, alone):
    """If the peak is given, as that of CPUs has to be."""
    assert not any("mfu" in line for line in (alone / "train.log").read_text().splitlines())
    train_here(model_dir, mixture, tmp_path / "run", peak_tflops=0.25, keep_steps=None)
    flops = flops_a_token(AutoModelForCausalLM.from_pretrained(model_dir), LENGTH)
    rows = [json.loads(line) for line in (tmp_path / "run/train.log").read_text().splitlines()][1:]
    shares = [row["tokens_per_s"] * flops / 0.25e12 for row in rows]
    assert [row["mfu"] for row in rows] == pytest.approx(shares, abs=1e-4) and max(shares) > 1e-3
    assert all(0.1 < row["memory_gb"] < 10 for row in rows)


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: steps and values of each curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def board_of_the_log(run: Path) -> dict[str, list[tuple[int, float]]]:
    known: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "train.log").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                known.setdefault(f"{name}/{part}".rstrip("/"), []).append((row["step"], pytest.approx(number)))
    del known["step"]
    return known


def test_export_keeps_the_tokenizer_and_refuses_another_model(
    tmp_path, model_dir, base_model_dir, whole_run, exported
):
    for name in ("tokenizer.json", "tokenizer.model", "speech_units.json"):
        assert (exported / name).read_bytes() == (model_dir / name).read_bytes()
    with pytest.raises(UserError, match="was not trained from"):
        export_checkpoint(whole_run / "checkpoint-6", base_model_dir, tmp_path / "other")
    with pytest.raises(UserError, match="run_info.json does not exist"):
        export_checkpoint(whole_run / "checkpoint-7", model_dir, tmp_path / "other")
    shutil.copytree(whole_run / "checkpoint-6", tmp_path / "copy")
    info = json.loads((tmp_path / "copy/run_info.json").read_text())
    (tmp_path / "copy/run_info.json").write_text(json.dumps({k: v for k, v in info.items() if k != "tokens"}))
    with pytest.raises(UserError, match="'tokens' is missing"):
        export_checkpoint(tmp_path / "copy", model_dir, tmp_path / "other")


def same_weights(a: Path, b: Path, model_dir: Path, folder: Path) -> bool:
    paths = []
    for number, run in enumerate((a, b)):
        export_checkpoint(run / f"checkpoint-{STEPS}", model_dir, folder / str(number), dtype="float32")
        paths.append(folder / str(number) / "model.safetensors")
    return paths[0].read_bytes() == paths[1].read_bytes()


# --- In this process ------------------------------------------------------------------------------
KEPT = {"keep_steps": [6, 9], "micro_batch_size": 2}


def train_here(model_dir, mixture, output_dir, **changes) -> None:
    """train.py as a function, in one process: quick enough for states that only some moments leave."""
    settings = {**SETTINGS, **KEPT, "dtype": "float32", "device": "cpu", **changes}
    try:
        script.train(script.Settings(model_dir, mixture, output_dir, **settings))
    except BaseException:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        raise


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model_dir, mixture) -> Path:
    """An uninterrupted run of one process, in micro-batches of two."""
    output_dir = tmp_path_factory.mktemp("alone") / "run"
    train_here(model_dir, mixture, output_dir)
    return output_dir


def test_micro_batches_of_two_equal_a_plain_loop(tmp_path, model_dir, mixture, alone):
    known, weights = reference_loop(model_dir, mixture)
    assert losses(alone) == pytest.approx(known["loss"], rel=1e-5)
    export_checkpoint(alone / f"checkpoint-{STEPS}", model_dir, tmp_path / "model", dtype="float32")
    for name, weight in load_file(tmp_path / "model/model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("what", ["full", "selective"])
def test_activations_computed_again_change_nothing(tmp_path, model_dir, mixture, alone, what):
    train_here(model_dir, mixture, tmp_path / "run", activation_checkpointing=what)
    assert log(tmp_path / "run") == log(alone)


def test_gradients_are_reduced_once_a_step_if_asked(tmp_path, model_dir, mixture, alone, monkeypatch):
    """A step has two micro-batches here."""
    asked, original = [], FSDPModule.set_requires_gradient_sync

    def note(network, wanted):
        asked.append(wanted)
        original(network, wanted)

    monkeypatch.setattr(FSDPModule, "set_requires_gradient_sync", note)
    train_here(model_dir, mixture, tmp_path / "run", reduce_gradients="step")
    assert asked == [False, True] * STEPS
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


def test_asked_to_stop_after_a_checkpoint_it_goes_on_with_the_same_bytes(
    tmp_path, model_dir, mixture, alone, monkeypatch, capsys
):
    """Asked in its fifth step, and again when it goes on; beside the checkpoints lies what is not its own."""
    run, save = tmp_path / "run", script.save

    def save_and_ask(target, *others):
        save(target, *others)
        if target.name in ("checkpoint-5", "checkpoint-9"):
            (run / ".stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(script, "save", save_and_ask)
        with pytest.raises(UserError, match=f"asked to stop: saved {run}/checkpoint-6 of 12 steps"):
            train_here(model_dir, mixture, run)
        assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-6"]
        assert not (run / ".stop").exists() and not (run / "run_info.json").exists()
        shutil.copytree(run / "checkpoint-6", run / "checkpoint-99-backup")
        (run / "checkpoint-old-7").mkdir()
        (run / "checkpoint-²").mkdir()
        (run / "checkpoint-7").write_text("mine")  # not a step that is saved
        (run / "checkpoint-77").mkdir()
        for step in (9, 10):
            (run / f"checkpoint-{step}").mkdir()
            with pytest.raises(UserError, match=f"{run}/checkpoint-{step} is no checkpoint.*\n.*move it away"):
                train_here(model_dir, mixture, run)
            (run / f"checkpoint-{step}").rmdir()  # it is empty, as it was
        # Going on, the weights of the model that it began with are not read.
        patch.setattr(network, "fill", lambda *arguments: pytest.fail("the first weights were read again"))
        with pytest.raises(UserError, match="saved .*/checkpoint-10 of 12 steps"):
            train_here(model_dir, mixture, run)
    capsys.readouterr()
    train_here(model_dir, mixture, run)
    assert "going on after step 10 from" in capsys.readouterr().out
    ours = {"checkpoint-6", "checkpoint-9", "checkpoint-12"}
    others = {"checkpoint-99-backup", "checkpoint-old-7", "checkpoint-²", "checkpoint-7", "checkpoint-77"}
    assert {path.name for path in run.glob("checkpoint-*")} == ours | others
    assert (run / "checkpoint-7").read_text() == "mine"
    assert (run / "checkpoint-99-backup/run_info.json").is_file()
    assert log(run) == log(alone)
    assert same_weights(run, alone, model_dir, tmp_path)


def test_killed_inside_a_checkpoint_it_goes_on_from_the_one_before(
    tmp_path, model_dir, mixture, alone, monkeypatch, capsys
):
    """Files of a checkpoint are there, its run_info.json is not; train.log is ahead of it, its last line cut off."""
    run, write_json = tmp_path / "run", checkpoints.write_json

    def die(target, info):
        if info["step"] == 10:
            with open(run / "train.log", "a") as file:
                file.write('{"step": 11, "lo')
            raise KeyboardInterrupt
        write_json(target, info)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            train_here(model_dir, mixture, run)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    train_here(model_dir, mixture, run)
    assert f"going on after step 9 from {run}/checkpoint-9\n" in capsys.readouterr().out
    assert log(run) == log(alone)
    shown = board(run)
    assert shown == board_of_the_log(run)
    assert {
        "loss",
        "losses/speech",
        "validation/mono",
        "perplexity/mono",
        "learning_rate",
        "memory_gb",
    } <= shown.keys()
    assert same_weights(run, alone, model_dir, tmp_path)
    for path in run.glob("events.*"):  # logs, as train.log: the run is as finished without them
        path.unlink()
    train_here(model_dir, mixture, run)
    assert "already done" in capsys.readouterr().out


def test_killed_in_its_first_step_it_begins_anew(tmp_path, model_dir, mixture, alone, monkeypatch):
    """Also with another learning rate than before; the line before the first step is there once."""
    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "train_step", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_here(model_dir, mixture, tmp_path / "run", learning_rate=1.0)
    assert [json.loads(line)["step"] for line in (tmp_path / "run/train.log").read_text().splitlines()] == [0]
    train_here(model_dir, mixture, tmp_path / "run")
    assert log(tmp_path / "run") == log(alone)


def test_validations_between_are_asked_for(tmp_path, model_dir, mixture, alone):
    """They change nothing else; lines come for them though none would be due."""
    train_here(model_dir, mixture, tmp_path / "run", validate_every=4, log_every=100, keep_steps=None, save_every=100)
    rows = [json.loads(line) for line in (tmp_path / "run/train.log").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 8, 12] and all("validation" in row for row in rows)
    known = {row["step"]: row["validation"] for row in log(alone) if "validation" in row}
    assert rows[0]["validation"] == known[0] and rows[-1]["validation"] == known[12]
    assert rows[1]["loss"] == pytest.approx(np.mean(losses(alone)[:4]), rel=1e-5)


@pytest.fixture(scope="module")
def bare(tmp_path_factory, mixture) -> Path:
    """The same mixture without documents held out."""
    folder = Path(shutil.copytree(mixture, tmp_path_factory.mktemp("bare") / "mixture"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for source in manifest["sources"]:
        source["validation"] = {"documents": 0, "tokens": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "validation")
    return folder


def test_without_held_out_documents(tmp_path, model_dir, bare, alone):
    with pytest.raises(UserError, match="holds no documents out\n.*--validation_tokens above 0"):
        train_here(model_dir, bare, tmp_path / "run", validate_every=4)
    assert not (tmp_path / "run").exists()
    train_here(model_dir, bare, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/train.log").read_text().splitlines()]
    assert not any("validation" in row for row in rows) and [row["loss"] for row in rows] == losses(alone)
    assert (tmp_path / "run/losses.png").is_file()


def test_the_source_whose_loss_is_not_finite_is_named(tmp_path, model_dir, mixture, bare):
    """One unit's embedding is no number: of all that comes first the speech is spoiled, then the weights."""
    config = json.loads((model_dir / "config.json").read_text()) | {"tie_word_embeddings": False}
    broken = Path(shutil.copytree(model_dir, tmp_path / "broken"))
    (broken / "config.json").write_text(json.dumps(config))
    weights = load_file(model_dir / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    unit = Mixture(mixture, LENGTH).streams[0].data.tokens[8]
    weights["model.embed_tokens.weight"][int(unit)] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    rarely = {"log_every": 100, "save_every": 100, "keep_steps": None}
    with pytest.raises(UserError, match=r"at step 12 the loss is nan \(first of speech\)"):
        train_here(broken, bare, tmp_path / "run", **rarely)
    with pytest.raises(UserError, match="at step 0 the loss of the held-out documents of speech is not finite"):
        train_here(broken, mixture, tmp_path / "other", **rarely)


def test_a_loss_that_is_not_finite_reaches_no_checkpoint(tmp_path, model_dir, mixture):
    with pytest.raises(UserError, match=r"at step \d+ the loss is .*\n.*lower --learning_rate"):
        train_here(model_dir, mixture, tmp_path / "run", learning_rate=1e30, save_every=100, keep_steps=None)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


COUNTS = ("sequence_length", "global_batch_size", "micro_batch_size", "save_every", "log_every", "replicate", "shard")
SHARES = ("final_learning_rate_share", "warmup_share", "decay_share")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *((name, value, "v>0") for name in COUNTS for value in ("0", "-1")),
        *(
            (name, value, "v>0 and v<inf")
            for name in ("learning_rate", "clip_norm", "peak_tflops")
            for value in ("0", "-1", "nan", "inf")
        ),
        *((name, value, "v>=0 and v<=1") for name in SHARES for value in ("-0.1", "1.1", "nan", "inf")),
        *((name, value, "v>=0 and v<1") for name in ("beta1", "beta2") for value in ("-0.1", "1", "nan", "inf")),
        *(("weight_decay", value, "v>=0 and v<inf") for value in ("-0.1", "nan", "inf")),
    ],
)
def test_numbers_are_refused_by_the_command_line(name, value, wanted, tmp_path, monkeypatch, capsys):
    words = {"model": tmp_path, "mixture": tmp_path, "output_dir": tmp_path / "run", name: value}
    monkeypatch.setattr(sys, "argv", ["train.py", *(f"--{flag}={word}" for flag, word in words.items())])
    with pytest.raises(SystemExit) as end:
        command_line.run(script.train, script.Settings)
    told = capsys.readouterr().err
    assert end.value.code == 2 and f'"{name}"' in told and ("conform to restriction " + wanted) in told, told
    assert not (tmp_path / "run").exists()


def test_cuda_that_is_not_there_is_refused(tmp_path, model_dir, mixture):
    if torch.cuda.is_available():
        pytest.skip("with a GPU, cuda is welcome")
    with pytest.raises(UserError, match="no CUDA GPU"):
        train_here(model_dir, mixture, tmp_path / "run", device="cuda")


# --- Processes ------------------------------------------------------------------------------------
def killed(words: list[str], delay: float | None) -> bool:
    """Start torchrun; SIGKILL to it and its processes so long after they have joined, if they have not ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if not any("processes: replicate" in line for line in process.stdout):  # it was done, or it failed
        assert process.wait() == 0
        return False
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        for worker in psutil.Process(process.pid).children(recursive=True):  # torchrun's are in sessions of their own
            worker.kill()
        process.kill()
        process.wait()
        return True
    assert process.returncode == 0
    return False


@pytest.mark.slow
def test_killed_at_random_it_gives_the_same_bytes(tmp_path, model_dir, mixture, whole_run):
    """Two SIGKILLs (TOWERSPEECH_KILLS says otherwise) while two processes load, train, validate and save each step."""
    generator, kills = random.Random(0), 0
    wanted = int(os.environ.get("TOWERSPEECH_KILLS", "2"))
    settings = {"processes": 2, "replicate": 2, "keep_steps": "[6, 9]", "save_every": 1}
    for number in range(5 * wanted):
        run = tmp_path / str(number)
        while not (run / "run_info.json").exists():
            delay = generator.uniform(0, 4) if kills < wanted else None
            kills += killed(command(model_dir, mixture, run, **settings), delay)
        assert not list(run.glob(".tmp-*"))
        assert log(run) == log(whole_run)
        (tmp_path / "models").mkdir()
        assert same_weights(run, whole_run, model_dir, tmp_path / "models")
        shutil.rmtree(tmp_path / "models")
        if kills == wanted:
            again = train(model_dir, mixture, run, **settings)
            assert again.returncode == 0 and "already done" in again.stdout
            return
    raise AssertionError(f"only {kills} of {wanted} kills came in time")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "ways"),
    [
        ("replicate", {"activation_checkpointing": "selective", "compile": "true"}),
        ("shard", {"activation_checkpointing": "full", "compile": "true"}),
        ("shard", {"reduce_gradients": "step"}),
    ],
)
def test_two_processes_equal_a_plain_loop_in_every_way(tmp_path, model_dir, mixture, mesh, ways):
    result = train(model_dir, mixture, tmp_path / "run", processes=2, **{mesh: 2}, **ways)
    assert result.returncode == 0, result.stderr
    known, _ = reference_loop(model_dir, mixture)
    rows = log(tmp_path / "run")[1:]
    for name, values in known.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=1e-4), name


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path, model_dir, mixture, whole_run):
    """Two processes, asked while they start: one step, a checkpoint, a status that is not 0; then the same bytes."""
    settings = {"processes": 2, "replicate": 2, "keep_steps": "[6, 9]"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.stop").touch()
    result = train(model_dir, mixture, tmp_path / "run", **settings)
    assert result.returncode and f"asked to stop: saved {tmp_path}/run/checkpoint-1 of 12 steps" in result.stderr
    assert not (tmp_path / "run/run_info.json").exists() and not (tmp_path / "run/.stop").exists()
    result = train(model_dir, mixture, tmp_path / "run", **settings)
    assert result.returncode == 0 and "going on after step 1 " in result.stdout, result.stderr
    assert log(tmp_path / "run") == log(whole_run)
    assert same_weights(tmp_path / "run", whole_run, model_dir, tmp_path)


@pytest.mark.slow
def test_other_meshes_go_on_with_a_checkpoint(tmp_path, model_dir, mixture, whole_run, exported):
    """Sharded over two processes up to step 9, then on one, or on 2 x 2: the losses and weights of replicate 2."""
    result = train(model_dir, mixture, tmp_path / "run", processes=2, shard=2, keep_steps="[6, 9]")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(whole_run), rel=2e-5)
    shutil.rmtree(tmp_path / "run/checkpoint-12")
    (tmp_path / "run/run_info.json").rename(tmp_path / "run/.unfinished.json")
    for processes, mesh in ((1, {}), (4, {"replicate": 2, "shard": 2})):
        run = Path(shutil.copytree(tmp_path / "run", tmp_path / str(processes)))
        result = train(model_dir, mixture, run, processes=processes, keep_steps="[6, 9]", **mesh)
        assert result.returncode == 0 and "going on after step 9" in result.stdout, result.stderr
        assert losses(run) == pytest.approx(losses(whole_run), rel=2e-5)
        export_checkpoint(run / "checkpoint-12", model_dir, run / "model", dtype="float32")
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (run / "model", exported))
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=2e-3)


def test_bad_input_stops_before_a_model_is_loaded(tmp_path, model_dir, base_model_dir, mixture, monkeypatch):
    def refused(message: str, model: Path = model_dir, mixture: Path = mixture, **changes) -> None:
        with pytest.raises(UserError, match=message):
            train_here(model, mixture, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()

    monkeypatch.setattr(network, "allocate", lambda *arguments: pytest.fail("memory was taken"))
    refused("--sequence_length 4096 exceeds the model's context of 512", sequence_length=4096)
    refused(r"--keep_steps \[13\] lies outside the run's 1..12 steps", keep_steps=[13])
    refused(r"--keep_steps \[0\] lies outside the run's 1..12 steps", keep_steps=[0])
    refused("replicate 2 x shard 1 is not 1 processes", replicate=2)
    refused("replicate 1 x shard 2 is not 1 processes", shard=2)
    refused("--global_batch_size 3 is no multiple of 1 processes x 2", global_batch_size=3)
    refused("was tokenized with another tokenizer", model=base_model_dir)
    narrow = tmp_path / "narrow"
    shutil.copytree(model_dir, narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    refused("narrow: its tokenizer has 487 tokens, its model only 400 embedding rows", model=narrow)
    (narrow / "model.safetensors").unlink()
    refused("holds no safetensors weights", model=narrow)
    deeper = Path(shutil.copytree(model_dir, tmp_path / "deeper"))
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
    with pytest.raises(UserError, match="deeper: weights model.layers.* are missing"):
        train_here(deeper, mixture, tmp_path / "deep")
    result = train(model_dir, tmp_path / "nothing", tmp_path / "run")
    assert result.returncode == 1 and f"{tmp_path}/nothing/manifest.json does not exist" in result.stderr
    assert "make the mixture with data_mixture/build_mixture.py" in result.stderr
    assert "Traceback" not in result.stderr
