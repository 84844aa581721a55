"""What the merging of tokenizers starts from and ends with, whatever the kind of the base: see merge_tokenizer.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from towerspeech import units as dsu
from towerspeech.errors import UserError
from towerspeech.files import check_exists, read_json

AS_PUBLISHED = "start from the base as published, or leave out what it has: see --special_tokens and --chat"

UNIT_BPE = {  # SentencePiece's options
    "model_type": "bpe",
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "split_by_unicode_script": False,
    "split_by_number": False,
    "hard_vocab_limit": False,  # we say ourselves how many merges there are
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
}


def read_proto(path: Path):
    """Read a SentencePiece model file as a protocol buffer.

    Raises:
        UserError: It is something else.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        proto.Clear()  # of what was read before the error
    if not proto.pieces:
        remedy = "it may be a Git LFS pointer, or tiktoken's, which is read from a tokenizer.json beside it"
        raise UserError(f"{path} is no SentencePiece model", remedy)
    return proto


@dataclass
class UnitBpe:
    """What train_bpe.py made."""

    proto: Any  # SentencePiece's model
    num_units: int
    merges: list[str]  # as private-use text, in the order in which they were learned
    corpora_sha256: list[str]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """SentencePiece's tokens of unit lines: units are numbered 0..num_units-1, merges go on from there."""
        from sentencepiece import SentencePieceProcessor

        pieces = [*dsu.to_text(range(self.num_units)), *self.merges]
        numbers = {piece: number for number, piece in enumerate(pieces)}
        encoded = SentencePieceProcessor(model_proto=self.proto.SerializeToString()).encode(texts, out_type=str)
        return [[numbers[piece] for piece in line] for line in encoded]


def read_units_bpe(folder: Path) -> UnitBpe:
    """Read units_bpe.json and units_bpe.model.

    Raises:
        UserError: The folder is not finished, or its model does not hold exactly the units that it claims.
    """
    remedy = "run train_bpe_tokenizer/train_bpe.py"
    facts = read_json(folder / "units_bpe.json", remedy, ["num_units", "corpora_sha256"])
    check_exists(folder / "units_bpe.model", remedy)
    num_units = facts["num_units"]
    proto = read_proto(folder / "units_bpe.model")
    pieces = [piece.piece for piece in proto.pieces if piece.type == piece.NORMAL]
    alphabet = set(dsu.to_text(range(num_units)))
    if {piece for piece in pieces if len(piece) == 1} != alphabet or not alphabet.issuperset("".join(pieces)):
        raise UserError(f"{folder}/units_bpe.model does not hold the {num_units} units of units_bpe.json", remedy)
    return UnitBpe(proto, num_units, [piece for piece in pieces if len(piece) > 1], facts["corpora_sha256"])


def bpe_merges(proto) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE for the tokenizers library, best first.

    SentencePiece joins whatever two neighbours make the best-scored piece, so each split of a piece is a merge.
    transformers takes ids for scores, which is wrong for Llama-2's runs of spaces. Among merges of one score
    SentencePiece takes the leftmost, as a longer left part does.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((-score, -cut, piece[:cut], piece[cut:]))
    merges.sort(key=lambda merge: merge[:2])  # stable: the base's order breaks ties
    return [(left, right) for _, _, left, right in merges]


@dataclass
class Merged:
    """What was made of a base tokenizer, and what to compare it with."""

    fast: Any  # the Hugging Face tokenizer, as loaded from the new folder
    tokens: list[str]  # all of them, in the order of their ids
    base_tokens: list[str]
    surfaces: list[str]  # the texts that the base's tokens stand for
    base_encode: Callable[[list[str]], list[list[int]]]  # of text alone, by the base, without BOS
    encode: Callable[[list[str]], list[list[int]]]  # of text and units, without BOS and without ``fast``
    decoders: tuple[Callable[[list[list[int]]], list[str]], ...]
    start: list[int]  # what the base puts before every text,
    end: list[int]  # and after it
    byte_pieces: int = 0
