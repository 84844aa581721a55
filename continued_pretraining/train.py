"""Continue pretraining on a mixture, with FSDP2 on a replicate x shard mesh.

Usage: torchrun --nproc_per_node 8 continued_pretraining/train.py --config systems/towerspeech_6b.yaml \\
           --model extended_model/ --mixture mixture/towerspeech_6b --output_dir runs/towerspeech_6b

Reads a Hugging Face model folder and a mixture; writes checkpoint-<step>/ (torch.distributed.checkpoint: fp32 weights
and AdamW states; run_info.json: step, losses, tokens of each source), train.log (JSON lines), its curves for
TensorBoard, and losses.png: the training loss by source, and that of the documents that the mixture holds out. Every
step is a pure function of the checkpoint before it, so a run that was killed goes on as if nothing had happened. A
checkpoint of one mesh can be continued on another one. Also runs without torchrun, and on CPU. A file named .stop in
the output folder asks it to write a checkpoint and end (sbatch/job.sh does so before a time limit).
"""

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, PositiveInt, restricted_number_type

from continued_pretraining.checkpoints import check_free, finished, load, remove_old, save
from continued_pretraining.checks import mesh_shape, read_config
from continued_pretraining.flops import flops_a_token
from continued_pretraining.losses import Losses, perplexity, validate
from continued_pretraining.meter import Meter
from continued_pretraining.packing import Mixture
from continued_pretraining.train_log import TrainLog, draw
from towerspeech.ahead import ahead
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import read_json
from towerspeech.model_folder import check_tokenizer_fits
from towerspeech.processes import Processes
from towerspeech.stage import RUN_INFO, stage

SPEED = (  # settings that change losses and checkpoints by rounding at most
    "micro_batch_size",
    "save_every",
    "log_every",
    "validate_every",
    "replicate",
    "shard",
    "activation_checkpointing",
    "compile",
    "reduce_gradients",
    "peak_tflops",
    "device",
)

# Numbers with which there is training; the command line refuses others.
AboveZero = restricted_number_type("AboveZero", float, [(">", 0), ("<", math.inf)])
ZeroOrMore = restricted_number_type("ZeroOrMore", float, [(">=", 0), ("<", math.inf)])
Beta = restricted_number_type("Beta", float, [(">=", 0), ("<", 1)])


@dataclass(frozen=True)
class Settings:
    """The command's flags.

    Args:
        model: Model folder with the tokenizer that made the mixture.
        mixture: Folder written by build_mixture.py.
        output_dir: Folder of this run.
        sequence_length: Number of tokens in a window.
        global_batch_size: Number of windows in an optimizer step, over all processes.
        micro_batch_size: Number of windows that a process computes at once.
        learning_rate: The learning rate at its peak.
        final_learning_rate_share: Where the learning rate ends, as a share of the peak.
        warmup_share: Share of all steps that warms up.
        decay: How the learning rate falls: half a cosine, or a line.
        decay_share: Share of all steps in which it falls, the last ones; before them it stays at the peak. With 1 it
            falls as soon as it has warmed up.
        beta1: The first beta of AdamW.
        beta2: The second beta of AdamW.
        weight_decay: AdamW's weight decay, on matrices.
        clip_norm: Largest norm of the gradient.
        keep_steps: Steps whose checkpoints are kept, besides the last.
        save_every: Steps between checkpoints to go on from; only the newest of them stays.
        log_every: Steps between lines in train.log.
        validate_every: Steps between validations on the mixture's held-out documents, if there are any. There is one
            before the first step, at each of keep_steps and at the end besides.
        replicate: Number of data-parallel copies of the model.
        shard: Number of processes that share one copy; default: all processes / replicate.
        dtype: Number format of the computation; weights, gradients' sums and optimizer states are fp32.
        activation_checkpointing: Which activations the backward pass computes again, to save memory: none of them; all
            of a layer (full); all but those of attention and of every second matrix product (selective).
        compile: Compile each layer with torch.compile.
        reduce_gradients: When the gradients are summed over the processes that share a copy of the model: with each
            micro-batch, or once a step, for which each of them holds all gradients of the copy.
        peak_tflops: What a device can do at most, in 1e12 floating-point operations a second; default: what flops.py
            knows of the GPU. The log has the share of it that is used.
        device: Where to train; auto takes CUDA if it is there.
        overwrite: Replace the output of a run with other arguments.
    """

    model: Path
    mixture: Path
    output_dir: Path
    sequence_length: PositiveInt = 2048
    global_batch_size: PositiveInt = 512
    micro_batch_size: PositiveInt = 1
    learning_rate: AboveZero = 2e-5
    final_learning_rate_share: ClosedUnitInterval = 0.1
    warmup_share: ClosedUnitInterval = 0.01
    decay: Literal["cosine", "linear"] = "cosine"
    decay_share: ClosedUnitInterval = 1.0
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    weight_decay: ZeroOrMore = 0.1
    clip_norm: AboveZero = 1.0
    keep_steps: list[int] | None = None
    save_every: PositiveInt = 250
    log_every: PositiveInt = 10
    validate_every: PositiveInt | None = None
    replicate: PositiveInt = 1
    shard: PositiveInt | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    compile: bool = False
    reduce_gradients: Literal["micro_batch", "step"] = "micro_batch"
    peak_tflops: AboveZero | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    overwrite: bool = False


# --- Checks ---------------------------------------------------------------------------------------
def check_inputs(model: Path, mixture: Path, sequence_length: int) -> None:
    """Refuse a model without weights, a mixture of another tokenizer, and windows beyond the model's context."""
    from towerspeech.tokenizer import tokenizer_hash

    if not importlib.util.find_spec("tensorboard"):
        raise UserError("the package tensorboard is not installed", "run bash install.sh")
    made_by = "make the model with train_bpe_tokenizer/extend_model.py"
    config = read_config(model, sequence_length)
    if not list(model.glob("*.safetensors")):
        raise UserError(f"{model} holds no safetensors weights", made_by)
    made_by = "make the mixture with data_mixture/build_mixture.py"
    manifest = read_json(mixture / "manifest.json", made_by, ["tokenizer_sha256", "vocab_size"])
    if manifest["tokenizer_sha256"] != tokenizer_hash(model):
        raise UserError(
            f"mixture {mixture} was tokenized with another tokenizer than that of {model}",
            f"run data_mixture/build_mixture.py with --tokenizer {model}",
        )
    check_tokenizer_fits(model, manifest["vocab_size"], config["vocab_size"])


def choose_device(device: str) -> str:
    """Cuda or cpu; UserError if cuda is asked for and not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but there is no CUDA GPU", "leave --device out")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


# --- The run --------------------------------------------------------------------------------------
class Run:
    """A training run, from its newest checkpoint to its last step; the same calls on all processes."""

    def __init__(self, settings: Settings, processes: Processes):
        """Raises UserError for settings that do not fit the machine or the processes."""
        self.settings = settings
        self.output_dir = settings.output_dir
        self.processes = processes
        self.first = processes.rank == 0
        self.work = None  # the first process's stage
        self.device = choose_device(settings.device)
        sizes = settings.global_batch_size, settings.micro_batch_size
        self.mesh = mesh_shape(settings.replicate, settings.shard, processes.world, *sizes)

    def read_mixture(self) -> None:
        """Read what is to be trained on; UserError if it is not whole, or a step to keep lies outside the run."""
        self.data = Mixture(self.settings.mixture, self.settings.sequence_length)
        self.steps = math.ceil(self.data.num_windows / self.settings.global_batch_size)
        self.kept_steps = sorted({*(self.settings.keep_steps or []), self.steps})
        if self.kept_steps[-1] > self.steps or self.kept_steps[0] < 1:
            problem = f"--keep_steps {self.settings.keep_steps} lies outside the run's 1..{self.steps} steps"
            raise UserError(problem, "change --keep_steps")
        self.held_out = Mixture(self.settings.mixture, self.settings.sequence_length, held_out=True)
        if self.settings.validate_every and not self.held_out.names:
            problem = f"--validate_every is given, but mixture {self.settings.mixture} holds no documents out"
            raise UserError(
                problem, "leave it out, or build the mixture with --validation_tokens above 0 and more data"
            )

    def go(self) -> None:
        """Train until the mixture's budget is spent, or until asked to stop."""
        self.check_places()
        self.load()
        if self.step == 0 and self.held_out.names:
            self.write_log({"step": 0, **self.validate()})
        while self.step < self.steps:
            norm = self.train_step()
            stopping = self.step < self.steps and self.processes.agree(self.first and self.work.asked_to_stop())
            saving = stopping or self.step in self.kept_steps or self.step % self.settings.save_every == 0
            if saving or self.validating or self.step % self.settings.log_every == 0:
                self.log_losses(norm)
            if saving:
                self.save()
            if stopping:
                self.stop()
        self.finish()

    @property
    def validating(self) -> bool:
        """Whether this step is one after which held-out documents are looked at."""
        every = self.settings.validate_every
        wanted = self.step in self.kept_steps or (every and self.step % every == 0)
        return bool(self.held_out.names and wanted)

    def check_places(self) -> None:
        """Refuse to begin if what is not ours lies where a checkpoint must be written."""
        regular = range(self.settings.save_every, self.steps, self.settings.save_every)
        for step in sorted({*self.kept_steps, *regular}):
            check_free(self.output_dir / f"checkpoint-{step}")

    def check_model(self, going_on: bool) -> None:
        """Refuse a model that cannot be trained, and weights that are not its own, unless they will not be read."""
        from continued_pretraining.network import check_head, check_weights

        check_head(self.settings.model)
        if not going_on:
            check_weights(self.settings.model)

    def load(self) -> None:
        """Load the model, and what the newest checkpoint says."""
        from torch.distributed.device_mesh import init_device_mesh
        from tqdm import tqdm

        from continued_pretraining.network import allocate, divide, empty_network, fill, recompute
        from continued_pretraining.optimizer import make_optimizer

        settings = self.settings
        checkpoints = self.processes.agree(finished(self.output_dir))
        self.processes.on_first(lambda: self.check_model(going_on=bool(checkpoints)))
        replicate, shard = self.mesh
        if self.first:
            print(
                f"{self.data.budgets.sum():,} tokens in {self.steps:,} steps of "
                f"{settings.global_batch_size} x {settings.sequence_length}; {self.processes.world} processes: "
                f"replicate {replicate} x shard {shard} on {self.device}, {settings.dtype}",
                flush=True,
            )
        mesh = init_device_mesh(self.device, self.mesh, mesh_dim_names=("replicate", "shard"))
        self.network = empty_network(settings.model)
        recompute(self.network, settings.activation_checkpointing)
        divide(self.network, mesh, settings.dtype, settings.compile)
        allocate(self.network, self.device)
        self.optimizer = make_optimizer(
            self.network, settings.learning_rate, (settings.beta1, settings.beta2), settings.weight_decay
        )
        self.step = 0
        if checkpoints:
            self.step = load(checkpoints[-1], self.network, self.optimizer)["step"]
            if self.first:
                print(f"going on after step {self.step:,} from {checkpoints[-1]}", flush=True)
        else:
            fill(self.network, settings.model)
        # Of a run that begins anew not even the line before the first step stays.
        self.log = TrainLog(self.output_dir, self.step or -1) if self.first else None
        self.batches = self.read_ahead()
        # Since the last line of the log:
        self.losses = Losses(self.data, self.device)
        flops = flops_a_token(self.network, settings.sequence_length)
        self.meter = Meter(self.device, settings.dtype, flops, settings.peak_tflops)
        self.progress = tqdm(
            initial=self.step,
            total=self.steps,
            unit=" steps",
            desc="train",
            mininterval=1,
            disable=not self.first,
        )

    def windows(self, step: int) -> tuple[range, range]:
        """The numbers of a step's windows, over all processes; and those of this one."""
        size = self.settings.global_batch_size
        every, share = range(step * size, (step + 1) * size), size // self.processes.world
        return every, every[self.processes.rank * share :][:share]

    def read_ahead(self) -> Iterator[list]:
        """Inputs and targets of each step that is left, read while those before are computed."""
        import torch

        def read(step: int) -> list:
            return [torch.from_numpy(part) for part in self.data.batch(self.windows(step)[1])]  # (windows, length)

        with ThreadPoolExecutor(1) as pool:
            yield from ahead(pool, read, range(self.step, self.steps), 1)

    def train_step(self):
        """Take one optimizer step; returns the gradient's norm before clipping."""
        import torch

        settings, world, micro = self.settings, self.processes.world, self.settings.micro_batch_size
        every, own = self.windows(self.step)
        num_targets = int(self.data.num_targets(every).sum())
        with self.meter.timed("data"):
            inputs, targets = next(self.batches)
        for start in range(0, len(own), micro):
            last = start + micro == len(own)
            if settings.reduce_gradients == "step":
                self.network.set_requires_gradient_sync(last)
            else:  # over the copies it is once a step all the same
                self.network.set_requires_all_reduce(last)
            part = slice(start, start + micro)
            x, y = inputs[part].to(self.device), targets[part].to(self.device)
            # FSDP averages over processes; we want the tokens' mean
            loss, by_window = self.network.window_losses(x, y, world / num_targets)
            loss.backward()
            self.losses.add(own[start : start + micro], by_window)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.end_step(self.step, every)
        self.progress.update()
        return norm

    def learning_rate(self) -> float:
        """That of the next step."""
        from continued_pretraining.optimizer import learning_rate_at

        settings = self.settings
        return learning_rate_at(
            self.step,
            self.steps,
            settings.learning_rate,
            warmup_steps=round(settings.warmup_share * self.steps),
            decay=settings.decay,
            decay_steps=round(settings.decay_share * self.steps),
            final_share=settings.final_learning_rate_share,
        )

    def validate(self) -> dict[str, dict[str, float]]:
        """Loss and perplexity of the held-out documents, by source; UserError if one is not finite."""
        with self.meter.timed("validation"):
            micro = self.settings.micro_batch_size
            found = validate(self.network, self.held_out, micro, self.processes, self.device)
        if bad := [name for name, loss in found.items() if not math.isfinite(loss)]:
            problem = f"at step {self.step} the loss of the held-out documents of {', '.join(bad)} is not finite"
            raise UserError(problem, "look at the model's weights and at these documents")
        return {"validation": found, "perplexity": {name: perplexity(loss) for name, loss in found.items()}}

    def log_losses(self, norm) -> None:
        """Write a line of the log, for the steps since the last one.

        Raises:
            UserError: Loss or norm is not finite; it must never reach a checkpoint.
        """
        mean_loss, by_source, bad = self.losses.means()
        norm = norm.full_tensor().item()
        if not (math.isfinite(mean_loss) and math.isfinite(norm)):
            of = f" (first of {', '.join(bad)})" if bad else ""
            raise UserError(
                f"at step {self.step} the loss is {mean_loss}{of}, the gradient's norm {norm}",
                "lower --learning_rate, then run this again with another --output_dir",
            )
        self.info = {
            "step": self.step,
            "loss": mean_loss,
            "losses": by_source,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **(self.validate() if self.validating else {}),
        }
        measured = self.meter.read(int(self.losses.targets.sum()))
        self.progress.set_postfix(loss=f"{mean_loss:.3f}", tokens_per_s=f"{measured['tokens_per_s']:,}")
        self.write_log({**self.info, "gradient_norm": norm, **measured})
        self.losses.clear()

    def write_log(self, row: dict) -> None:
        """Write a line of the log; what is measured counts from here on."""
        if self.first:
            self.log.write(row)
        self.meter.restart()

    def save(self) -> None:
        """Publish a checkpoint, and remove those that it replaces."""
        facts = {**self.info, "tokens": self.data.tokens_seen(self.step * self.settings.global_batch_size)}
        facts["plan"] = self.work.request if self.first else None
        target = self.output_dir / f"checkpoint-{self.step}"
        with self.meter.timed("saving"):
            save(target, self.network, self.optimizer, {**facts, "outputs": facts}, self.processes)
        if self.first:
            remove_old(self.output_dir, self.kept_steps)

    def stop(self) -> None:
        """End before the last step."""
        self.progress.close()
        problem = f"asked to stop: saved {self.output_dir}/checkpoint-{self.step} of {self.steps:,} steps"
        self.processes.stop(UserError(problem, "run this again, and it goes on from there"))

    def finish(self) -> None:
        """Say what has been done."""
        self.progress.close()
        if self.first:
            remove_old(self.output_dir, self.kept_steps)  # also what a kill after the last save left
            with self.work.publish("losses.png") as path:
                draw(self.output_dir / "train.log", path)
            self.work.counts.update(steps=self.steps, tokens=self.data.tokens_seen(self.data.num_windows))
            last = f"{self.output_dir}/checkpoint-{self.steps}"
            print(f"trained on {self.data.budgets.sum():,} tokens: {last}", flush=True)


def train(settings: Settings) -> None:
    """Train until the mixture's budget is spent."""
    check_inputs(settings.model, settings.mixture, settings.sequence_length)
    processes = Processes()
    training = Run(settings, processes)
    if settings.overwrite or not (settings.output_dir / RUN_INFO).is_file():  # else the stage's answer is enough
        training.read_mixture()  # before a finished run is replaced
    processes.join(training.device)
    with contextlib.ExitStack() as stack:
        begin = stage(__file__, settings.output_dir, vars(settings), inputs=["model", "mixture"], ignore=SPEED)
        training.work = processes.on_first(lambda: stack.enter_context(begin))
        if not processes.agree(training.first and training.work.done):
            training.go()
    processes.leave()


if __name__ == "__main__":
    run(train, Settings)
