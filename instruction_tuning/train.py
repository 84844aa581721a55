"""Instruction tuning: train a model on the assistant's turns of chat examples, with TRL.

Usage:
    python instruction_tuning/train.py --model runs/tower/checkpoint-5000 --data runs/sft_data/sft.jsonl \\
        --output_dir runs/sft --config instruction_tuning/configs/towerspeech_7b.yaml --sft.learning_rate 4e-5
    (several processes: torchrun --nproc_per_node 8 instruction_tuning/train.py ...)

Reads a model folder (extended by train_bpe_tokenizer/extend_model.py: chat template, <PAD>, speech_units.json)
and ``sft.jsonl`` (build_sft_data.py). Everything under ``sft`` goes on to trl.SFTConfig; ``DEFAULTS`` are the
original's. Writes a model folder: model.safetensors, config, generation config (stops at <|im_end|> and at the
model's old EOS), tokenizer, speech_units.json, sft_config.json (the settings in full); third-party output is in
train.log. Weights train in float32 (bf16: true adds autocast on a GPU) and are saved in the model's own dtype.

The loss is on the assistant's content and the <|im_end|> that closes it, nothing else. Ids are those of the chat
template, so what generation feeds (``apply_chat_template(..., add_generation_prompt=True)``) is their beginning.
What a message spells is text: ``<|im_end|>`` in it is trained on as these ten characters, not as the token.
A killed run goes on from its newest whole checkpoint-<step> folder; they are deleted at the end. A file named .stop in
the output folder asks it to write one and end (sbatch/job.sh does so before a time limit).
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from towerspeech.command import UserError, no_space, quiet, run
from towerspeech.files import check_exists, remove, write_json
from towerspeech.outside_text import check_units, marker, text_tokenizer
from towerspeech.records import check_messages, iter_jsonl
from towerspeech.stage import RUN_INFO, stage
from towerspeech.tokenizer import IM_END, read_metadata

IGNORED = -100  # the label of a token without loss
ENCODE_ROWS = 1000  # conversations tokenized at once
DEFAULTS = {  # the first five are the original's
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 8,
    "learning_rate": 8e-5,
    "num_train_epochs": 1,
    "warmup_steps": 20,
    "bf16": False,  # SFTConfig's own default is bf16, on a CPU too
    "save_steps": 500,
    "save_total_limit": 2,  # one may be half deleted or half written when a run is killed
    "report_to": "none",
}
PACKED = "packed examples see one another unless the attention kernel is told; it is not offered"
MASKED = "train.py labels the assistant's tokens itself"
CHECKPOINTED = "train.py resumes by itself, from whole checkpoints"
COMPILED = "nearly every batch has another length, for which the model would be compiled anew"
ENGINES = "models are sharded with sft.fsdp, whose checkpoints train.py can go on from"
NO_EVALUATION = "train.py has no evaluation set; use generate/ and results/"
OURS = {  # SFTConfig fields that train.py decides
    **dict.fromkeys(("packing", "packing_strategy", "padding_free", "eval_packing"), PACKED),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "chat_template_path", "dataset_kwargs"), MASKED),
    **dict.fromkeys(("eos_token", "pad_token", "truncation_mode", "dataset_text_field", "shuffle_dataset"), MASKED),
    **dict.fromkeys(("resume_from_checkpoint", "ignore_data_skip", "save_only_model"), CHECKPOINTED),
    **dict.fromkeys(("do_eval", "eval_strategy", "eval_on_start", "load_best_model_at_end"), NO_EVALUATION),
    **dict.fromkeys(("seed", "data_seed"), "use --seed"),
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), COMPILED),
    **dict.fromkeys(("deepspeed", "parallelism_config"), ENGINES),
    "output_dir": "use --output_dir",
    "model_init_kwargs": "the model is loaded from --model, in float32",
    "trust_remote_code": "models that bring their own code are not run",
    "push_to_hub": "upload the finished folder yourself",
    "disable_tqdm": "progress is always shown",
    "router_aux_loss_coef": "it is for models with experts, which Llama has not",
}
POSITIVE = (  # the Trainer divides by these numbers, or takes them for something else, unless they are above 0
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "learning_rate"),
    *("logging_steps", "save_steps", "save_total_limit", "max_length", "pad_to_multiple_of"),
)
NOT_NEGATIVE = ("max_grad_norm", "warmup_steps", "weight_decay", "label_smoothing_factor", "neftune_noise_alpha")
FSDP_CONFIG = {  # what transformers reads (the last three it sets itself); it passes other names over
    *("version", "transformer_layer_cls_to_wrap", "min_num_params", "auto_wrap_policy", "cpu_offload"),
    *("reshard_after_forward", "activation_checkpointing", "state_dict_type", "cpu_ram_efficient_loading"),
    *("forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers"),
    *("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"),
}


# --- Settings -------------------------------------------------------------------------------------
def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation; True for those that are not made of plain types."""
    allowed = set(typing.get_args(hint) or [hint])
    if not allowed <= {bool, int, float, str, type(None)}:
        return True
    return type(value) in allowed or (type(value) is int and float in allowed)


def check_number(name: str, value: Any) -> None:
    """Raise UserError for a number that the Trainer would not refuse in so many words, or only after loading."""
    try:
        json.dumps(value, allow_nan=False)  # also what lists and dicts hold
    except ValueError:
        raise UserError(f"sft.{name} is {value!r}, which is not finite", "give a number") from None
    if type(value) not in (int, float):
        return
    if name in POSITIVE and value <= 0:
        raise UserError(f"sft.{name} is {value}", "give more than 0")
    if name in NOT_NEGATIVE and value < 0:
        raise UserError(f"sft.{name} is {value}", "give 0 or more")
    if name == "max_steps" and value < 1 and value != -1:
        raise UserError(f"sft.max_steps is {value}", "give 1 or more, or -1 to go by sft.num_train_epochs")


def check_settings(sft: dict[str, Any]) -> dict[str, Any]:
    """Check the ``sft`` block against SFTConfig; returns it with our defaults filled in.

    Raises:
        UserError: A key that SFTConfig does not know (names near ones) or that train.py decides, a value of
            another type, a number that is not finite or too small, or half precision without a GPU.
    """
    import torch
    from trl import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    names = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    for name, value in sft.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see trl.SFTConfig for the names"
            raise UserError(f"sft.{name} is no setting of trl.SFTConfig", remedy)
        if name in OURS:
            raise UserError(f"sft.{name} cannot be set: {OURS[name]}", f"remove sft.{name}")
        if not fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", str(hints[name]))
            raise UserError(f"sft.{name} is {value!r}, but {wanted} is wanted", "mend the value")
        check_number(name, value)
    settings = {**DEFAULTS, **sft}
    for name in ("bf16", "fp16"):
        if settings.get(name) and not torch.cuda.is_available():
            raise UserError(f"sft.{name} is true, but there is no CUDA GPU", f"set --sft.{name} false")
    if settings.get("train_sampling_strategy", "random") not in ("random", "group_by_length"):
        raise UserError("sft.train_sampling_strategy is neither random nor group_by_length", "use one of these")
    settings.setdefault("use_cpu", not torch.cuda.is_available())  # else processes without a GPU would not be joined
    settings.setdefault("dataloader_pin_memory", not settings["use_cpu"])
    return settings


def make_config(settings: dict[str, Any], output_dir: Path):
    """The trl.SFTConfig of checked settings; raises what it likes."""
    from trl import SFTConfig

    ours = {
        "output_dir": str(output_dir),
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # our ids and labels, untouched
        "save_total_limit": None,  # make_trainer sees to it: the Trainer would delete checkpoint-4-backup, too
    }
    # SFTConfig and the Trainer write into the dicts that they are given.
    config = SFTConfig(**copy.deepcopy({**settings, **ours}))
    if config.save_strategy not in ("steps", "epoch"):
        raise ValueError(f"sft.save_strategy {config.save_strategy.value}, but a killed run must be able to go on")
    return config


def rehearse(settings: dict[str, Any], tokenizer) -> str:
    """Train a tiny Llama for one step: what only the Trainer refuses, it refuses here, before weights are loaded.

    All settings are the real ones, but for the size of a batch, sharding (``check_sharding``) and reports, for which
    it is enough that they could be written. To be called before the real ``make_config``, which makes accelerate
    forget this run.

    Returns:
        What went wrong (an optimizer's package is not there, a schedule wants arguments), or "".
    """
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations import get_reporting_integration_callbacks

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


def check_sharding(sft_config, config) -> None:
    """Raise for FSDP settings that would be refused, or passed over, once the model is loaded."""
    import torch
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import AutoModelForCausalLM

    if not sft_config.fsdp:
        if sft_config.fsdp_config:
            raise UserError("sft.fsdp_config is set, but sft.fsdp is not", "set --sft.fsdp full_shard, say")
        return
    if unknown := sorted({*sft_config.fsdp_config} - FSDP_CONFIG):
        raise UserError(f"sft.fsdp_config.{unknown[0]} is no setting of transformers' FSDP", "see its documentation")
    plugin = FullyShardedDataParallelPlugin(**sft_config.fsdp_plugin_args)
    with torch.device("meta"):
        plugin.set_auto_wrap_policy(AutoModelForCausalLM.from_config(config))
    if plugin.activation_checkpointing and sft_config.gradient_checkpointing:
        raise ValueError("fsdp_config.activation_checkpointing and gradient_checkpointing are both true")
    if sft_config.world_size == 1:
        raise UserError("sft.fsdp shards over processes, but there is only one", "start with torchrun, or unset it")


# --- Inputs ---------------------------------------------------------------------------------------
def load_tokenizer(model: Path):
    """Load the model folder's tokenizer and check that it can chat and speaks units.

    Returns:
        The tokenizer, its EOS set to <|im_end|>, and the model's config.
    """
    from transformers import AutoConfig, AutoTokenizer

    made_by = "make the model folder with train_bpe_tokenizer/extend_model.py"
    check_exists(model / "config.json", made_by)
    read_metadata(model)
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: no model or tokenizer that transformers can read: {error}", made_by) from None
    if not tokenizer.chat_template:
        raise UserError(f"{model} has no chat template", made_by)
    if IM_END not in tokenizer.get_vocab():
        raise UserError(f"{model}: its tokenizer has no {IM_END}", made_by)
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"{model}: {len(tokenizer)} tokens, but {config.vocab_size} embedding rows", made_by)
    tokenizer.eos_token = IM_END
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{model}: pad_token is {tokenizer.pad_token!r}; it must be one of its own", made_by)
    return tokenizer, config


def read_conversations(data: Path, num_units: int, offset: int) -> tuple[list[str], list[list[dict]]]:
    """Read sft.jsonl and check each row's turns.

    Returns:
        Of each row, ``file:line (id)``, and its turns.

    Raises:
        UserError: A row is malformed, its roles do not alternate from user to assistant, or its text holds units
            that are not the tokenizer's, or stand where no speech does; names the row.
    """
    places, chats = [], []
    for place, row in iter_jsonl(data, required=("id", "messages")):
        where = f"{place} (id {row['id']})"
        check_messages(row["messages"], where)
        for number, turn in enumerate(row["messages"], 1):
            task = row.get("task") if turn["role"] == "user" else None  # a transcript has no units
            check_units(turn["content"], task, num_units, offset, f"{where}, message {number}")
        roles = [turn["role"] for turn in row["messages"]]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
            raise UserError(f"{where}: the roles are {roles}", "user and assistant must take turns, assistant last")
        places.append(where)
        chats.append(row["messages"])
    return places, chats


def encode(tokenizer, conversations: list[list[dict]], places: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenize conversations with the chat template.

    Args:
        tokenizer: Has the template.
        conversations: Each a list of turns.
        places: Names each one's row.

    Returns:
        Ids and, of the same lengths, labels: the ids of each assistant turn's content and of the <|im_end|> that
        closes it, else ``IGNORED``.

    Raises:
        UserError: The template refuses a conversation, or the ids of a prompt are not the beginning of it.
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    template = "use the template of towerspeech/prompts.py (train_bpe_tokenizer/extend_model.py)"
    texts, answers = [], []  # conversations; of each assistant turn its place, what asks for it and what ends with it
    for i, (chat, place) in enumerate(zip(conversations, places, strict=True)):
        try:
            texts.append(render(chat))
            for k, turn in enumerate(chat):
                if turn["role"] == "assistant":
                    answers.append((i, k, render(chat[:k], add_generation_prompt=True), render(chat[: k + 1])))
        except Exception as error:  # the template is a program, which may raise anything
            remedy = f"mend the row, or {template}"
            raise UserError(f"{place}: the chat template refuses it: {error}", remedy) from None
    ids = ids_of(texts)
    labels = [[IGNORED] * len(row) for row in ids]
    prompts, upto = (ids_of([answer[part] for answer in answers]) for part in (2, 3))
    for (i, k, prompt_text, closed_text), prompt, closed in zip(answers, prompts, upto, strict=True):
        if not (texts[i].startswith(closed_text) and closed_text.startswith(prompt_text)):
            raise UserError(f"{places[i]}: the chat template changes earlier turns when more follow", template)
        if ids[i][: len(closed)] != closed or closed[: len(prompt)] != prompt:
            answer = conversations[i][k]["content"]
            start = answer[: len(answer) - len(answer.lstrip())] or answer[0]
            raise UserError(
                f"{places[i]}, message {k + 1}: the answer begins with {start!r}, which this tokenizer joins with the "
                "end of the prompt into one token, so that no prompt could lead to it",
                "take white space off the beginnings of the answers",
            )
        if tokenizer.eos_token_id not in closed[len(prompt) :]:
            raise UserError(f"{places[i]}: the chat template closes no answer with {IM_END}", template)
        end = len(closed) - closed[::-1].index(tokenizer.eos_token_id)
        labels[i][len(prompt) : end] = ids[i][len(prompt) : end]
    return ids, labels


def make_dataset(places: list[str], chats: list[list[dict]], tokenizer, max_length: int, show: bool):
    """Tokenize all rows into a Dataset of input_ids and labels; what spells a control token is text.

    Raises:
        UserError: As ``encode``; or examples longer than ``max_length`` tokens: how many, and the longest.
    """
    import pyarrow as pa
    from datasets import Dataset
    from tqdm import tqdm

    text_only, mark = text_tokenizer(tokenizer), marker(tokenizer)
    columns = {"input_ids": [], "labels": []}
    too_long, longest, longest_place = 0, 0, None
    with tqdm(total=len(chats), desc="tokenizing", unit=" examples", disable=not show) as bar:
        for start in range(0, len(chats), ENCODE_ROWS):
            batch = slice(start, start + ENCODE_ROWS)
            marked = [
                [{"role": turn["role"], "content": mark(turn["content"])} for turn in chat] for chat in chats[batch]
            ]
            ids, labels = encode(text_only, marked, places[batch])
            for place, row_ids in zip(places[batch], ids, strict=True):
                too_long += len(row_ids) > max_length
                if len(row_ids) > longest:
                    longest, longest_place = len(row_ids), place
            columns["input_ids"].append(pa.array(ids, pa.list_(pa.int32())))
            columns["labels"].append(pa.array(labels, pa.list_(pa.int32())))
            bar.update(len(marked))
    if too_long:
        raise UserError(
            f"{too_long:,} of {len(chats):,} examples are longer than {max_length:,} tokens; "
            f"the longest, {longest_place}, has {longest:,}",
            "take them out, or raise sft.max_length (up to the model's context)",
        )
    return Dataset.from_dict({name: pa.chunked_array(chunks) for name, chunks in columns.items()})


@dataclasses.dataclass
class Prepared:
    """Everything that is known to be right before a model is loaded."""

    settings: dict[str, Any]  # in full, as sft_config.json keeps them
    sft_config: Any  # trl.SFTConfig
    tokenizer: Any
    config: Any  # the model's
    dataset: Any  # input_ids, labels


def prepare(
    model: Path, data: Path, output_dir: Path, sft: dict[str, Any], seed: int = 0, show: bool = True
) -> Prepared:
    """Check settings, model folder and data, and tokenize; raises UserError, loads no weights."""
    check_exists(model, "give --model the folder of an extended model")
    check_exists(data, "run instruction_tuning/build_sft_data.py")
    settings = check_settings(sft)
    tokenizer, config = load_tokenizer(model)
    context = config.max_position_embeddings
    max_length = settings.get("max_length") or context
    if max_length > context:
        raise UserError(f"sft.max_length {max_length} exceeds the model's context of {context}", "lower it")
    settings = {**settings, "max_length": max_length, "seed": seed}
    if problem := rehearse(settings, tokenizer):
        others = {name: {k: v for k, v in settings.items() if k != name} for name in sft}
        blamed = [f"sft.{name}" for name in sft if not rehearse(others[name], tokenizer)]
        raise UserError(f"the Trainer refuses the sft settings: {problem}", f"mend {' or '.join(blamed) or 'them'}")
    try:
        sft_config = make_config(settings, output_dir)
        check_sharding(sft_config, config)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"sft.fsdp and sft.fsdp_config cannot be used: {error}", "mend them") from None
    units = read_metadata(model)
    places, chats = read_conversations(data, units["num_units"], units["offset"])
    batch = sft_config.train_batch_size * sft_config.world_size
    if sft_config.dataloader_drop_last and len(chats) < batch:
        remedy = "set it to false, or lower sft.per_device_train_batch_size"
        raise UserError(f"{len(chats)} examples are no batch of {batch}: sft.dataloader_drop_last drops all", remedy)
    dataset = make_dataset(places, chats, tokenizer, max_length, show)
    return Prepared(settings, sft_config, tokenizer, config, dataset)


# --- Checkpoints ----------------------------------------------------------------------------------
def is_whole(checkpoint: Path, processes: int) -> bool:
    """Whether a Trainer's checkpoint was written to its end (and its deletion not begun).

    The Trainer writes in place: weights, optimizer, scheduler, random states, and trainer_state.json last; yet
    other processes' random states may come later. torch's files are zip files, whose directory is at their end.
    """

    def ended(name: str) -> bool:
        path = checkpoint / name
        if path.suffix in {".pt", ".pth", ".bin"}:
            return zipfile.is_zipfile(path)
        return path.is_file() and path.stat().st_size > 0

    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    one_of = [  # one process or DDP; FSDP, gathered; FSDP, sharded (.metadata is written last)
        (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model_fsdp.bin",
            "pytorch_model_fsdp_0/.metadata",
        ),
        ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata"),
    ]
    return all(ended(name) for name in ["scheduler.pt", *random_states]) and all(any(map(ended, o)) for o in one_of)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-<step> folders, newest last; what else a user keeps under a name like that is not ours."""
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[1-9][0-9]*", path.name)]
    ours = [path for path in named if path.is_dir() and not path.is_symlink()]
    return sorted(ours, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def newest_checkpoint(folder: Path, processes: int) -> Path | None:
    """The newest whole checkpoint; deletes those that are not whole."""
    whole = None
    for path in checkpoints(folder):
        if is_whole(path, processes):
            whole = path
        else:
            remove(path)
    return whole


def is_last(checkpoint: Path | None) -> bool:
    """Whether a checkpoint holds the weights of the run's last step (an FSDP one is left to the Trainer)."""
    if checkpoint is None or not any(checkpoint.glob("model*.safetensors")):
        return False
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] >= state["max_steps"]


# --- Training -------------------------------------------------------------------------------------
def make_trainer(model, prepared: Prepared, terminal=None, asked_to_stop: Callable[[], bool] | None = None):
    """An SFTTrainer whose order of examples depends on the seed and the epoch alone, so that it can be resumed.

    Args:
        model: The model, in float32.
        prepared: What ``prepare`` gives.
        terminal: For the progress bar.
        asked_to_stop: Called after each step, on all processes; if true, a checkpoint is written and training ends.
    """
    import torch
    from tqdm import tqdm
    from transformers import PrinterCallback, TrainerCallback
    from transformers.trainer_pt_utils import get_length_grouped_indices
    from trl import SFTTrainer

    class Order(torch.utils.data.Sampler):
        """Indices of one epoch; the Trainer's own samplers draw from the global random state."""

        def __init__(self, trainer, lengths: list[int]):
            self.trainer, self.lengths = trainer, lengths

        def __len__(self) -> int:
            return len(self.lengths)

        def __iter__(self) -> Iterator[int]:
            args = self.trainer.args
            generator = torch.Generator().manual_seed(args.seed + int(self.trainer.state.epoch))
            if args.train_sampling_strategy == "random":
                return iter(torch.randperm(len(self), generator=generator).tolist())
            size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            return iter(get_length_grouped_indices(self.lengths, size, generator=generator))

    class Trainer(SFTTrainer):
        def create_model_card(self, *args, **kwargs):
            pass  # would write a README.md into the output folder

        def _save_checkpoint(self, model, trial):
            folder, limit = Path(self.args.output_dir), prepared.settings.get("save_total_limit")
            target = folder / f"checkpoint-{self.state.global_step}"
            if target.is_file():
                raise UserError(f"{target} is a file, but a checkpoint must be written there", "move it away")
            super()._save_checkpoint(model, trial)
            if self.args.should_save and limit:
                for path in checkpoints(folder)[:-limit]:
                    remove(path)

        def _get_train_sampler(self, train_dataset=None):
            import pyarrow.compute as pc

            return Order(self, pc.list_value_length(self.train_dataset.data.column("input_ids")).to_pylist())

    class Progress(TrainerCallback):
        bar = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="training",
                unit=" steps",
                mininterval=1,
                file=terminal,
            )

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.bar and "loss" in (logs or {}):
                self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if asked_to_stop():
                control.should_save = control.should_training_stop = True

    callbacks = [*([Progress()] if terminal else []), *([Stop()] if asked_to_stop else [])]
    trainer = Trainer(
        model,
        prepared.sft_config,
        train_dataset=prepared.dataset,
        processing_class=prepared.tokenizer,
        callbacks=callbacks,
    )
    if terminal is None:
        trainer.remove_callback(PrinterCallback)
    return trainer


def save_model(state_dict: dict, prepared: Prepared, source: Path, folder: Path) -> None:
    """Write the finished model folder, in the source model's dtype.

    Args:
        state_dict: All weights, in float32.
        prepared: Its tokenizer and config.
        source: The model folder that was trained.
        folder: An empty folder.
    """
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
    for name in ("speech_units.json", "tokenizer.model"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
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
        data: sft.jsonl.
        output_dir: Folder for the tuned model; holds checkpoint-<step> folders meanwhile.
        sft: Settings of trl.SFTConfig, such as --sft.num_train_epochs 2; see DEFAULTS in this file.
        seed: Seed of the order of examples.
        overwrite: Replace the output of other arguments.
    """
    processes, first = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    arguments = {"sft": sft or {}, "seed": seed, "model": model, "data": data, "overwrite": overwrite}
    arguments["processes"] = processes  # they change the size of a batch
    if processes > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())  # joins the processes
    prepared = None
    if overwrite or not (output_dir / RUN_INFO).is_file():  # else the stage's answer is enough, and quick
        prepared = prepare(model, data, output_dir, sft or {}, seed, first)
    with contextlib.ExitStack() as stack:
        work = None
        if first:
            work = stack.enter_context(stage(output_dir, arguments, inputs=["model", "data"]))
        checkpoint = newest_checkpoint(output_dir, processes) if work and not work.done else None
        plan = [work.done if work else None, checkpoint]
        if processes > 1:  # the first process decides for all
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(plan)
        done, checkpoint = plan
        if not done:
            prepared = prepared or prepare(model, data, output_dir, sft or {}, seed, first)
            if first:
                print(json.dumps(prepared.settings, indent=1))
                print(f"{len(prepared.dataset):,} examples, {count_tokens(prepared.dataset):,} tokens")
                if checkpoint:
                    print(f"going on from {checkpoint}", flush=True)

            def asked_to_stop() -> bool:  # the first process decides for all
                flag = [bool(work and work.asked_to_stop())]
                if processes > 1:
                    broadcast_object_list(flag)
                return flag[0]

            with quiet(output_dir / "train.log") as terminal:
                weights = tune(model, prepared, checkpoint, terminal if first else None, asked_to_stop)
            if weights is None:
                if not first:
                    sys.exit(1)  # the first process says it for all
                saved = newest_checkpoint(output_dir, processes)
                raise UserError(f"asked to stop: saved {saved}", "run this again, and it goes on from there")
            if work:
                with work.publish() as folder:
                    save_model(weights, prepared, model, folder)
                work.counts.update(examples=len(prepared.dataset), tokens=count_tokens(prepared.dataset))
                print(f"wrote {output_dir}")
    if first:  # only now is the model known to be whole
        for path in checkpoints(output_dir):
            remove(path)
    if processes > 1:  # leave together: who goes first takes the connections from under the others
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def count_tokens(dataset) -> int:
    """Number of tokens in all examples, prompts included."""
    import pyarrow.compute as pc

    return pc.sum(pc.list_value_length(dataset.data.column("input_ids"))).as_py()


def tune(
    model: Path, prepared: Prepared, checkpoint: Path | None, terminal, asked_to_stop: Callable[[], bool]
) -> dict | None:
    """Train from ``checkpoint``, or from the start.

    Returns:
        The final weights (all of them on the first process), or None if it was asked to stop before the last step.
    """
    import torch
    from transformers import AutoModelForCausalLM

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


if __name__ == "__main__":
    run(train)
