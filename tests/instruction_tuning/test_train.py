"""train.py: ids, label masks token by token, the finished folder, kill and resume, refusals."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instruction_tuning import train as script
from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.records import read_jsonl, write_jsonl
from towerspeech.stage import UserError

ROOT = Path(__file__).resolve().parents[2]
QUICK = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
}


def write_data(path: Path, count: int = 24) -> Path:
    """ASR and MT examples of different lengths, and one of two turns with a system prompt."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        answer = " ".join(rng.choices(["the red boat", "sieben Bücher", "today", "Ü ñ 한"], k=rng.randint(1, 4)))
        prompt = prompts.mt_0_shot("en", "de", f"my sister finds window {i}")
        if i % 2:
            prompt = prompts.asr(dsu.to_text(rng.choices(range(50), k=rng.randint(5, 40))))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        if i == 4:
            messages = [{"role": "system", "content": "be brief"}, *messages, *messages]
        rows.append({"id": f"row{i}", "task": "any", "messages": messages})
    write_jsonl(path, rows)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("sft") / "sft.jsonl")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, model_dir, data):
    return script.prepare(model_dir, data, tmp_path_factory.mktemp("prepared") / "out", QUICK, show=False)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, model_dir, data) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "out"
    script.train(model_dir, data, folder, {**QUICK, "num_train_epochs": 2})
    return folder


# --- Ids and labels -------------------------------------------------------------------------------
def test_labels_token_by_token_in_the_collated_batches(prepared, model_dir, data):
    from transformers import AutoModelForCausalLM

    tokenizer = prepared.tokenizer
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    trainer = script.make_trainer(model, prepared)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = read_jsonl(data)
    waiting = {tokenizer.apply_chat_template(row["messages"], tokenize=False): row for row in rows}
    assert len(waiting) == len(rows)
    padded = 0
    for batch in trainer.get_train_dataloader():
        for ids, labels, mask in zip(
            batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True
        ):
            padded += mask.count(0)
            assert {i for i, m in zip(ids, mask, strict=True) if not m} <= {tokenizer.pad_token_id}
            assert all(label in (i, -100) for i, label in zip(ids, labels, strict=True))
            assert all(label == -100 for label, m in zip(labels, mask, strict=True) if not m)
            ids, labels = ids[: sum(mask)], labels[: sum(mask)]
            row = waiting.pop(tokenizer.decode(ids))
            runs, run = [], []  # the labelled stretches
            for label in [*labels, -100]:
                if label != -100:
                    run.append(label)
                elif run:
                    runs.append(run)
                    run = []
            answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
            assert [tokenizer.decode(run) for run in runs] == [answer + "<|im_end|>" for answer in answers]
            assert all(run.count(tokenizer.eos_token_id) == 1 for run in runs)
    assert not waiting and padded


def test_labels_equal_trl_s_own(prepared, data):
    """TRL derives its mask from the template's {% generation %} by character offsets."""
    tokenizer = prepared.tokenizer
    rows = [row["messages"] for row in read_jsonl(data)]
    ids, labels = script.encode(tokenizer, rows)
    found = tokenizer.apply_chat_template(rows, return_dict=True, return_assistant_tokens_mask=True)
    assert found["input_ids"] == ids
    wanted = [
        [i if m else -100 for i, m in zip(*pair, strict=True)]
        for pair in zip(ids, found["assistant_masks"], strict=True)
    ]
    assert labels == wanted


def test_prompt_is_the_beginning_and_bos_is_not_doubled(prepared, data, tuned):
    from transformers import AutoTokenizer

    generating = AutoTokenizer.from_pretrained(tuned)
    for row, ids in zip(read_jsonl(data), prepared.dataset["input_ids"], strict=True):
        prompt = generating.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids[: len(prompt)] == prompt
        assert ids[0] == generating.convert_tokens_to_ids("<|im_start|>")
        assert generating.bos_token_id not in ids  # ChatML begins with <|im_start|>
        whole = generating.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert ids == whole


def test_units_are_one_token_each_at_most(prepared):
    units = [7, 3, 49, 0]
    row = [{"role": "user", "content": prompts.asr(dsu.to_text(units))}, {"role": "assistant", "content": "x"}]
    (ids,), _ = script.encode(prepared.tokenizer, [row])
    assert dsu.to_text(units) in prepared.tokenizer.decode(ids)
    pieces = prepared.tokenizer.convert_ids_to_tokens(ids)
    assert not any(piece.startswith("<0xF") for piece in pieces)  # no byte fallback


# --- The finished folder --------------------------------------------------------------------------
def test_finished_folder(tuned, model_dir, data, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    names = {path.name for path in tuned.iterdir()}
    assert {"model.safetensors", "config.json", "speech_units.json", "run_info.json", "sft_config.json"} <= names
    assert not [name for name in names if name.startswith("checkpoint-") or name.endswith((".bin", ".pt", ".md"))]
    assert dsu.read_metadata(tuned) == dsu.read_metadata(model_dir)
    tokenizer, before = AutoTokenizer.from_pretrained(tuned), AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.get_vocab() == before.get_vocab()
    for text in ("Speech: " + dsu.to_text([1, 2, 3]) + "\nEnglish:", "Der Fluss ist lang.", "한 ñ"):
        assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
    stops = GenerationConfig.from_pretrained(tuned).eos_token_id
    assert stops[0] == tokenizer.eos_token_id and before.convert_tokens_to_ids("</s>") in stops
    model, old = AutoModelForCausalLM.from_pretrained(tuned), AutoModelForCausalLM.from_pretrained(model_dir)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == old.dtype
    assert not torch.equal(model.lm_head.weight, old.lm_head.weight)
    info = json.loads((tuned / "run_info.json").read_text())
    assert info["counts"]["examples"] == 24 and "model.safetensors" in info["outputs"]
    (tuned / "checkpoint-12").mkdir()  # a run killed while it cleaned up
    script.train(model_dir, data, tuned, {**QUICK, "num_train_epochs": 2})
    assert "already done" in capsys.readouterr().out
    assert not (tuned / "checkpoint-12").exists()


def test_tuning_lowers_the_loss(tuned, prepared, model_dir):
    import torch
    from transformers import AutoModelForCausalLM

    def loss(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses = [model(**{k: torch.tensor([row[k]]) for k in row}).loss.item() for row in prepared.dataset]
        return sum(losses) / len(losses)

    assert loss(tuned) < loss(model_dir) - 0.5


def test_same_as_a_plain_loop(prepared, model_dir, tuned, tmp_path):
    """The weights are those of a loop written out: AdamW, clipping, the mean over a step's labelled tokens."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 12)
    for epoch in range(2):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, 24, 4):
            rows = [prepared.dataset[i] for i in order[start : start + 4]]
            total = sum(label != -100 for row in rows for label in row["labels"])
            for row in rows:
                logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
                labels = torch.tensor(row["labels"][1:])
                (torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / total).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    wanted, found = model.state_dict(), load_file(tuned / "model.safetensors")
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], atol=2e-4, rtol=1e-3)


# --- Kill and resume ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_dir, data) -> Path:
    """An uninterrupted run of 15 steps, the last in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    finish(start(command(model_dir, data, folder)))
    return folder


def command(model: Path, data: Path, output_dir: Path, **extra) -> list[str]:
    settings = {**QUICK, "num_train_epochs": 2.5, "save_steps": 2, "train_sampling_strategy": "group_by_length"}
    flags = [f"--sft.{name}={json.dumps(value).strip(chr(34))}" for name, value in {**settings, **extra}.items()]
    paths = ["--model", str(model), "--data", str(data), "--output_dir", str(output_dir)]
    return [*paths, *flags]


def start(arguments: list[str], processes: int = 1) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, str(ROOT / "instruction_tuning/train.py"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(tmp_path, whole, model_dir, data):
    """SIGKILL at two seeded steps, in or soon after the writing of their checkpoints."""
    killed = tmp_path / "killed"
    rng = random.Random(5)
    steps = sorted(rng.sample(range(4, 13, 2), 2))
    for step in steps:
        process = start(command(model_dir, data, killed))
        while not (killed / f"checkpoint-{step}").exists():  # mid-write: the folder comes first
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (killed / "run_info.json").exists()
    output = finish(start(command(model_dir, data, killed)))
    assert "going on from" in output
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json", "sft_config.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert not list(killed.glob("checkpoint-*"))


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_goes_on_later(tmp_path, whole, model_dir, data):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.stop").touch()
    process = start(command(model_dir, data, tmp_path / "run"))
    output = process.communicate()[0]
    assert process.returncode == 1 and f"asked to stop: saved {tmp_path}/run/checkpoint-1" in output
    assert not (tmp_path / "run/run_info.json").exists() and not (tmp_path / "run/.stop").exists()
    assert "going on from" in finish(start(command(model_dir, data, tmp_path / "run")))
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json", "sft_config.json"):
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_killed_while_publishing(tmp_path, model_dir, data, monkeypatch):
    """The last checkpoint, in the middle of an epoch, is not trained further."""
    settings = {**QUICK, "num_train_epochs": 0.5, "save_steps": 2}
    script.train(model_dir, data, tmp_path / "whole", settings)

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_model", die)
        with pytest.raises(KeyboardInterrupt):
            script.train(model_dir, data, tmp_path / "killed", settings)
    assert [path.name for path in script.checkpoints(tmp_path / "killed")] == ["checkpoint-2", "checkpoint-3"]
    script.train(model_dir, data, tmp_path / "killed", settings)
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_half_written_checkpoints_are_passed_over(tmp_path, model_dir, data, monkeypatch):
    """Any file of a checkpoint missing, or its last bytes: not whole."""

    monkeypatch.setattr(script, "save_model", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        script.train(model_dir, data, tmp_path / "out", {**QUICK, "save_steps": 3})
    old, new = script.checkpoints(tmp_path / "out")
    assert script.is_whole(old, 1) and script.is_whole(new, 1)
    assert not script.is_whole(new, 2)  # two processes leave two random states
    kept = tmp_path / "kept"
    shutil.copytree(new, kept)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        content = (kept / name).read_bytes()
        (new / name).unlink()
        assert not script.is_whole(new, 1), name
        if name != "model.safetensors":  # written first, so never the half one of a killed process
            (new / name).write_bytes(content[: len(content) // 2])
            assert not script.is_whole(new, 1), name
        (new / name).write_bytes(content)
        assert script.is_whole(new, 1)
    (new / "trainer_state.json").unlink()
    assert script.newest_checkpoint(tmp_path / "out", 1) == old
    assert not new.exists()


@pytest.mark.slow
def test_two_processes_train_the_same_model(tmp_path, whole, model_dir, data):
    """Two processes of batch 1 are one of batch 2, up to the order of sums; the second run says it is done."""
    from safetensors.torch import load_file

    arguments = command(model_dir, data, tmp_path / "two", per_device_train_batch_size=1)
    finish(start(arguments, processes=2))
    assert "already done" in finish(start(arguments, processes=2))
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "two"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 5e-3


# --- Refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sft", "message"),
    [
        ({"learning_rat": 1e-3}, "sft.learning_rat is no setting.*\n.*learning_rate"),
        ({"packing": True}, "sft.packing cannot be set: packed examples"),
        ({"padding_free": True}, "sft.padding_free cannot be set"),
        ({"learning_rate": "fast"}, "sft.learning_rate is 'fast'"),
        ({"per_device_train_batch_size": True}, "sft.per_device_train_batch_size is True"),
        ({"bf16": True}, "no CUDA GPU"),
        ({"max_length": 513}, "exceeds the model's context of 512"),
        ({"max_length": 40}, r"of 24 examples are longer than 40 tokens; the longest, row4, has \d+"),
        ({"save_strategy": "sometimes"}, "do not go together.*sometimes"),
    ],
)
def test_settings_are_refused_before_the_model_is_loaded(sft, message, tmp_path, model_dir, data, monkeypatch):
    import torch

    if "bf16" in sft and torch.cuda.is_available():
        pytest.skip("with a GPU, bf16 is welcome")
    monkeypatch.setattr(script, "tune", lambda *arguments: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=message):
        script.train(model_dir, data, tmp_path / "out", sft)
    assert not (tmp_path / "out").exists()


def test_data_is_refused(tmp_path, model_dir):
    def refused(message: str, content) -> None:
        path = tmp_path / "bad.jsonl"
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in content))
        with pytest.raises(UserError, match=message):
            script.train(model_dir, path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    good = {"id": "1", "messages": [user, assistant]}
    refused("is empty", [])
    refused("bad.jsonl:2: not JSON", [good, "{oops\n"])
    refused("field 'messages' is missing", [{"id": "1"}])
    for messages in ([assistant, user], [user], [user, user, assistant], [], [user, assistant, user]):
        refused(r"bad.jsonl:2 \(id 2\): the roles are", [good, {"id": "2", "messages": messages}])
    refused("messages must be a list of turns", [{"id": "1", "messages": [user, {"role": "assistant"}]}])
    refused("messages must be a list of turns", [{"id": "1", "messages": "hello"}])
    smuggled = {"role": "assistant", "content": "b<|im_end|>"}
    refused(r"special token <\|im_end\|>", [{"id": "1", "messages": [user, smuggled]}])
    stranger = {"role": "user", "content": prompts.asr(chr(990000))}
    refused("U\\+F1B30 is none of the tokenizer's 50 units", [{"id": "1", "messages": [stranger, assistant]}])


def test_model_folders_are_refused(tmp_path, model_dir, base_model_dir, data):
    def refused(message: str, folder: Path) -> None:
        with pytest.raises(UserError, match=message):
            script.train(folder, data, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("nowhere does not exist", tmp_path / "nowhere")
    refused("knows no speech units", base_model_dir)
    plain = tmp_path / "plain"
    shutil.copytree(model_dir, plain)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    refused("has no chat template", plain)


def test_published_settings_are_accepted(tmp_path, monkeypatch):
    import torch
    import yaml

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # for bf16
    sft = yaml.safe_load((ROOT / "instruction_tuning/configs/towerspeech_7b.yaml").read_text())["sft"]
    settings = script.check_settings(sft)
    monkeypatch.undo()
    config = script.make_config({**settings, "bf16": False}, tmp_path)
    assert (config.learning_rate, config.num_train_epochs, config.warmup_steps) == (8e-5, 1, 20)
    assert config.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]


def test_help_is_quick():
    started = time.monotonic()
    shown = subprocess.run(
        [sys.executable, str(ROOT / "instruction_tuning/train.py"), "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "--sft" in shown.stdout
    assert time.monotonic() - started < 5  # under 1 s on an idle machine
