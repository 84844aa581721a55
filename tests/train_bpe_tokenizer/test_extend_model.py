"""extend_model.py: rows, files and logits, against transformers and safetensors."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.errors import UserError
from towerspeech.tokenizer import read_metadata, tokenizer_hash
from train_bpe_tokenizer.extend_model import extend_model, make_rows
from train_bpe_tokenizer.merge_tokenizer import merge_tokenizer

spec = importlib.util.spec_from_file_location("shared_fixtures", Path(__file__).parents[1] / "conftest.py")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory):
    """An untied model in several shards."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shared.save_base_model(folder, tied=False, max_shard_size="120KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def untied_extended(tmp_path_factory, untied_dir, tokenizer_dir):
    folder = tmp_path_factory.mktemp("untied_extended") / "model"
    extend_model(untied_dir, tokenizer_dir, folder)
    return folder


def tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_logits_over_the_old_vocabulary(request, kind, base_model_dir, model_dir):
    before, after = base_model_dir, model_dir
    if kind == "untied":
        before, after = (request.getfixturevalue(name) for name in ("untied_dir", "untied_extended"))
    tokenizer = AutoTokenizer.from_pretrained(after, local_files_only=True)
    texts = [*shared.make_sentences(5, seed=9), prompts.mt_0_shot("en", "de", "my sister buys seven books.")]
    old, new = load(before), load(after)
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert torch.equal(old(ids).logits, new(ids).logits[..., :400])
    ids = torch.tensor([tokenizer(prompts.asr(dsu.to_text(range(50))))["input_ids"]])
    assert torch.isfinite(new(ids).logits).all()


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_shapes_are_those_of_resize_token_embeddings(request, kind, base_model_dir, model_dir):
    before, after = base_model_dir, model_dir
    if kind == "untied":
        before, after = (request.getfixturevalue(name) for name in ("untied_dir", "untied_extended"))
    resized = load(before)
    resized.resize_token_embeddings(487, pad_to_multiple_of=64)
    new = load(after)
    assert new.config.vocab_size == resized.config.vocab_size == new.vocab_size == 512
    wanted = resized.state_dict()
    got = new.state_dict()
    assert {name: tensor.shape for name, tensor in got.items()} == {n: t.shape for n, t in wanted.items()}
    for name, tensor in got.items():
        keep = 400 if name in (EMBEDDINGS, HEAD) else len(tensor)
        assert torch.equal(tensor[:keep], wanted[name][:keep]), name
    assert new.config.tie_word_embeddings == (kind == "tied")


def test_files(model_dir, tokenizer_dir, untied_dir, untied_extended, base_model_dir):
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "speech_units.json"):
        assert (model_dir / name).read_bytes() == (tokenizer_dir / name).read_bytes()
    config, base = (json.loads((folder / "config.json").read_text()) for folder in (model_dir, base_model_dir))
    assert config == {**base, "vocab_size": 512, "pad_token_id": 403}
    assert json.loads((model_dir / "generation_config.json").read_text())["pad_token_id"] == 403
    assert tokenizer_hash(model_dir) == tokenizer_hash(tokenizer_dir)

    for path in (*model_dir.glob("*.safetensors"), *untied_extended.glob("*.safetensors")):
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, path  # the format aligns the data
    index = json.loads((untied_extended / "model.safetensors.index.json").read_text())
    found = tensors(untied_extended)
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    touched = {index["weight_map"][name] for name in (EMBEDDINGS, HEAD)}
    for path in untied_dir.glob("*.safetensors"):
        linked = os.path.samefile(path, untied_extended / path.name)
        assert linked == (path.name not in touched)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_kept_and_old_rows_are_the_same_bits(tmp_path, tokenizer_dir, dtype):
    shared.save_base_model(tmp_path / "base", tied=False, dtype=dtype)
    extend_model(tmp_path / "base", tokenizer_dir, tmp_path / "out")
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    for name, tensor in after.items():
        keep = 400 if name in (EMBEDDINGS, HEAD) else len(tensor)
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor[:keep].view(torch.int16), before[name].view(torch.int16))
    assert load(tmp_path / "out").dtype == getattr(torch, dtype)


def test_tied_head_that_is_stored_stays_tied(tmp_path, base_model_dir, tokenizer_dir):
    shutil.copytree(base_model_dir, tmp_path / "base")
    weights = tensors(base_model_dir)
    weights[HEAD] = weights[EMBEDDINGS].clone()
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    extend_model(tmp_path / "base", tokenizer_dir, tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert torch.equal(after[HEAD], after[EMBEDDINGS]) and len(after[HEAD]) == 512


def test_padded_base(tmp_path, base_model_dir, tokenizer_dir):
    """Rows that pad the base belong to no token: new tokens take them over, and they do not count for the mean."""
    model = load(base_model_dir)
    model.resize_token_embeddings(400, pad_to_multiple_of=128)
    model.get_input_embeddings().weight.data[400:] = 1e3
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_model_dir, local_files_only=True).save_pretrained(tmp_path / "base")
    extend_model(tmp_path / "base", tokenizer_dir, tmp_path / "out", init="mean", pad_to_multiple_of=1)
    rows = tensors(tmp_path / "out")[EMBEDDINGS]
    assert len(rows) == 487 and rows[400:].abs().max() < 1


def test_rows_have_the_old_statistics():
    old = torch.randn(500, 8, generator=torch.Generator().manual_seed(1)) @ torch.randn(8, 8) + 3
    rows = make_rows(old, 200_000, "normal", 0)
    mean = old.double().mean(0)
    wanted = 1e-5 * torch.cov(old.double().T, correction=0)  # SpireLM's and the original's factor
    error = torch.cov(rows.double().T) - wanted
    assert error.abs().max() < 0.03 * wanted.diagonal().max()
    assert torch.allclose(rows.double().mean(0), mean, atol=1e-4)
    assert torch.equal(make_rows(old, 3, "mean", 0), mean.float().repeat(3, 1))
    assert torch.equal(make_rows(old, 700, "normal", 5), make_rows(old, 700, "normal", 5))
    assert not torch.equal(make_rows(old, 3, "normal", 5), make_rows(old, 3, "normal", 6))
    bias = make_rows(old[:, 0], 200_000, "normal", 0).double()
    assert bias.shape == (200_000,) and 0.98 < bias.var() / (1e-5 * old[:, 0].double().var()) < 1.02


def test_embeddings_head_and_seeds_draw_different_rows(tmp_path, untied_dir, tokenizer_dir):
    """From the same old rows, so that equal rows would mean equal noise."""
    shutil.copytree(untied_dir, tmp_path / "base")
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())["weight_map"]
    embeddings = load_file(tmp_path / "base" / index[EMBEDDINGS])[EMBEDDINGS]
    weights = load_file(tmp_path / "base" / index[HEAD])
    save_file({**weights, HEAD: embeddings}, tmp_path / "base" / index[HEAD], metadata={"format": "pt"})
    rows = {}
    for seed in (0, 1):
        extend_model(tmp_path / "base", tokenizer_dir, tmp_path / f"{seed}", seed=seed)
        found = tensors(tmp_path / f"{seed}")
        rows |= {(name, seed): found[name][400:] for name in (EMBEDDINGS, HEAD)}
    for name, seed in rows:
        assert not torch.isclose(rows[EMBEDDINGS, seed], rows[HEAD, seed], rtol=1e-6).any()
        assert not torch.isclose(rows[name, 0], rows[name, 1], rtol=1e-6).any()
        # The mean of 112 rows lies within 5 standard errors of the mean of the old ones
        error = (rows[name, seed].mean(0) - embeddings.mean(0)) / (embeddings.std(0) * (1e-5 / 112) ** 0.5)
        assert error.abs().max() < 5
        spread = rows[name, seed].std(0) / embeddings.std(0)
        assert 0.0028 < spread.mean() < 0.0035  # the square root of 1e-5 is 0.00316


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_merge_is_the_mean_of_its_units(request, tmp_path, kind, base_model_dir, model_dir, tokenizer_dir):
    """Against a plain loop over SentencePiece's pieces; all other rows are those of --init normal."""
    before, normal = base_model_dir, model_dir
    if kind == "untied":
        before, normal = (request.getfixturevalue(name) for name in ("untied_dir", "untied_extended"))
    extend_model(before, tokenizer_dir, tmp_path / "out", init="merge_mean")
    pieces = SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    rows, got = tensors(normal), tensors(tmp_path / "out")
    for name in (EMBEDDINGS, HEAD) if kind == "untied" else (EMBEDDINGS,):
        wanted, merges = rows[name].clone(), 0
        for index in range(405, 485):
            units = [405 + ord(char) - dsu.OFFSET for char in pieces.id_to_piece(index)]
            if len(units) > 1:
                merges += 1
                total = torch.zeros(64, dtype=torch.float64)
                for unit in units:
                    total += rows[name][unit]
                wanted[index] = total / len(units)
        assert merges == 30
        assert torch.allclose(got[name][455:485], wanted[455:485], rtol=1e-6, atol=1e-7)
        assert torch.equal(got[name][:455], rows[name][:455]) and torch.equal(got[name][485:], rows[name][485:])
        assert not torch.allclose(got[name][455:485], rows[name][455:485], rtol=1e-6, atol=1e-7)


def test_a_merges_mean_is_computed_in_float32():
    old = torch.randn(300, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    merges = {5: [0, 1, 1, 2], 6: [3, 4]}
    wanted = make_rows(old.float(), 7, "merge_mean", 3, merges)
    assert torch.allclose(wanted[5], (wanted[0] + 2 * wanted[1] + wanted[2]) / 4)
    assert torch.equal(make_rows(old, 7, "merge_mean", 3, merges), wanted.bfloat16())


def test_same_bytes_done_again_and_resumed(tmp_path, untied_dir, untied_extended, tokenizer_dir, capsys, monkeypatch):
    """Killed after its first shard and run again, it writes the same bytes."""
    import train_bpe_tokenizer.extend_model as script

    real, calls = script.rewrite, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(script, "rewrite", killed)
    with pytest.raises(KeyboardInterrupt):
        extend_model(untied_dir, tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out/run_info.json").exists() and list((tmp_path / "out").glob("*.safetensors"))
    extend_model(untied_dir, tokenizer_dir, tmp_path / "out")
    assert len(calls) == 3  # the first one was kept
    for path in untied_extended.iterdir():
        if path.name != "run_info.json" and not path.name.startswith("."):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    capsys.readouterr()
    extend_model(untied_dir, tokenizer_dir, tmp_path / "out")
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed was 0, now 1"):
        extend_model(untied_dir, tokenizer_dir, tmp_path / "out", seed=1)


# --- Byte-level bases -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def byte_level_dir(tmp_path_factory):
    """A random Llama with a byte-level BPE: 350 tokens and three added ones, ChatML's among them, in 384 rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(shared.make_sentences(400), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("byte_level") / "model"
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    ids = {"bos_token_id": None, "eos_token_id": 352, "pad_token_id": 350}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, num_attention_heads=2))
    model.get_input_embeddings().weight.data[353:] = 1e3
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("special_tokens", [None, []])
def test_byte_level_base(tmp_path, byte_level_dir, units_bpe_dir, special_tokens):
    """ChatML tokens keep their rows; without <PAD> the base's padding stays; a unit's byte pieces are no merges."""
    merge_tokenizer(byte_level_dir, units_bpe_dir, tmp_path / "tokenizer", special_tokens=special_tokens)
    metadata = read_metadata(tmp_path / "tokenizer")
    assert metadata["base_vocab_size"] == 353 and metadata["special_tokens"]["<|im_end|>"] == 352
    extend_model(byte_level_dir, tmp_path / "tokenizer", tmp_path / "out", init="merge_mean")
    base, out = (json.loads((folder / "config.json").read_text()) for folder in (byte_level_dir, tmp_path / "out"))
    pad = metadata["special_tokens"].get("<PAD>", 350)
    assert (pad == 350) == (special_tokens == [])
    assert out == {**base, "vocab_size": 448, "pad_token_id": pad}
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["pad_token_id"] == pad

    old, new = load(byte_level_dir), load(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    for text in ["<|im_start|>user\nhello<|im_end|>\n", *shared.make_sentences(3)]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert torch.equal(old(ids).logits[..., :353], new(ids).logits[..., :353])

    rows = tensors(tmp_path / "out")[EMBEDDINGS]
    assert len(rows) == 448 and rows[353:].abs().max() < 1
    extend_model(byte_level_dir, tmp_path / "tokenizer", tmp_path / "normal")
    differs = (rows != tensors(tmp_path / "normal")[EMBEDDINGS]).any(1)
    merges = [index for index in range(448) if len(tokenizer.decode([index])) > 1 and index >= 353]
    merges = [index for index in merges if set(tokenizer.decode([index])) <= set(dsu.to_text(range(50)))]
    assert len(merges) == 30 and differs.nonzero().flatten().tolist() == merges
    first = metadata["first_unit_id"]
    for index in merges:
        units = [first + ord(char) - dsu.OFFSET for char in tokenizer.decode([index])]
        assert torch.allclose(rows[index], sum(rows[unit] for unit in units) / len(units), rtol=1e-6, atol=1e-7)


@pytest.fixture
def refused(tmp_path, base_model_dir, tokenizer_dir):
    def check(message, model=base_model_dir, tokenizer=tokenizer_dir, **options):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(UserError, match=message):
            extend_model(model, tokenizer, tmp_path / "out", **options)
        assert not [path for path in tmp_path.glob("out/*") if not path.name.startswith(".")]

    return check


@pytest.fixture
def copy(tmp_path, base_model_dir):
    folder = tmp_path / "copy"
    shutil.copytree(base_model_dir, folder)
    return folder


# --- Other architectures --------------------------------------------------------------------------
SIZES = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def make_base(tmp_path, base_model_dir):
    """A function that saves a random model of some type with the base tokenizer."""

    def make(model_type: str, **options) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SIZES, **options}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
        model.save_pretrained(tmp_path / "base", max_shard_size="120KB")
        for path in base_model_dir.glob("tokenizer*"):
            shutil.copyfile(path, tmp_path / "base" / path.name)
        return tmp_path / "base"

    return make


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("phi", {}),  # an lm_head.bias
        ("phi", {"tie_word_embeddings": True}),
        ("mixtral", {"num_local_experts": 2}),  # experts are one by one in the file, and fused in the model
        ("gemma3_text", {"head_dim": 32}),  # tied without a word in config.json
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_other_architectures(tmp_path, make_base, tokenizer_dir, kind, options):
    base = make_base(kind, **options)
    config = json.loads((base / "config.json").read_text())
    if kind == "gemma3_text":
        config.pop("tie_word_embeddings", None)
        (base / "config.json").write_text(json.dumps(config))
    extend_model(base, tokenizer_dir, tmp_path / "out", init="merge_mean")
    old, (new, told) = load(base), load_told(tmp_path / "out")
    assert not any(told.values()) and new.get_input_embeddings().weight.shape == (512, 64)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    ids = torch.arange(1, 400, 7)[None]
    with torch.no_grad():
        assert torch.equal(old(ids).logits, new(ids).logits[..., :400])
        assert torch.isfinite(new(ids + 90).logits).all()
    if kind == "phi":
        before, after = old.lm_head.bias.data, new.lm_head.bias.data
        assert after.shape == (512,) and after[400:].unique().numel() == 112
        assert torch.allclose(after[400:], before.mean().expand(112), atol=5 * 1e-5**0.5)
        assert 0.002 < after[400:455].std() / before.std() < 0.0044
        pieces = SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
        for index in range(455, 485):
            units = [405 + ord(char) - 0xF0000 for char in pieces.id_to_piece(index)]
            assert torch.allclose(after[index], sum(after[unit] for unit in units) / len(units), rtol=1e-6)


def load_told(folder):
    """A model, and what transformers has to say about its weights: missing, unexpected, of other shapes."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)


def test_code_of_its_own_is_not_needed_where_transformers_has_the_class(tmp_path, copy, tokenizer_dir):
    config = json.loads((copy / "config.json").read_text())
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    (copy / "config.json").write_text(json.dumps({**config, **code}))
    (copy / "modeling_own.py").write_text("raise SystemExit")
    extend_model(copy, tokenizer_dir, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**config, "vocab_size": 512, "pad_token_id": 403}
    assert not (tmp_path / "out/modeling_own.py").exists() and load(tmp_path / "out").vocab_size == 512


def test_buffers_of_older_checkpoints_do_no_harm(tmp_path, copy, tokenizer_dir):
    """Llama-2 was published with its rotary frequencies, which transformers passes over."""
    weights = tensors(copy)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    extend_model(copy, tokenizer_dir, tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["model.layers.0.self_attn.rotary_emb.inv_freq"], torch.ones(16))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, r"no model_type 'own', and the model's own code"),
        ({"model_type": "own"}, "config.json: transformers has no model_type 'own'"),
        ({"model_type": None}, "config.json: transformers has no model_type None"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "config.json: the weights are quantized"),
        ({"quantization_config": {"load_in_8bit": True}}, "config.json: the weights are quantized"),
        ({"model_type": "gemma3", "text_config": {"vocab_size": 400}}, "gemma3 has a text_config"),
        ({"model_type": "llava", "vocab_size": 400}, "llava has a text_config"),
        ({"model_type": "gemma3n_text"}, "gemma3n_text has embeddings for every layer"),
        ({"model_type": "bart"}, "bart has an encoder"),
        ({"model_type": "t5"}, "t5 has an encoder"),
        ({"architectures": ["OwnForCausalLM"]}, "LlamaForCausalLM: config.json calls it OwnForCausalLM"),
        ({"attention_bias": True}, r"self_attn.k_proj.bias is missing; .*; and 4 more"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight has no place in it"),
        ({"hidden_size": 32}, r"input_layernorm.weight is \[64\], not \[32\]"),
        ({"hidden_size": "many"}, r"config.json: .*hidden_size"),
        ({"num_attention_heads": 0}, "config.json: integer modulo by zero"),
        ({"model_type": "vit"}, "extended, would not load: Unrecognized configuration class"),
        ({"tie_word_embeddings": False}, "one embed_tokens.weight and one lm_head.weight are wanted"),
    ],
)
def test_config_that_does_not_fit(refused, copy, changed, message):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changed}))
    refused(message, model=copy)


def test_config_without_architectures_gets_them(tmp_path, copy, tokenizer_dir):
    """vLLM loads no model without."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": None}))
    extend_model(copy, tokenizer_dir, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"lm_head.bias": torch.zeros(400)}), "LlamaForCausalLM: lm_head.bias has no place in it"),
        (lambda w: w.update({"lm_head.bias": torch.zeros(399)}), r"lm_head.bias is \[399\]"),
        (lambda w: w.update({"final_logits_bias": torch.zeros(1, 400)}), "final_logits_bias has no place in it"),
        (lambda w: w.update({"model.extra.embed_tokens.weight": torch.zeros(400, 64)}), "one embed_tokens.weight"),
        (lambda w: w.update({HEAD: w[EMBEDDINGS] + 1}), f"ties {HEAD} to {EMBEDDINGS}, but they differ"),
        (lambda w: w.update({HEAD: w[EMBEDDINGS].bfloat16()}), f"ties {HEAD} to {EMBEDDINGS}, but they differ"),
        (lambda w: w.update({HEAD: w[EMBEDDINGS][1:].clone()}), r"lm_head.weight is \[399, 64\], .* \[400, 64\]"),
        (lambda w: w.pop("model.norm.weight"), "LlamaForCausalLM: model.norm.weight is missing\n"),
        (
            lambda w: w.update({"model.layers.0.mlp.up_proj.qweight": w.pop("model.layers.0.mlp.up_proj.weight")}),
            "up_proj.weight is missing; .*up_proj.qweight has no place in it",
        ),
        (
            lambda w: w.update({f"lm_head.{name}": torch.zeros(8, 400, dtype=torch.int32) for name in ("qweight",)}),
            "lm_head.qweight has no place in it",
        ),
    ],
)
def test_weights_that_do_not_fit(refused, copy, change, message):
    weights = tensors(copy)
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(message, model=copy)


def test_wrong_index(refused, tmp_path, untied_dir):
    folder = tmp_path / "shards"
    shutil.copytree(untied_dir, folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    wrong = {
        "disagree on lm_head.weight": {HEAD: next(name for name in files if name != index["weight_map"][HEAD])},
        "disagree on model.more": {"model.more": files[0]},
        "no.safetensors does not exist": {HEAD: "no.safetensors"},
        f"disagree on {EMBEDDINGS}": {EMBEDDINGS: f"../shards/{index['weight_map'][EMBEDDINGS]}"},
    }
    for message, change in wrong.items():
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **change}}))
        refused(message, model=folder)
    listed = list(index["weight_map"].values())
    beside = next(name for name, file in index["weight_map"].items() if listed.count(file) > 1)
    left_out = {name: file for name, file in index["weight_map"].items() if name != beside}
    path.write_text(json.dumps({**index, "weight_map": left_out}))
    refused(f"disagree on {beside}", model=folder)
    path.write_text(json.dumps({"metadata": {}}))
    refused("'weight_map' is missing", model=folder)
    path.write_text(json.dumps(index))
    last = folder / files[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-10])  # of a shard that would be linked, or of the head's
    refused("is no whole safetensors file.*not fully covered", model=folder)
    last.write_bytes(whole)
    shutil.copyfile(folder / files[0], folder / "model.safetensors")
    refused("holds model.safetensors and model.safetensors.index.json", model=folder)


def test_adapter(refused, copy):
    (copy / "adapter_config.json").write_text("{}")
    refused("holds an adapter", model=copy)


def test_files_that_are_not_copied(tmp_path, copy, tokenizer_dir):
    """Old tokenizers, and the index of weights that are not there."""
    for name in ("tekken.json", "pytorch_model.bin.index.json", "vocab.json", "original_run_info.json", "LICENSE"):
        (copy / name).write_text('{"outputs": {}}')
    extend_model(copy, tokenizer_dir, tmp_path / "out")
    base, out = ({path.name for path in folder.iterdir()} for folder in (copy, tmp_path / "out"))
    assert out - base == {"speech_units.json", "run_info.json", ".folder.lock", "chat_template.jinja"}
    assert base - out == {"tekken.json", "pytorch_model.bin.index.json", "vocab.json", "original_run_info.json"}


# --- Bad input ------------------------------------------------------------------------------------
def test_wrong_folders(tmp_path, refused, base_model_dir, model_dir):
    refused("no does not exist", model=tmp_path / "no")
    refused("no does not exist", tokenizer=tmp_path / "no")
    refused("this tokenizer knows no speech units", tokenizer=base_model_dir)
    refused("was not made from the tokenizer of .*487 and 400 tokens", model=model_dir)
    refused("--pad_to_multiple_of 0 is not positive", pad_to_multiple_of=0)


def test_tokenizer_of_another_base(refused, copy):
    path = copy / "tokenizer.json"
    saved = json.loads(path.read_text())
    vocabulary = saved["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary["other"] = vocabulary.pop(last)
    path.write_text(json.dumps(saved))
    refused(r"400 and 400 tokens, 1 of them different; the first is 'other' \(399\)", model=copy)


def test_model_without_tokenizer(tmp_path, refused, copy, tokenizer_dir):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    extend_model(copy, tokenizer_dir, tmp_path / "fine")  # 400 rows for 400 tokens
    weights = tensors(copy)
    for rows, message in ((390, "has 390 embeddings, the base of .* 400 tokens"), (410, "no tokenizer to compare")):
        weights[EMBEDDINGS] = torch.zeros(rows, 64)
        save_file(weights, copy / "model.safetensors")
        refused(message, model=copy)


def test_broken_weights(refused, copy, untied_dir, tmp_path):
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused("is no whole safetensors file.*not fully covered", model=copy)
    for junk in (b"version https://git-lfs.github.com/spec/v1\n", b"1234"):
        path.write_bytes(junk)
        refused("is no whole safetensors file", model=copy)
    path.rename(copy / "pytorch_model.bin")
    refused("weights must be safetensors", model=copy)
    weights = tensors(untied_dir)
    del weights[HEAD]
    save_file(weights, path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    refused("one embed_tokens.weight and one lm_head.weight are wanted", model=copy)
    weights[HEAD] = torch.zeros(400, 64, dtype=torch.int8)
    save_file(weights, path)
    refused("lm_head.weight is I8", model=copy)
    (copy / "config.json").write_text("{")
    refused("config.json: not JSON", model=copy)
    (copy / "config.json").unlink()
    refused("config.json does not exist", model=copy)
    shards = tmp_path / "shards"
    shutil.copytree(untied_dir, shards)
    next(shards.glob("*.safetensors")).unlink()
    refused("safetensors does not exist", model=shards)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1", "is no SentencePiece model"),
        ("tokenizer.json", "{}", "'model' is missing"),
        (None, "", "has no tokenizer.json and no tokenizer.model"),
    ],
)
def test_broken_tokenizers(tmp_path, refused, copy, tokenizer_dir, name, content, message):
    """Of the base model, and (without a name) of the merged tokenizer's folder."""
    if name:
        for old in ("tokenizer.json", "tokenizer.model"):
            (copy / old).unlink()
        (copy / name).write_text(content)
        refused(message, model=copy)
    else:
        (tmp_path / "tokenizer").mkdir()
        shutil.copyfile(tokenizer_dir / "speech_units.json", tmp_path / "tokenizer/speech_units.json")
        refused(message, tokenizer=tmp_path / "tokenizer")


def test_metadata_of_another_tokenizer(tmp_path, refused, tokenizer_dir):
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    metadata = json.loads((folder / "speech_units.json").read_text())
    (folder / "speech_units.json").write_text(json.dumps({**metadata, "merges": 31}))
    refused("has 50 units and 30 merges, its metadata say 50 units and 31", tokenizer=folder, init="merge_mean")
