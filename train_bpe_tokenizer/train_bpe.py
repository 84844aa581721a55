"""Train a BPE over speech units.

Usage: python train_bpe_tokenizer/train_bpe.py --units units/spgispeech units/mls --num_units 5000 --vocab_size 8000 \\
           --output_dir units_bpe/

Reads units Parquet (folders or files) or .km text files (ids separated by spaces, an utterance a line; repeats already
collapsed). Writes units_bpe.model (SentencePiece over units as private-use characters), units_bpe.vocab (its pieces as
unit ids) and units_bpe.json (num_units, offset, vocab_size, counts, the corpora's hashes).

The corpus is streamed; what SentencePiece sees is a random sample of whole utterances, at most --max_units units, for
which it takes about 93 bytes a unit. Every id below --num_units is a piece, whether the sample has it or not. Merges
are at most 16 units long, SentencePiece's default.
"""

import heapq
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from towerspeech import units as dsu
from towerspeech.stage import UserError, check_exists, quiet, run, stage

MAX_SENTENCE_BYTES = 2**31 - 1  # SentencePiece's own limit on its max_sentence_length
UTF8_BYTES = 4  # of a private-use character
NORMAL = 1  # SentencePiece's type of a piece that is no <unk>


# --- The corpus -----------------------------------------------------------------------------------
def read_km(path: Path, num_units: int) -> Iterator[list[int]]:
    """Stream the utterances of a .km file.

    Raises:
        UserError: A line is not a list of unit ids below ``num_units``; names file and line.
    """
    check_exists(path, "check --units")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                units = [int(word) for word in line.split()]
            except ValueError:
                raise UserError(
                    f"{path}:{number}: not unit ids separated by spaces: {line[:40]!r}",
                    "name .km text files or units Parquet",
                ) from None
            dsu.check_range(units, num_units, f"{path}:{number}")
            yield units


def read_corpus(paths: list[Path], num_units: int) -> Iterator[list[int]]:
    """Stream the utterances of units folders, Parquet files and .km files, as unit ids."""
    from towerspeech.records import read_units

    for path in paths:
        if path.is_file() and path.suffix != ".parquet":
            yield from read_km(path, num_units)
        else:
            yield from (row["units"] for row in read_units(path, num_units))


class Sample:
    """A uniform sample of utterances that keeps a budget of units.

    Each utterance draws a random key; kept are those with the lowest keys, as many as fit into the budget. So it does
    not depend on the corpus size, which is not known beforehand, and memory is that of the sample.
    """

    def __init__(self, max_units: int, seed: int):
        self.max_units, self.units = max_units, 0
        self._random = random.Random(seed)
        self._heap: list[tuple[float, int, str]] = []  # (-key, -position, text): the highest key on top
        self._border = 2.0  # keys from here on no longer fit
        self.seen = {"utterances": 0, "empty_utterances": 0, "units": 0}

    def add(self, units: list[int]) -> None:
        """Show the sample one utterance."""
        key = self._random.random()
        self.seen["utterances"] += 1
        self.seen["units"] += len(units)
        self.seen["empty_utterances"] += not units
        if not units or key >= self._border:
            return
        heapq.heappush(self._heap, (-key, -self.seen["utterances"], dsu.to_text(units)))
        self.units += len(units)
        while self.units > self.max_units:
            key, _, text = heapq.heappop(self._heap)
            self.units -= len(text)
            self._border = -key

    def texts(self) -> list[str]:
        """The sampled utterances as private-use text, in the order of the corpus."""
        return [text for _, text in sorted((-position, text) for _, position, text in self._heap)]


# --- Training -------------------------------------------------------------------------------------
def train_sentencepiece(texts: list[str], num_merges: int, log: Path):
    """Train SentencePiece BPE; returns its proto: <unk>, at most ``num_merges`` merges, the texts' characters.

    Raises:
        RuntimeError: SentencePiece left utterances out.
    """
    import io

    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    logged = log.stat().st_size if log.is_file() else 0
    model = io.BytesIO()
    with quiet(log):
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=1 + num_merges + len(set().union(*texts)),  # 1: it needs an <unk>
            character_coverage=1.0,
            # Longer lines would be dropped with no more than a line in the log.
            max_sentence_length=UTF8_BYTES * max(map(len, texts)) + 1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            split_by_number=False,
            hard_vocab_limit=False,  # we say ourselves how many merges there are
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,  # training is serial anyway; more threads measured no faster, and gave the same pieces
            minloglevel=0,
        )
    with open(log, "rb") as file:
        file.seek(logged)
        loaded = re.findall(rb"Loaded all (\d+) sentences", file.read())
    if [int(count) for count in loaded] != [len(texts)]:
        raise RuntimeError(f"SentencePiece loaded {loaded} of {len(texts)} utterances; see {log}")
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return proto


def complete(proto, num_units: int, vocab_size: int):
    """Give a trained proto every unit as a piece, in the order of ids, after <unk> and the merges.

    SentencePiece's own ``required_chars`` adds units that the corpus lacks only if it reaches its vocabulary size.

    Raises:
        UserError: There are fewer merges than ``vocab_size`` wants.
    """
    merges = [piece.piece for piece in proto.pieces if piece.type == NORMAL and len(piece.piece) > 1]
    if len(merges) != vocab_size - num_units:
        raise UserError(
            f"--vocab_size {vocab_size} is more than this corpus gives: {num_units} units and {len(merges)} merges",
            f"give more data, a larger --max_units, or --vocab_size {num_units + len(merges)}",
        )
    del proto.pieces[1:]
    for rank, piece in enumerate([*merges, *dsu.to_text(range(num_units))]):
        proto.pieces.add(piece=piece, score=-rank, type=NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def train_bpe(
    units: list[Path],
    num_units: int,
    output_dir: Path,
    vocab_size: int = 8000,
    max_units: int = 20_000_000,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Train a unit BPE.

    Args:
        units: Units Parquet folders or files, or .km text files.
        num_units: Size of the k-means that made the units (5000 in TowerSpeech); ids are 0..num_units-1.
        output_dir: New folder.
        vocab_size: Units and merges together; equal to num_units for no merges.
        max_units: Units to train on, sampled from the whole corpus by utterance.
        seed: Of the sample.
        overwrite: Replace the output of a run with other arguments.
    """
    arguments = dict(locals())
    if not 0 < num_units <= dsu.MAX_NUM_UNITS:
        raise UserError(f"--num_units {num_units} is not within 1..{dsu.MAX_NUM_UNITS}", "give the k-means' size")
    if vocab_size < num_units:
        raise UserError(
            f"--vocab_size {vocab_size} is smaller than --num_units {num_units}: every unit is a piece",
            f"give at least {num_units}, which means no merges",
        )
    with stage(output_dir, arguments, inputs=["units"]) as job:
        if job.done:
            return
        from sentencepiece import SentencePieceProcessor
        from tqdm import tqdm

        sample = Sample(max_units, seed)
        for utterance in tqdm(read_corpus(units, num_units), unit=" utterances", desc="reading", mininterval=1):
            sample.add(utterance)
        seen, texts = sample.seen, sample.texts()
        if not seen["units"]:
            raise UserError(
                f"{', '.join(map(str, units))}: no units in {seen['utterances']} utterances", "check --units"
            )
        if not texts:
            raise UserError(f"--max_units {max_units} is less than one utterance", "raise it; 20000000 takes 2 GB")
        if len(max(texts, key=len)) * UTF8_BYTES >= MAX_SENTENCE_BYTES:
            raise UserError(f"an utterance of {len(max(texts, key=len)):,} units is too long", "cut it by the hour")

        print(
            f"training on {sample.units:,} of {seen['units']:,} units ({sample.units / seen['units']:.1%})", flush=True
        )
        proto = train_sentencepiece(texts, vocab_size - num_units, output_dir / "sentencepiece.log")
        model = complete(proto, num_units, vocab_size).SerializeToString(deterministic=True)
        encoder = SentencePieceProcessor(model_proto=model)
        num_tokens = sum(len(encoder.encode(text)) for text in tqdm(texts, unit=" utterances", desc="encoding"))
        counts = {
            **seen,
            "sampled_utterances": len(texts),
            "sampled_units": sample.units,
            "share_sampled": round(sample.units / seen["units"], 6),
            "merges": vocab_size - num_units,
            "units_per_token": round(sample.units / num_tokens, 4),  # on the sample
        }
        with job.publish("units_bpe.model") as path:
            path.write_bytes(model)
        with job.publish("units_bpe.vocab") as path, open(path, "w", encoding="utf-8") as file:
            for piece in proto.pieces[1:]:
                file.write(f"{' '.join(map(str, dsu.from_text(piece.piece, num_units)))}\t{piece.score:g}\n")
        with job.publish("units_bpe.json") as path:
            facts = {"num_units": num_units, "offset": dsu.OFFSET, "vocab_size": vocab_size, "counts": counts}
            facts["corpora_sha256"] = job.plan["inputs"]["units"]
            path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        job.counts.update(counts)
        print(
            f"{num_units:,} units + {counts['merges']:,} merges, {counts['units_per_token']} units a token: "
            f"{output_dir}"
        )


if __name__ == "__main__":
    run(train_bpe)
