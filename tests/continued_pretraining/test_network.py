"""The network that is trained, beside transformers' own model of the same folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from continued_pretraining import network as module
from continued_pretraining.packing import IGNORE
from towerspeech.errors import UserError

SMALL = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def save_model(folder: Path, kind: str = "llama", dtype=torch.float32, **changes) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    dist.destroy_process_group()


def make(folder: Path, mesh, what: str = "none", compiled: bool = False, dtype: str = "float32"):
    module.check_head(folder)
    module.check_weights(folder)
    network = module.empty_network(folder)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert (network.lm_head.weight is network.model.embed_tokens.weight) == network.config.tie_word_embeddings
    module.recompute(network, what)
    module.divide(network, mesh, dtype, compiled)
    module.allocate(network, "cpu")
    module.fill(network, folder)
    return network.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 17), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[1, 5:] = IGNORE
    return tokens[:, :-1], targets


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_transformers_own_model(tmp_path, mesh, kind, tied, dtype):
    """Weights bit for bit, from several files; losses and gradients to 1e-6."""
    folder = save_model(tmp_path / "model", kind, dtype, tie_word_embeddings=tied)
    assert len(list(folder.glob("*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = make(folder, mesh)
    mine, others = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == others.keys() and ("lm_head.weight" in mine) == (not tied)
    for name, weight in others.items():
        assert torch.equal(mine[name].full_tensor(), weight), name
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name

    inputs, targets = batch()
    total, by_window = ours.window_losses(inputs, targets, 0.5)
    logits = theirs(input_ids=inputs).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(by_window, losses.view(2, 16).sum(1), rtol=1e-6, atol=0)
    assert total.item() == pytest.approx(0.5 * losses.sum().item(), rel=1e-6)
    total.backward()
    (0.5 * losses.sum()).backward()
    for name, weight in others.items():
        largest = weight.grad.abs().max().item()
        torch.testing.assert_close(mine[name].grad.full_tensor(), weight.grad, rtol=1e-6, atol=2e-6 * largest)


@pytest.mark.parametrize("what", ["full", "selective"])
def test_computed_again_it_is_the_same(tmp_path, mesh, what):
    """Gradients bit for bit."""
    folder, found = save_model(tmp_path / "model"), []
    for kind in ("none", what):
        network = make(folder, mesh, kind)
        network.window_losses(*batch(), 1.0)[0].backward()
        found.append([parameter.grad.full_tensor() for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_selective_keeps_attention_and_every_second_product(tmp_path, mesh):
    """Of a layer's seven products the backward pass computes three again (of all, six: the last is not needed)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name()
            counts[name] = counts.get(name, 0) + 1
            return function(*args, **(kwargs or {}))

    found = {}
    for what in ("none", "full", "selective"):
        network, counts = make(save_model(tmp_path / what), mesh, what), {}
        total, _ = network.window_losses(*batch(), 1.0)
        with Count():
            total.backward()
        found[what] = {
            "products": counts["aten::mm"],
            "attention": sum(n for name, n in counts.items() if "scaled_dot_product" in name and "back" not in name),
        }
    layers = SMALL["num_hidden_layers"]
    assert found["none"] == {"products": 2 * 7 * layers, "attention": 0}
    assert found["full"] == {"products": (2 * 7 + 6) * layers, "attention": layers}
    assert found["selective"] == {"products": (2 * 7 + 3) * layers, "attention": 0}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["none", "full", "selective"])
def test_compiled_it_is_the_same(tmp_path, mesh, what):
    folder, found = save_model(tmp_path / "model"), []
    for compiled in (False, True):
        network = make(folder, mesh, what, compiled)
        total, by_window = network.window_losses(*batch(), 1.0)
        total.backward()
        found.append([by_window, *(parameter.grad.full_tensor() for parameter in network.parameters())])
        assert all((layer._compiled_call_impl is not None) == compiled for layer in network.model.layers)
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("reduced", ["micro_batch", "step"])
def test_gradients_of_bfloat16_are_summed_in_float32(tmp_path, mesh, reduced):
    """Those of four micro-batches are the float32 sum of the four alone: none is rounded to bfloat16 on the way."""
    network = make(save_model(tmp_path / "model", tie_word_embeddings=False), mesh, dtype="bfloat16")
    tokens = torch.randint(0, SMALL["vocab_size"], (4, 1, 17), generator=torch.Generator().manual_seed(2))
    sync = network.set_requires_gradient_sync if reduced == "step" else network.set_requires_all_reduce

    def gradients(numbers: range) -> list[torch.Tensor]:
        for number in numbers:
            sync(number == numbers[-1])
            network.window_losses(tokens[number, :, :-1], tokens[number, :, 1:], 0.3)[0].backward()
        found = [parameter.grad.full_tensor() for parameter in network.parameters()]
        for parameter in network.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            parameter.grad = None
        return found

    alone = [gradients(range(number, number + 1)) for number in range(4)]
    for whole, *parts in zip(gradients(range(4)), *alone, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=1e-6 * whole.abs().max().item())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """Too few and too many of them, before any memory is taken."""
    folder = save_model(tmp_path / "model", "qwen2", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())

    def refused(message: str, **changes) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=message):
            module.check_weights(folder)

    layers = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    refused(r"model.layers.3.self_attn.q_proj.weight of shape \[32, 32\] are missing", **layers)
    refused(r"model.embed_tokens.weight are of shape \[300, 32\], not \[320, 32\]", vocab_size=320)
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    refused(r"its model has no place for weights model.layers.2.*\n.*look at its config.json", **layers)
    refused("no place for weights model.layers.*_proj.bias", model_type="llama", attention_bias=False)
    refused("no place for weights lm_head.weight", tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config))
    first = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(first, folder / "copy.safetensors")
    refused("are in several files\n.*leave one set")
    (folder / "copy.safetensors").write_bytes(first.read_bytes()[:-10])
    refused("its safetensors cannot be read: .*\n.*copy the model again")
    (folder / "copy.safetensors").unlink()
    module.check_weights(folder)
    weights = load_file(first)
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name].to(torch.int8)}, first)
    refused(f"weights {name} are int8\n.*not quantized")


@pytest.mark.parametrize("rope", ["dynamic", "yarn", "linear"])
def test_models_whose_positions_are_scaled_are_taken(tmp_path, mesh, rope):
    scaled = {"rope_type": rope, "factor": 2.0, "rope_theta": 10_000.0}
    folder = save_model(tmp_path / "model", rope_parameters=scaled)
    ours, theirs = make(folder, mesh), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs, targets = batch()
    losses = torch.nn.functional.cross_entropy(theirs(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    total, _ = ours.window_losses(inputs, targets, 1 / (targets != IGNORE).sum().item())
    assert total.item() == pytest.approx(losses.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {}),
        ("granite", {"logits_scaling": 2.0}),
        ("cohere", {}),
        ("phi", {}),
        ("mixtral", {"num_local_experts": 2}),
        ("gpt2", {}),
    ],
)
def test_models_of_another_form_are_refused(tmp_path, kind, changes):
    folder = tmp_path / kind
    sizes = {"n_embd": 32, "n_head": 4} if kind == "gpt2" else SMALL
    AutoConfig.for_model(kind, **sizes, **changes).save_pretrained(folder)
    with pytest.raises(UserError, match="are not its last hidden state times lm_head\n.*Llama's form"):
        module.check_head(folder)
