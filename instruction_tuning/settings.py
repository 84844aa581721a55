"""The ``sft`` settings of train.py: trl.SFTConfig's, checked before any weights are loaded."""

import copy
import dataclasses
import difflib
import json
import typing
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from towerspeech.errors import UserError

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
OURS = {  # why train.py decides these fields of SFTConfig
    "packed examples would see one another": ("packing", "packing_strategy", "padding_free", "eval_packing"),
    "train.py labels the assistant's tokens itself": (
        "assistant_only_loss",
        "completion_only_loss",
        "chat_template_path",
        "dataset_kwargs",
        "eos_token",
        "pad_token",
        "truncation_mode",
        "dataset_text_field",
        "shuffle_dataset",
    ),
    "train.py resumes by itself": ("resume_from_checkpoint", "ignore_data_skip", "save_only_model"),
    "use generate/ and results/ to evaluate": ("do_eval", "eval_strategy", "eval_on_start", "load_best_model_at_end"),
    "each new length would be compiled anew": ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "models are sharded with sft.fsdp, whose checkpoints train.py can go on from": ("deepspeed", "parallelism_config"),
    "use --seed": ("seed", "data_seed"),
    "use --output_dir": ("output_dir",),
    "the model is loaded from --model, in float32": ("model_init_kwargs",),
    "models that bring their own code are not run": ("trust_remote_code",),
    "upload the finished folder yourself": ("push_to_hub",),
    "progress is always shown": ("disable_tqdm",),
    "it is for models with experts, which Llama has not": ("router_aux_loss_coef",),
}
POSITIVE = (  # the Trainer divides by these numbers, or takes them for something else, unless they are above 0
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "learning_rate",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "max_length",
    "pad_to_multiple_of",
)
NOT_NEGATIVE = ("max_grad_norm", "warmup_steps", "weight_decay", "label_smoothing_factor", "neftune_noise_alpha")
FSDP_CONFIG = {  # what transformers reads for FSDP2, or sets itself; it passes other names over
    "version",
    "transformer_layer_cls_to_wrap",
    "min_num_params",
    "auto_wrap_policy",
    "cpu_offload",
    "reshard_after_forward",
    "activation_checkpointing",
    "state_dict_type",
    "cpu_ram_efficient_loading",
    "xla",
    "xla_fsdp_v2",
    "xla_fsdp_grad_ckpt",
}


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


def check_names(sft: dict[str, Any]) -> None:
    """Raise UserError for a setting that SFTConfig does not know (names near ones), or that train.py decides."""
    names = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    reasons = {name: reason for reason, group in OURS.items() for name in group}
    for name in sft:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see trl.SFTConfig for the names"
            raise UserError(f"sft.{name} is no setting of trl.SFTConfig", remedy)
        if name in reasons:
            raise UserError(f"sft.{name} cannot be set: {reasons[name]}", f"remove sft.{name}")


def check_settings(sft: dict[str, Any]) -> dict[str, Any]:
    """Check the ``sft`` block against SFTConfig; returns it with our defaults filled in.

    Raises:
        UserError: A setting that cannot be set, a value of another type, a number that is not finite or too small,
            or half precision without a GPU.
    """
    check_names(sft)
    hints = typing.get_type_hints(SFTConfig)
    for name, value in sft.items():
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
    ours = {
        "output_dir": str(output_dir),
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # our ids and labels, untouched
        "save_total_limit": None,  # trainer.py sees to it: the Trainer would delete checkpoint-4-backup, too
    }
    # SFTConfig and the Trainer write into the dicts that they are given.
    config = SFTConfig(**copy.deepcopy({**settings, **ours}))
    if config.save_strategy not in ("steps", "epoch"):
        raise ValueError(f"sft.save_strategy {config.save_strategy.value}, but a killed run must be able to go on")
    return config


def check_sharding(sft_config, config) -> None:
    """Raise for FSDP settings that would be refused, or passed over, once the model is loaded."""
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
