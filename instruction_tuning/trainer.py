"""TRL's SFTTrainer, so that a killed run can go on: our order of examples, checkpoints, stop and progress."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer

from instruction_tuning.checkpoints import mark_whole, own_checkpoints
from instruction_tuning.dataset import Prepared, lengths
from instruction_tuning.settings import make_config
from towerspeech.command import quiet
from towerspeech.errors import UserError, no_space
from towerspeech.files import remove


class Order(torch.utils.data.Sampler):
    """Indices of an epoch, from seed and epoch alone; the Trainer's own samplers draw from the global random state."""

    def __init__(self, trainer: SFTTrainer, sizes: list[int]):
        self.trainer, self.sizes = trainer, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        args = self.trainer.args
        generator = torch.Generator().manual_seed(args.seed + int(self.trainer.state.epoch))
        if args.train_sampling_strategy == "random":
            return iter(torch.randperm(len(self), generator=generator).tolist())
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return iter(get_length_grouped_indices(self.sizes, size, generator=generator))


class Trainer(SFTTrainer):
    """Takes examples in our Order, and deletes no checkpoint-* but those that it wrote."""

    checkpoint_limit: int | None = None

    def create_model_card(self, *args, **kwargs):
        pass  # would write a README.md into the output folder

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        target = folder / f"checkpoint-{self.state.global_step}"
        if target.is_file():
            raise UserError(f"{target} is a file, but a checkpoint must be written there", "move it away")
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes random states of its own
        if self.args.should_save:
            mark_whole(target, self.state.global_step, self.state.max_steps)
            if self.checkpoint_limit:
                for path in own_checkpoints(folder)[: -self.checkpoint_limit]:
                    remove(path)

    def _get_train_sampler(self, train_dataset=None):
        return Order(self, lengths(self.train_dataset).tolist())


class Watch(TrainerCallback):
    """Shows progress on a terminal, if there is one; asks after each step whether to write a checkpoint and end."""

    def __init__(self, terminal, asked_to_stop: Callable[[], bool]):
        self.terminal, self.asked_to_stop = terminal, asked_to_stop

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit=" steps",
            mininterval=1,
            file=self.terminal,
            disable=self.terminal is None,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if self.asked_to_stop():
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def make_trainer(
    model, prepared: Prepared, terminal=None, asked_to_stop: Callable[[], bool] = lambda: False
) -> Trainer:
    """The Trainer of a model in float32; ``asked_to_stop`` is called on all processes."""
    trainer = Trainer(
        model,
        prepared.sft_config,
        train_dataset=prepared.dataset,
        processing_class=prepared.tokenizer,
        callbacks=[Watch(terminal, asked_to_stop)],
    )
    trainer.checkpoint_limit = prepared.settings.get("save_total_limit")
    if terminal is None:  # one process alone prints what the Trainer logs
        trainer.remove_callback(PrinterCallback)
    return trainer


def rehearse(settings: dict[str, Any], tokenizer) -> str:
    """Train a tiny Llama for one step: what only the Trainer refuses, it refuses here, before weights are loaded.

    All settings are the real ones, but for the size of a batch, sharding (``check_sharding``) and reports, for which
    it is enough that they could be written. To be called before the real ``make_config``, which makes accelerate
    forget this run.

    Returns:
        What went wrong (an optimizer's package is not there, a schedule wants arguments), or "".
    """
    small = {"per_device_train_batch_size": 1, "max_steps": 10_000, "fsdp": None, "fsdp_config": None}
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with tempfile.TemporaryDirectory() as folder, quiet(Path(folder) / "log"):
        try:
            sft_config = make_config({**settings, **small}, Path(folder))
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
            rows = Dataset.from_dict({name: [[0, 1]] * 2 * sft_config.world_size for name in ("input_ids", "labels")})
            prepared = Prepared(settings, sft_config, tokenizer, model.config, rows)
            trainer = make_trainer(model, prepared, asked_to_stop=lambda: True)
            for callback in get_reporting_integration_callbacks(sft_config.report_to):
                trainer.remove_callback(callback)
            trainer.train()
        except Exception as error:
            if no_space(error, Path(folder)):
                raise
            return f"{error} ({type(error).__name__})"
    return ""
