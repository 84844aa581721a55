"""Tell the arguments with which the linked Megatron trainer takes a mixture and a model (see megatron.md).

Usage: python continued_pretraining/megatron_arguments.py --mixture mixture/towerspeech_6b --model extended_model/ \\
           --tensor_parallel 2 --sequence_length 2048 --global_batch_size 576

Reads the mixture's manifest.json and the extended model's config.json; prints one argument a line, as a shell takes
them. Nothing is written: a mixture may be moved, and be trained on with any batch.
"""

import math
import shlex
from pathlib import Path

from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, read_json
from towerspeech.tokenizer import tokenizer_hash

DIVISOR = 128  # Megatron-LLM's --make_vocab_size_divisible_by, which it takes times the tensor parallel size


def megatron_arguments(
    mixture: Path, model: Path, tensor_parallel: int = 1, sequence_length: int = 2048, global_batch_size: int = 512
) -> None:
    """Print the arguments.

    Args:
        mixture: Folder written by build_mixture.py.
        model: Folder written by extend_model.py, whose tokenizer made the mixture.
        tensor_parallel: GPUs that each matrix is split over.
        sequence_length: Number of tokens in a sample.
        global_batch_size: Number of samples in a step, over all GPUs.
    """
    sizes = {"tensor_parallel": tensor_parallel, "sequence_length": sequence_length}
    for name, value in {**sizes, "global_batch_size": global_batch_size}.items():
        if value < 1:
            raise UserError(f"--{name} is {value}", "give at least 1")
    made_by = "run data_mixture/build_mixture.py"
    manifest = read_json(mixture / "manifest.json", made_by, ["sources", "budget", "vocab_size", "tokenizer_sha256"])
    rows = read_json(model / "config.json", "run train_bpe_tokenizer/extend_model.py", ["vocab_size"])["vocab_size"]
    check_exists(model / "tokenizer.model", "the linked trainer takes SentencePiece tokenizers alone")
    if tokenizer_hash(model) != manifest["tokenizer_sha256"]:
        raise UserError(f"{mixture} was made with another tokenizer than {model}'s", "name the model that it is for")
    multiple = DIVISOR * tensor_parallel
    padded = math.ceil(manifest["vocab_size"] / multiple) * multiple
    if rows != padded:
        raise UserError(
            f"{model} has {rows:,} embedding rows, the trainer makes {padded:,} of {manifest['vocab_size']:,} tokens",
            f"extend the base anew, with extend_model.py --pad_to_multiple_of {multiple}",
        )
    for source in manifest["sources"]:
        check_exists(mixture / f"{source['name']}.idx", made_by)
    steps = math.ceil(manifest["budget"] / (global_batch_size * sequence_length))
    data_path = []  # samples are of one length, so token budgets are the weights; the trainer makes them sum to 1
    for source in manifest["sources"]:
        data_path += [str(source["budget"]), shlex.quote(str(mixture.resolve() / source["name"]))]
    lines = [
        f"--data_path {' '.join(data_path)}",
        "--data_impl mmap",
        "--split 100,0,0",  # the default keeps 3% of the data from training
        f"--train_iters {steps}",
        f"--global_batch_size {global_batch_size}",
        f"--seq_length {sequence_length}",
        f"--tensor_model_parallel_size {tensor_parallel}",
        "--tokenizer_type SentencePieceTokenizer",
        f"--vocab_file {shlex.quote(str(model.resolve() / 'tokenizer.model'))}",
        "--no_new_tokens",
        f"--make_vocab_size_divisible_by {DIVISOR}",
    ]
    print(" \\\n".join(lines))


if __name__ == "__main__":
    run(megatron_arguments)
