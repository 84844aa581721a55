"""The network that is trained, beside transformers' own model of the same folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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


def make(folder: Path, mesh, what: str = "none", compiled: bool = False):
    network = module.empty_network(folder)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert (network.lm_head.weight is network.model.embed_tokens.weight) == network.config.tie_word_embeddings
    module.recompute(network, what)
    module.divide(network, mesh, "float32", compiled)
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


def test_weights_that_do_not_fit_are_refused(tmp_path, mesh):
    folder = save_model(tmp_path / "model", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())

    def refused(message: str, **changes) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=message):
            make(folder, mesh)

    refused(r"model.layers.3.self_attn.q_proj.weight of shape \[32, 32\] are missing", num_hidden_layers=4)
    refused(r"model.embed_tokens.weight are of shape \[300, 32\], not \[320, 32\]", vocab_size=320)
    first = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(first, folder / "copy.safetensors")
    refused("are in several files\n.*leave one set")
    (folder / "copy.safetensors").write_bytes(first.read_bytes()[:-10])
    refused("its safetensors cannot be read: .*\n.*copy the model again")
    (folder / "copy.safetensors").unlink()
    make(folder, mesh)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gemma2", {}), ("granite", {"logits_scaling": 2.0}), ("cohere", {}), ("phi", {})],
)
def test_models_that_change_their_logits_are_refused(tmp_path, kind, changes):
    folder = tmp_path / kind
    AutoConfig.for_model(kind, **SMALL, **changes).save_pretrained(folder)
    with pytest.raises(UserError, match="changes its logits after lm_head.*\n.*Llama's form"):
        module.empty_network(folder)
