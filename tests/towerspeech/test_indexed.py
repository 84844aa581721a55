"""Megatron's indexed files against literal bytes and megatron-core's own reader; numbers beyond 32 bits."""

import struct
from pathlib import Path

import numpy as np
import pytest

from towerspeech.errors import UserError
from towerspeech.indexed import IndexedTokens, token_dtype, write_index

GIB = 2**30


def write_bytes(prefix: Path, sizes: list[int], code: int, tokens: bytes) -> None:
    """An index and its tokens, byte by byte."""
    width = {4: 4, 8: 2}[code]
    offsets = [width * sum(sizes[:i]) for i in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *offsets)
    prefix.with_suffix(".idx").write_bytes(index + struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1)))
    prefix.with_suffix(".bin").write_bytes(tokens)


@pytest.mark.parametrize("sizes", [[3, 1, 2], [5], []])
@pytest.mark.parametrize(("dtype", "code", "format"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_files_byte_by_byte(tmp_path, sizes, dtype, code, format):
    tokens = list(range(sum(sizes), 0, -1))
    write_bytes(tmp_path / "a", sizes, code, struct.pack(f"<{len(tokens)}{format}", *tokens))
    write_index(tmp_path / "b.idx", np.array(sizes, np.int32), dtype)
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()
    read = IndexedTokens(tmp_path / "a")
    assert read.tokens.dtype == dtype and read.tokens.tolist() == tokens
    assert read.sizes.tolist() == sizes and read.offsets.tolist() == [sum(sizes[:i]) for i in range(len(sizes))]


def test_the_border_between_uint16_and_int32_is_megatrons():
    from megatron.core.datasets.indexed_dataset import DType

    for size, dtype in ((2, "uint16"), (65499, "uint16"), (65500, "int32"), (65536, "int32"), (128256, "int32")):
        assert np.dtype(token_dtype(size)).name == dtype == DType.optimal_dtype(size).__name__


@pytest.mark.parametrize(("dtype", "width"), [(np.uint16, 2), (np.int32, 4)])
def test_offsets_beyond_32_bits(tmp_path, dtype, width):
    """Four documents, of which the last begins 3 * 2**30 tokens after the first; files with holes."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from continued_pretraining.packing import TokenStream

    write_index(tmp_path / "a.idx", np.array([GIB, GIB, GIB, 5], np.int32), dtype)
    places = {0: 1, GIB - 1: 2, 2 * GIB: 3, 3 * GIB - 1: 4, 3 * GIB: 5, 3 * GIB + 4: 6}
    with open(tmp_path / "a.bin", "wb") as file:
        file.truncate((3 * GIB + 5) * width)
        for place, token in places.items():
            file.seek(place * width)
            file.write(token.to_bytes(width, "little"))
    index = (tmp_path / "a.idx").read_bytes()
    assert struct.unpack("<4q", index[34 + 16 : 34 + 48]) == (0, GIB * width, 2 * GIB * width, 3 * GIB * width)
    read = IndexedTokens(tmp_path / "a")
    assert read.offsets.tolist() == [0, 1073741824, 2147483648, 3221225472]
    assert {place: int(read.tokens[place]) for place in places} == places
    megatrons = IndexedDataset(str(tmp_path / "a"))
    assert megatrons[3].tolist() == [5, 0, 0, 0, 6]
    assert megatrons.get(2, offset=GIB - 2, length=2).tolist() == [0, 4]

    stream = TokenStream(read, (0,))
    assert stream.epoch_tokens == 3221225477
    order, ends = stream.epoch(1)
    end = dict(zip(order.tolist(), (3221225477 + ends).tolist(), strict=True))  # of each document, in the second epoch
    assert sorted(end) == [0, 1, 2, 3] and max(end.values()) == 2 * 3221225477
    assert stream.read(end[2] - 2, 2).tolist() == [0, 4] and stream.read(end[2] - GIB, 2).tolist() == [3, 0]
    assert stream.read(end[3] - 5, 5).tolist() == [5, 0, 0, 0, 6]


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        ("idx", None, r"a\.bin or \.idx is missing"),
        ("bin", None, r"a\.bin or \.idx is missing"),
        ("idx", b"MMIDIDX\x00\x01" + b"\x00" * 60, r"a\.idx is no Megatron index"),
        ("bin", b"\x00" * 11, r"a\.bin has 11 bytes, its index says 6 tokens"),
        ("bin", b"\x00" * 14, r"a\.bin has 14 bytes, its index says 6 tokens"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, ending, content, message):
    write_bytes(tmp_path / "a", [4, 2], 8, bytes(12))
    IndexedTokens(tmp_path / "a")
    if content is None:
        (tmp_path / f"a.{ending}").unlink()
    else:
        (tmp_path / f"a.{ending}").write_bytes(content)
    with pytest.raises(UserError, match=message):
        IndexedTokens(tmp_path / "a")
