"""import_megatron.py: a folder as megatron_to_hf.py leaves it comes back whole, or is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from continued_pretraining.import_megatron import import_megatron
from generate.generate import generate
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.model_folder import TOKENIZER_FILES
from towerspeech.records import read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def trained(model_dir):
    """Weights that training has moved, of the extended model's shapes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for weights in model.parameters():
        weights.data += 0.05 * torch.randn_like(weights)
    return model


@pytest.fixture
def converted(tmp_path, trained):
    """As the converter's LlamaConfig has it: shapes and the training's length alone; a tokenizer that is not ours."""
    folder = tmp_path / "hf"
    ours = trained.config
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_attention_heads=ours.num_attention_heads,
        num_hidden_layers=ours.num_hidden_layers,
        num_key_value_heads=ours.num_key_value_heads,
        rms_norm_eps=ours.rms_norm_eps,
        max_position_embeddings=64,
        tie_word_embeddings=ours.tie_word_embeddings,
    )
    config.save_pretrained(folder)
    names = sorted(trained.state_dict())
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: trained.state_dict()[name].clone() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    return folder


def test_weights_are_theirs_and_all_else_is_ours(tmp_path, converted, trained, model_dir):
    import_megatron(converted, model_dir, tmp_path / "out", dtype="float32")
    weights = load_file(tmp_path / "out/model.safetensors")
    assert weights.keys() <= trained.state_dict().keys() and len(weights) >= len(trained.state_dict()) - 1
    for name, tensor in weights.items():
        assert torch.equal(tensor, trained.state_dict()[name])
    for name in TOKENIZER_FILES:
        assert (tmp_path / "out" / name).is_file() == (model_dir / name).is_file()
        if (model_dir / name).is_file():
            assert hash_file(tmp_path / "out" / name) == hash_file(model_dir / name)
    ours, imported = (json.loads((path / "config.json").read_text()) for path in (model_dir, tmp_path / "out"))
    for name in ("max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id", "vocab_size"):
        assert imported[name] == ours[name]
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation.get("eos_token_id") == ours["eos_token_id"]


@pytest.mark.parametrize("kept", [{"eos_token_id": 2, "max_length": 77}, None])
def test_how_it_generates_is_the_models_own(tmp_path, converted, model_dir, kept):
    """Its generation_config.json, or what its config says where it has none; never the converter's."""
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    (model / "generation_config.json").unlink(missing_ok=True)
    if kept:
        (model / "generation_config.json").write_text(json.dumps(kept))
    import_megatron(converted, model, tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == json.loads((model / "config.json").read_text())["eos_token_id"] != 7
    assert generation.get("max_length") == (kept or {}).get("max_length")


def test_run_again_it_is_done(tmp_path, converted, model_dir, capsys):
    import_megatron(converted, model_dir, tmp_path / "out")
    import_megatron(converted, model_dir, tmp_path / "out")
    assert "already done" in capsys.readouterr().out
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, "its num_hidden_layers is 5, that of"),
        ({"rms_norm_eps": 0.5}, "its rms_norm_eps is 0.5, that of"),
        ({"vocab_size": 486}, "its tokenizer has 487 tokens, its model only 486"),
        ({"vocab_size": 640}, "no weights can be read: .*above report"),
    ],
)
def test_another_models_config_is_refused(tmp_path, converted, model_dir, change, message):
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        import_megatron(converted, model_dir, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


def test_weights_that_lack_or_are_no_weights_are_refused(tmp_path, converted, model_dir):
    path = converted / "pytorch_model-00001-of-00002.bin"
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    name = next(name for name in state if "mlp" in name)
    torch.save({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(UserError, match=f"missing keys: {name}"):
        import_megatron(converted, model_dir, tmp_path / "out")
    torch.save(state | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="unexpected keys: model.layers.9"):
        import_megatron(converted, model_dir, tmp_path / "out")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="no weights can be read"):
        import_megatron(converted, model_dir, tmp_path / "out")
    shutil.rmtree(converted)
    with pytest.raises(UserError, match="megatron_to_hf.py"):
        import_megatron(converted, model_dir, tmp_path / "out")


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_pickled_is_not_run(tmp_path, converted, model_dir):
    torch.save({"model.norm.weight": Planted(tmp_path / "ran")}, converted / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UserError, match="no weights can be read"):
        import_megatron(converted, model_dir, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_it_generates(tmp_path, converted, trained, model_dir):
    """With vLLM, what transformers' greedy search gives with the trained weights."""
    import_megatron(converted, model_dir, tmp_path / "checkpoint-5", dtype="float32")
    facts = {"task": "mt", "dataset": "x", "shots": 0, "src_lang": "de", "tgt_lang": "en"}
    rows = [{"id": f"{i}", "instruction": f"German: hund {i}\nEnglish:", "output": "dog", **facts} for i in range(8)]
    write_jsonl(tmp_path / "0_shot/x_de-en.jsonl", rows)
    prompts = [tmp_path / "0_shot/x_de-en.jsonl"]
    generate([tmp_path / "checkpoint-5"], prompts, tmp_path / "out", max_new_tokens=6)
    tokenizer, compared = AutoTokenizer.from_pretrained(model_dir), 0
    for row, told in zip(rows, read_jsonl(tmp_path / "out/checkpoint-5/0_shot/x_de-en.jsonl"), strict=True):
        ids = tokenizer(row["instruction"], return_tensors="pt")["input_ids"]
        new = trained.eval().generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]
        if "\ufffd" not in text:  # bytes that are no character come out otherwise when they come one by one
            assert told["text"].strip() == text.strip()
            compared += 1
    assert compared >= 4
