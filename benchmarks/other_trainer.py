"""Train with transformers' Trainer on the windows that train.py trains on: the other side of bench_training.py.

Usage: torchrun --nproc_per_node 2 benchmarks/other_trainer.py --model model/ --mixture mixture/ --output_dir out/ \\
           --sequence_length 512 --batch_size 8 --gradient_checkpointing false

Writes trainer.json: the seconds from the end of each step to that of the next, the loss of each step, and the peak of
resident memory over the processes. As for train.py in that benchmark, everything is float32, the learning rate is
constant, and nothing is saved.
"""

import json
import os
import resource
import time
from pathlib import Path

import numpy as np

from continued_pretraining.packing import IGNORE, Mixture
from towerspeech.command import run


class Windows:
    """A mixture's windows in their order, as transformers' models take them: each label is that of the token before.

    So that they have all targets of a window, they are a token longer; the last one's logits are not used.
    """

    def __init__(self, data: Mixture):
        self.data = data

    def __len__(self) -> int:
        return self.data.num_windows

    def __getitem__(self, number: int) -> dict:
        inputs, targets = self.data.window(number)
        return {"input_ids": np.append(inputs, targets[-1]), "labels": np.append(IGNORE, targets)}


def train_with_trainer(
    model: Path, mixture: Path, output_dir: Path, sequence_length: int, batch_size: int, gradient_checkpointing: bool
) -> None:
    """Train on a mixture once.

    Args:
        model: Model folder.
        mixture: Folder written by build_mixture.py.
        output_dir: New folder.
        sequence_length: Number of tokens in a window.
        batch_size: Number of windows in a step, over all processes.
        gradient_checkpointing: Recompute activations to save memory.
    """
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    ends, losses = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.monotonic())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    settings = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=batch_size // int(os.environ.get("WORLD_SIZE", "1")),
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        gradient_checkpointing=gradient_checkpointing,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    trainer = Trainer(network, settings, train_dataset=Windows(Mixture(mixture, sequence_length)), callbacks=[Clock()])
    trainer.train()
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if trainer.is_world_process_zero():
        seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
        found = {"seconds": seconds, "losses": losses, "memory_gb": peak.item()}
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "trainer.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    run(train_with_trainer)
