"""The network that is trained: made without weights, divided over the processes, and filled with what each needs."""

import types
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from continued_pretraining.cross_entropy import cross_entropy
from towerspeech.errors import UserError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MADE_BY = "copy the model again, or make it with train_bpe_tokenizer/extend_model.py"


def window_losses(network, inputs, targets, scale: float):
    """The sum of all losses times ``scale``, to be differentiated; and the sum over each window, (windows,) float32.

    ``inputs`` and ``targets`` are (windows, length) int64; targets that are IGNORE count nothing.
    """
    hidden = network.model(input_ids=inputs, use_cache=False).last_hidden_state  # (windows, length, width)
    total, losses = cross_entropy(hidden.flatten(0, 1), network.lm_head.weight, targets.flatten(), scale)
    return total, losses.view(targets.shape).sum(1)


def empty_network(folder: Path):
    """The model of a folder in float32, without weights: its parameters are on the meta device."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):  # buffers, such as those of the positions, are computed
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    network.tie_weights()  # without memory each got its own; from here on FSDP keeps them one
    return network.train()


# --- Checks, before any memory is taken -----------------------------------------------------------
def check_head(folder: Path) -> None:
    """Refuse a model whose logits are not its last hidden state times lm_head, as ``window_losses`` takes it."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        hidden = torch.zeros(1, 2, network.config.get_text_config().hidden_size)
        tokens = torch.zeros((1, 2), dtype=torch.int64)
    layers = getattr(getattr(network, "model", None), "layers", None)
    head = getattr(network, "lm_head", None)
    straight = layers is not None and isinstance(head, torch.nn.Linear) and head.bias is None
    if straight:
        seen = {}
        head.register_forward_hook(lambda module, given, output: seen.update(given=given[0], logits=output))
        network.model.forward = lambda *args, **options: BaseModelOutputWithPast(last_hidden_state=hidden)
        try:
            logits = network(input_ids=tokens, use_cache=False).logits
            straight = logits is seen["logits"] and (seen["given"] is hidden or seen["given"]._base is hidden)
        except (AttributeError, RuntimeError, TypeError):  # it wants more than a hidden state, as mixtures of experts
            straight = False
    if not straight:
        problem = f"{folder}: logits of {type(network).__name__} are not its last hidden state times lm_head"
        raise UserError(problem, "train a model of Llama's form")


def check_weights(folder: Path) -> None:
    """Refuse safetensors that are not exactly the network's weights, by their headers.

    Raises:
        UserError: Files cannot be read; weights are missing, too many, there twice, of another shape, or not floats.
    """
    import torch.distributed.checkpoint as dcp

    try:
        there = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise UserError(f"{folder}: its safetensors cannot be read: {error}", MADE_BY) from error
    wanted = dict(empty_network(folder).named_parameters())  # those that are tied once
    for name, weight in wanted.items():
        shape = list(weight.shape)
        if name not in there:
            raise UserError(f"{folder}: weights {name} of shape {shape} are missing", MADE_BY)
        if list(there[name].size) != shape:
            raise UserError(f"{folder}: weights {name} are of shape {list(there[name].size)}, not {shape}", MADE_BY)
        if len(there[name].chunks) > 1:
            raise UserError(f"{folder}: weights {name} are in several files", "leave one set of safetensors there")
        if there[name].properties.dtype not in FLOATS:
            kind = str(there[name].properties.dtype).removeprefix("torch.")
            raise UserError(f"{folder}: weights {name} are {kind}", "name a model that is not quantized")
    if more := [name for name in there if name not in wanted and not name.endswith("rotary_emb.inv_freq")]:
        problem = f"{folder}: its model has no place for weights {more[0]}"
        raise UserError(problem, f"look at its config.json (layers, biases, tied embeddings), or {MADE_BY}")


def recompute(network, what: str) -> None:
    """Choose what the backward pass computes again, layer by layer: "none", "full" or "selective".

    Selective is torchtitan's choice: what attention and every second matrix product give is kept, as they cost most.
    """
    if what == "none":
        return
    options: dict = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(_keep_costly())
    network.gradient_checkpointing_enable(options)


def _keep_costly():
    """A policy for one layer's forward and backward pass."""
    products = {"forward": 0, "again": 0}

    def policy(context, operation, *given, **options):
        if "scaled_dot_product" in operation.name():
            return CheckpointPolicy.MUST_SAVE
        if operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            products["again" if context.is_recompute else "forward"] += 1
            if products["again" if context.is_recompute else "forward"] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def divide(network, mesh, dtype: str, compiled: bool) -> None:
    """Divide it over the processes of a mesh (replicate, shard), layer by layer; computation is in ``dtype``."""
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in network.model.layers:
        if compiled:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    network.window_losses = types.MethodType(window_losses, network)
    register_fsdp_forward_method(network, "window_losses")


def allocate(network, device: str) -> None:
    """Give the parameters memory on ``device``, of this process's shards alone; what they hold is undefined."""
    buffers = dict(network.named_buffers(remove_duplicate=False))
    network.to_empty(device=device)
    for name, buffer in buffers.items():
        network.get_buffer(name).copy_(buffer)


def fill(network, folder: Path) -> None:
    """Read this process's shards of a folder's safetensors; all processes call it together."""
    import torch.distributed.checkpoint as dcp

    dcp.load(dict(network.named_parameters()), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
