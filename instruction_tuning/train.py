"""Instruction tuning: train a model on the assistant's turns of chat examples, with TRL.

Usage:
    python instruction_tuning/train.py --model runs/tower/checkpoint-5000 --data runs/sft_data/sft.jsonl \\
        --output_dir runs/sft --config systems/towerspeech_6b.yaml --sft.learning_rate 4e-5
    (several processes: torchrun --nproc_per_node 8 instruction_tuning/train.py ...)

Reads a model folder (extended by train_bpe_tokenizer/extend_model.py: chat template, <PAD>, speech_units.json)
and ``sft.jsonl`` (build_sft_data.py). Everything under ``sft`` goes on to trl.SFTConfig, over the ``DEFAULTS`` of
settings.py, which are the original's. Writes a model folder: model.safetensors, config, generation config (stops at
<|im_end|> and at the model's old EOS), tokenizer, speech_units.json, sft_config.json (the settings in full);
third-party output is in train.log. Weights train in float32 (bf16: true adds autocast on a GPU) and are saved in the
model's own dtype.

The loss is on the assistant's content and the <|im_end|> that closes it, nothing else. Ids are those of the chat
template, so what generation feeds (``apply_chat_template(..., add_generation_prompt=True)``) is their beginning.
What a message spells is text: ``<|im_end|>`` in it is trained on as these ten characters, not as the token.
A killed run goes on from its newest whole checkpoint-<step> folder; they are deleted at the end. A file named .stop in
the output folder asks it to write one and end (sbatch/job.sh does so before a time limit).
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instruction_tuning.checkpoints import is_last, newest_checkpoint, own_checkpoints
from instruction_tuning.dataset import Prepared, lengths, make_dataset, read_conversations
from towerspeech.command import quiet, run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, remove, write_json
from towerspeech.model_folder import NOT_SAVED, check_tokenizer_fits, copy_files
from towerspeech.processes import Processes
from towerspeech.stage import RUN_INFO, stage
from towerspeech.tokenizer import IM_END, read_metadata


# --- Before a model is loaded ---------------------------------------------------------------------
def load_tokenizer(model: Path):
    """The model folder's tokenizer, its EOS set to <|im_end|>, and its config; UserError unless it can chat."""
    from transformers import AutoConfig, AutoTokenizer

    made_by = "make the model folder with train_bpe_tokenizer/extend_model.py"
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no model or tokenizer that transformers can read: {error}", made_by) from None
    if not tokenizer.chat_template:
        raise UserError(f"{model} has no chat template", made_by)
    if IM_END not in tokenizer.get_vocab():
        raise UserError(f"{model}: its tokenizer has no {IM_END}", made_by)
    check_tokenizer_fits(model, len(tokenizer), config.vocab_size)
    tokenizer.eos_token = IM_END
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{model}: pad_token is {tokenizer.pad_token!r}; it must be one of its own", made_by)
    return tokenizer, config


def make_sft_config(settings: dict[str, Any], sft: dict[str, Any], tokenizer, config, output_dir: Path):
    """The trl.SFTConfig of settings with which a training step succeeds.

    Raises:
        UserError: It does not; names the settings of ``sft`` without which it would.
    """
    from instruction_tuning.settings import check_sharding, make_config
    from instruction_tuning.trainer import rehearse

    if problem := rehearse(settings, tokenizer):
        blamed = []
        for name in sft:
            others = {other: value for other, value in settings.items() if other != name}
            if not rehearse(others, tokenizer):
                blamed.append(f"sft.{name}")
        raise UserError(f"the Trainer refuses the sft settings: {problem}", f"mend {' or '.join(blamed) or 'them'}")
    try:
        sft_config = make_config(settings, output_dir)
        check_sharding(sft_config, config)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"sft.fsdp and sft.fsdp_config cannot be used: {error}", "mend them") from None
    return sft_config


def prepare(
    model: Path, data: Path, output_dir: Path, sft: dict[str, Any], seed: int = 0, show: bool = True
) -> Prepared:
    """Check settings, model folder and data, and tokenize; raises UserError, loads no weights."""
    check_exists(model, "give --model the folder of an extended model")
    check_exists(data, "run instruction_tuning/build_sft_data.py")
    from instruction_tuning.settings import check_settings

    settings = check_settings(sft)
    units = read_metadata(model)
    tokenizer, config = load_tokenizer(model)
    context = config.max_position_embeddings
    max_length = settings.get("max_length") or context
    if max_length > context:
        raise UserError(f"sft.max_length {max_length} exceeds the model's context of {context}", "lower it")
    settings = {**settings, "max_length": max_length, "seed": seed}
    sft_config = make_sft_config(settings, sft, tokenizer, config, output_dir)
    places, chats = read_conversations(data, units["num_units"], units["offset"])
    batch = sft_config.train_batch_size * sft_config.world_size
    if sft_config.dataloader_drop_last and len(chats) < batch:
        remedy = "set it to false, or lower sft.per_device_train_batch_size"
        raise UserError(f"{len(chats)} examples are no batch of {batch}: sft.dataloader_drop_last drops all", remedy)
    dataset = make_dataset(places, chats, tokenizer, max_length, show)
    return Prepared(settings, sft_config, tokenizer, config, dataset)


# --- Training -------------------------------------------------------------------------------------
def tune(model: Path, prepared: Prepared, checkpoint: Path | None, terminal, asked_to_stop: Callable[[], bool]):
    """Train from ``checkpoint``, or from the start; ``asked_to_stop`` is called after each step.

    Returns:
        The final weights, {name: tensor} in float32, all of them on the first process; or None if it was asked to
        stop before the last step.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from instruction_tuning.trainer import make_trainer

    finished = is_last(checkpoint)  # the Trainer would take one step more in the middle of an epoch
    weights = AutoModelForCausalLM.from_pretrained(
        checkpoint if finished else model, dtype=torch.float32, local_files_only=True
    )
    if finished:
        return weights.state_dict()
    trainer = make_trainer(weights, prepared, terminal, asked_to_stop)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def save_model(state_dict: dict, prepared: Prepared, source: Path, folder: Path) -> None:
    """Write the finished model folder: all weights, float32 in ``state_dict``, in the dtype of the trained model."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    tokenizer, config = prepared.tokenizer, prepared.config
    dtype = config.dtype or torch.float32
    generation = GenerationConfig.from_model_config(config)
    with contextlib.suppress(OSError):  # a model folder need not have one
        generation = GenerationConfig.from_pretrained(source, local_files_only=True)
    old = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    stops = dict.fromkeys([tokenizer.eos_token_id, *(stop for stop in old if stop is not None)])
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.eos_token_id, generation.pad_token_id = list(stops), tokenizer.pad_token_id
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict({name: weight.to("cpu", dtype) for name, weight in state_dict.items()}, assign=True)
    model.tie_weights()
    model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_files(source, folder, NOT_SAVED)
    write_json(folder / "sft_config.json", prepared.settings)


def train(
    model: Path,
    data: Path,
    output_dir: Path,
    sft: dict[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Tune a model on instructions.

    Args:
        model: Folder of the extended model and its tokenizer.
        data: File sft.jsonl of build_sft_data.py.
        output_dir: Folder for the tuned model; holds checkpoint-<step> folders meanwhile.
        sft: Settings of trl.SFTConfig, such as --sft.num_train_epochs 2; see DEFAULTS in settings.py.
        seed: Seed of the order of examples.
        overwrite: Replace the output of other arguments.
    """
    processes, sft = Processes(), sft or {}
    first = processes.rank == 0
    arguments = {"sft": sft, "seed": seed, "model": model, "data": data, "overwrite": overwrite}
    arguments["processes"] = processes.world  # they change the size of a batch
    if processes.world > 1:
        import torch

        processes.join("cuda" if torch.cuda.is_available() else "cpu")  # accelerate uses this group
    prepared = None
    if overwrite or not processes.agree((output_dir / RUN_INFO).is_file()):  # else the stage's answer is enough
        prepared = prepare(model, data, output_dir, sft, seed, show=first)
    with contextlib.ExitStack() as stack:
        begin = stage(__file__, output_dir, arguments, inputs=["model", "data"])
        work = processes.on_first(lambda: stack.enter_context(begin))
        if not processes.agree(work and work.done):
            tune_and_save(model, prepared, output_dir, processes, work)
    if first:  # only now is the model known to be whole
        for path in own_checkpoints(output_dir):
            remove(path)
    processes.leave()


def tune_and_save(model: Path, prepared: Prepared, output_dir: Path, processes: Processes, work) -> None:
    """Go on from the newest checkpoint to the finished model folder; ``work`` is the first process's stage."""
    first = processes.rank == 0
    checkpoint = processes.agree(newest_checkpoint(output_dir) if first else None)
    if first:
        print(json.dumps(prepared.settings, indent=1))
        print(f"{len(prepared.dataset):,} examples, {lengths(prepared.dataset).sum():,} tokens")
        if checkpoint:
            print(f"going on from {checkpoint}", flush=True)
    with quiet(output_dir / "train.log") as terminal:
        shown = terminal if first else None
        weights = tune(model, prepared, checkpoint, shown, lambda: processes.agree(first and work.asked_to_stop()))
    if weights is None:
        saved = processes.on_first(lambda: newest_checkpoint(output_dir))
        processes.stop(UserError(f"asked to stop: saved {saved}", "run this again, and it goes on from there"))
    if first:
        with work.publish() as folder:
            save_model(weights, prepared, model, folder)
        work.counts.update(examples=len(prepared.dataset), tokens=int(lengths(prepared.dataset).sum()))
        print(f"wrote {output_dir}")


if __name__ == "__main__":
    run(train)
