"""What a process of a training run has in memory at its peak, found by running its steps on tensors without values.

PyTorch's fake tensors have a shape, a type and a storage, but take no memory; its fake process group sends nothing. So
the trainer's own functions (network.py, cross_entropy.py, optimizer.py) and FSDP2 run here as they do in train.py, as
one of any number of processes, and all storages that they make are counted while they live. Attention is the CPU's
flash kernel, which keeps what the GPU's does: queries, keys, values, output and the logarithm of the sums.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from continued_pretraining import network as networks
from continued_pretraining.flops import flops_a_token
from continued_pretraining.optimizer import make_optimizer

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer states"
ACTIVATIONS, LOSS, GATHERED, BACKWARD = "activations", "loss", "gathered weights", "backward pass"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS, GATHERED, BACKWARD)


@dataclass
class Storage:
    """A storage that lives: its bytes, and what it is for."""

    size: int
    kind: str


class Counter(TorchDispatchMode):
    """Counts the storages that operations make, while they live.

    Attributes:
        kind: What new storages are for.
        at_peak: The storages of the moment at which there was most, each with its bytes then.
    """

    def __init__(self):
        super().__init__()
        self.kind = WEIGHTS
        self.known: dict[int, Storage] = {}  # by the id of the storage's object
        self.total = 0
        self.begin()

    def begin(self) -> None:
        """Look for the peak from here on."""
        self.peak, self.at_peak = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                self.see(own.untyped_storage())
        return made

    def see(self, storage, kind: str | None = None) -> None:
        """Count a storage, or its new size; with ``kind`` also say what it is for."""
        name = id(storage)
        if name not in self.known:
            self.known[name] = Storage(0, self.kind)
            weakref.finalize(storage, self.forget, name)
        entry = self.known[name]
        entry.kind = kind or entry.kind
        self.total += storage.nbytes() - entry.size
        entry.size = storage.nbytes()
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, [(each, each.size) for each in self.known.values()]

    def forget(self, name: int) -> None:
        """Count a storage no longer."""
        self.total -= self.known.pop(name).size

    def survived(self, kind: str) -> None:
        """What was made as the kind of now, and lives on, is for this."""
        for each in self.known.values():
            if each.kind == self.kind:
                each.kind = kind

    def by_kind(self) -> dict[str, int]:
        """Bytes of each of KINDS at the peak."""
        return {kind: sum(size for each, size in self.at_peak if each.kind == kind) for kind in KINDS}


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """A counter that also sees storages change their size: so FSDP frees and makes gathered weights."""
    counter, resize = Counter(), torch.UntypedStorage.resize_

    def resize_and_see(storage, size):
        resize(storage, size)
        counter.see(storage, GATHERED)

    torch.UntypedStorage.resize_ = resize_and_see
    try:
        with counter:
            yield counter
    finally:
        torch.UntypedStorage.resize_ = resize


@contextlib.contextmanager
def fake_mesh(replicate: int, shard: int) -> Iterator:
    """A mesh of which this process is the first one, and the others are not there: its collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=replicate * shard)
    try:
        yield init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard"))
    finally:
        dist.destroy_process_group()


class Rehearsal:
    """A process of train.py between its first step and the second one; made by ``rehearse``.

    Attributes:
        parameters: Numbers that the model has, of which those that are tied count once.
    """

    def __init__(self, network, counter: Counter, sequence_length: int, reduce_gradients: str):
        self.network, self.counter, self.sequence_length = network, counter, sequence_length
        self.reduce_gradients = reduce_gradients
        network.model.register_forward_hook(self.begin_loss)
        networks.allocate(network, "cpu")
        self.parameters = sum(weight.numel() for weight in network.parameters())
        counter.kind = OPTIMIZER
        self.optimizer = make_optimizer(network, 1e-5, (0.9, 0.95), 0.1)
        for weight in network.parameters():
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.micro_batch(1, last=False)  # after it all gathered weights have been resized once
        counter.survived(GRADIENTS)
        self.gradients_wait = True

    def begin_loss(self, *_) -> None:
        """The layers have been computed."""
        self.counter.kind = LOSS

    def micro_batch(self, size: int, last: bool) -> None:
        """As in train.py's step."""
        if self.reduce_gradients == "step":
            self.network.set_requires_gradient_sync(last)
        else:
            self.network.set_requires_all_reduce(last)
        tokens = torch.zeros((size, self.sequence_length), dtype=torch.int64)
        self.counter.kind = ACTIVATIONS
        loss = self.network.window_losses(tokens, tokens, 1.0)[0]
        self.counter.kind = BACKWARD
        loss.backward()

    def peak(self, micro_batch_size: int, accumulating: bool) -> dict[str, int]:
        """Bytes of each of KINDS at the moment of a step at which they are most together.

        Clipping and AdamW's step, which follow, need less: no activations, no gathered weights.

        Args:
            micro_batch_size: Windows at once.
            accumulating: Whether a step has several micro-batches, so that gradients wait from the first one on.
        """
        if accumulating != self.gradients_wait:
            self.micro_batch(1, last=not accumulating)
            self.counter.survived(GRADIENTS)
            self.optimizer.zero_grad(set_to_none=True)  # of those that wait for a last micro-batch it knows nothing
            self.gradients_wait = accumulating
        self.counter.begin()
        self.micro_batch(micro_batch_size, last=not accumulating)
        if accumulating:  # what is made on top of the gradients that wait is not a gradient as well
            found = self.counter.by_kind()
            self.counter.survived(GRADIENTS)
        else:
            self.counter.survived(GRADIENTS)
            found = self.counter.by_kind()
            self.optimizer.zero_grad(set_to_none=True)
        return found


@dataclass(frozen=True)
class Kind:
    """The kind of run, as train.py's flags of these names say it.

    Attributes:
        model: Folder with a config.json.
        mesh: Copies of the model, and processes that share each.
        sequence_length: Tokens in a window.
        dtype: Number format of the computation.
        activation_checkpointing: What the backward pass computes again.
        reduce_gradients: When gradients are summed over the processes that share a copy.
    """

    model: Path
    mesh: tuple[int, int]
    sequence_length: int
    dtype: str
    activation_checkpointing: str
    reduce_gradients: str = "micro_batch"


@contextlib.contextmanager
def rehearse(kind: Kind) -> Iterator[Rehearsal]:
    """A process whose memory can be asked for. There may be one at a time, and no process group besides.

    Raises:
        UserError: The model is not of Llama's form.
    """
    networks.check_head(kind.model)
    with fake_mesh(*kind.mesh) as device_mesh, FakeTensorMode():
        network = networks.empty_network(kind.model)
        networks.recompute(network, kind.activation_checkpointing)
        networks.divide(network, device_mesh, kind.dtype, compiled=False)
        with counting() as counter:  # what is on the meta device takes no memory: it is made before
            yield Rehearsal(network, counter, kind.sequence_length, kind.reduce_gradients)


# --- What a plan asks -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Needs:
    """What each process of a run needs.

    Attributes:
        largest: The largest micro-batch that fits, 0 if none does.
        micro: The micro-batch, in windows: that which is given, else the largest, and 1 if none fits.
        peak: Bytes of each of KINDS with it.
        parameters: As Rehearsal's.
        flops: Operations for a token.
    """

    largest: int
    micro: int
    peak: dict[str, int]
    parameters: int
    flops: int


def find_needs(kind: Kind, sizes: list[int], micro_batch_size: int | None, usable: float) -> Needs:
    """Rehearse steps with micro-batches of some sizes.

    Args:
        kind: The kind of run.
        sizes: Micro-batches that there may be, in order; the last one is all windows of a step.
        micro_batch_size: The micro-batch that is wanted; default: the largest that fits.
        usable: Bytes that a process may have.
    """
    peaks: dict[int, dict[str, int]] = {}
    with rehearse(kind) as process, tqdm(desc="rehearse", unit=" micro-batches", leave=False) as progress:

        def needed(size: int) -> int:
            if size not in peaks:
                peaks[size] = process.peak(size, accumulating=size < sizes[-1])
                progress.update()
            return sum(peaks[size].values())

        largest = largest_fitting(sizes[:-1], lambda size: needed(size) <= usable)
        if needed(sizes[-1]) <= usable:  # all at once: no gradients wait, so it may fit where less does not
            largest = sizes[-1]
        micro = micro_batch_size or largest or 1
        needed(micro)
        flops = flops_a_token(process.network, kind.sequence_length)
    return Needs(largest, micro, peaks[micro], process.parameters, flops)


def largest_fitting(sizes: list[int], fits: Callable[[int], bool]) -> int:
    """The largest of ``sizes`` that fits, 0 if none does; if one does not, larger ones do not."""
    low, high = 0, len(sizes)  # those before low fit, those from high on do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else 0
