"""Megatron's indexed token files: ``<prefix>.bin`` holds the tokens, ``<prefix>.idx`` says where documents lie.

Index, little-endian: magic ``MMIDIDX\\0\\0``, uint64 version 1, uint8 dtype code, uint64 sequences, uint64 document
indices, int32 sizes, int64 byte offsets, int64 document index from 0. Here a sequence is a document. Any trainer of
the Megatron family reads it (megatron/core/datasets/indexed_dataset.py in NVIDIA/Megatron-LM).
"""

import struct
from pathlib import Path

import numpy as np

from towerspeech.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES = {8: np.uint16, 4: np.int32}
LARGEST_UINT16_VOCABULARY = 65500  # Megatron's own border
BLOCK = 1 << 20  # documents whose numbers are held at a time


def token_dtype(vocab_size: int) -> type:
    """The narrowest dtype that Megatron uses for a vocabulary of this size."""
    return np.uint16 if vocab_size < LARGEST_UINT16_VOCABULARY else np.int32


def write_index(path: Path, sizes: np.ndarray, dtype: type) -> None:
    """Write the .idx of documents of ``sizes`` tokens each, (num_documents,) int32; it may be a memory map."""
    code = next(code for code, known in DTYPE_CODES.items() if known == dtype)
    blocks = [sizes[first : first + BLOCK] for first in range(0, len(sizes), BLOCK)]
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1))
        for block in blocks:
            file.write(block.astype("<i4").tobytes())
        end = 0
        for block in blocks:
            ends = end + np.cumsum(block, dtype=np.int64) * np.dtype(dtype).itemsize
            file.write(np.concatenate([[end], ends[:-1]]).astype("<i8").tobytes())
            end = int(ends[-1])
        for first in range(0, len(sizes) + 1, BLOCK):
            file.write(np.arange(first, min(first + BLOCK, len(sizes) + 1), dtype="<i8").tobytes())


class IndexedTokens:
    """Documents of token ids, memory-mapped.

    Attributes:
        sizes: Tokens of each document, (num_documents,) int32.
        offsets: First token of each document in ``tokens``, (num_documents,) int64.
        tokens: All tokens, (num_tokens,).
    """

    def __init__(self, prefix: Path):
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        remedy = "run data_mixture/build_mixture.py"
        if not index.is_file() or not data.is_file():
            raise UserError(f"{prefix}.bin or .idx is missing", remedy)
        with open(index, "rb") as file:
            if file.read(9) != MAGIC:
                raise UserError(f"{index} is no Megatron index", remedy)
            _, code, count, _ = struct.unpack("<QBQQ", file.read(25))
            self.sizes = np.fromfile(file, "<i4", count)
            offsets = np.fromfile(file, "<i8", count)
        dtype = np.dtype(DTYPE_CODES[code])
        self.offsets = offsets // dtype.itemsize
        num_tokens = int(self.sizes.sum(dtype=np.int64))
        if data.stat().st_size != num_tokens * dtype.itemsize:
            raise UserError(f"{data} has {data.stat().st_size} bytes, its index says {num_tokens} tokens", remedy)
        self.tokens = np.memmap(data, dtype, "r") if num_tokens else np.zeros(0, dtype)
