"""Turn what the linked Megatron trainer's megatron_to_hf.py writes into a model folder of ours (see megatron.md).

Usage: python continued_pretraining/import_megatron.py --converted hf/iter_0005000 --model extended_model/ \\
           --output_dir models/towerspeech_6b/checkpoint-5000

Reads the converted folder's weights (safetensors, or PyTorch files, read without running what is pickled in them) and
the extended model that training began with. Writes that model's folder with these weights: its config, tokenizer files
and speech_units.json, since the converter writes a tokenizer of its own, and a config that knows neither the model's
context nor its end-of-sequence id.
"""

from pathlib import Path
from typing import Literal

from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import read_json
from towerspeech.model_folder import check_tokenizer_fits, save_trained
from towerspeech.stage import stage
from towerspeech.tokenizer import read_metadata

CONVERTED = "name the folder that megatron_to_hf.py wrote"
SHAPE = (  # what both configs must say
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
)


def check_configs(converted: Path, model: Path) -> int:
    """The rows of the converted model's embeddings.

    Raises:
        UserError: Its shape is not that of ``model``, or it has fewer rows than the tokenizer has tokens.
    """
    theirs = read_json(converted / "config.json", CONVERTED, ["model_type", "vocab_size"])
    ours = read_json(model / "config.json", "name the model folder that training began with", ["model_type"])
    for name in SHAPE:
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise UserError(
                f"{converted}: its {name} is {theirs[name]}, that of {model} {ours[name]}",
                "name the --model that training began with, and give megatron_to_hf.py its values",
            )
    check_tokenizer_fits(converted, read_metadata(model)["vocab_size"], theirs["vocab_size"])
    return theirs["vocab_size"]


def load_weights(converted: Path, config, dtype):
    """The converted weights in a network of our config; UserError unless all of them are there, and no others."""
    from pickle import UnpicklingError

    from transformers import AutoModelForCausalLM

    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            converted,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"{converted}: no weights can be read: {str(error).splitlines()[0]}", CONVERTED) from None
    for kind in ("missing_keys", "unexpected_keys"):
        keys = sorted(map(str, report[kind]))
        if keys:
            raise UserError(f"{converted}: {kind.replace('_', ' ')}: {', '.join(keys[:3])}", CONVERTED)
    return network


def import_megatron(
    converted: Path,
    model: Path,
    output_dir: Path,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    overwrite: bool = False,
) -> None:
    """Import a converted model.

    Args:
        converted: Folder written by megatron_to_hf.py.
        model: Folder written by extend_model.py, which training began with.
        output_dir: New model folder.
        dtype: Number format of the weights.
        overwrite: Replace the output of a run with other arguments.
    """
    arguments = dict(locals())
    rows = check_configs(converted, model)
    with stage(__file__, output_dir, arguments, inputs=["converted", "model"]) as work:
        if work.done:
            return
        import torch
        from transformers import AutoConfig, GenerationConfig

        config = AutoConfig.from_pretrained(model, local_files_only=True, vocab_size=rows)
        network = load_weights(converted, config, getattr(torch, dtype))
        network.generation_config = GenerationConfig.from_model_config(config)  # ours, if it has none of its own
        with work.publish() as folder:
            save_trained(network, model, folder)
        work.counts.update({"rows": rows, "parameters": network.num_parameters()})
        print(f"{network.num_parameters():,} parameters, {rows:,} rows, {dtype}: {output_dir}")


if __name__ == "__main__":
    run(import_megatron)
