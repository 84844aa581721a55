"""What train.py and plan.py refuse alike."""

from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import read_json


def read_config(model: Path, sequence_length: int) -> dict:
    """A model folder's config.json; UserError if there is none, or if windows are beyond the model's context."""
    made_by = "make the model with train_bpe_tokenizer/extend_model.py"
    config = read_json(model / "config.json", made_by, ["vocab_size", "max_position_embeddings"])
    if sequence_length > config["max_position_embeddings"]:
        raise UserError(
            f"--sequence_length {sequence_length} exceeds the model's context of {config['max_position_embeddings']}",
            "lower it",
        )
    return config


def mesh_shape(
    replicate: int | None, shard: int | None, processes: int, global_batch_size: int, micro_batch_size: int
) -> tuple[int, int]:
    """Copies of the model, and processes that share each, of which one follows from the other.

    Raises:
        UserError: The processes or the batch do not divide so.
    """
    replicate = replicate or max(1, processes // (shard or processes))
    shard = shard or max(1, processes // replicate)
    if replicate * shard != processes:
        problem = f"replicate {replicate} x shard {shard} is not {processes} processes"
        raise UserError(problem, "set --replicate, --shard")
    if global_batch_size % (processes * micro_batch_size):
        raise UserError(
            f"--global_batch_size {global_batch_size} is no multiple of {processes} processes x {micro_batch_size}",
            "change --global_batch_size, --micro_batch_size or the number of processes",
        )
    return replicate, shard
