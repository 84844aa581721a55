"""Train a BPE over speech units.

Usage: python train_bpe_tokenizer/train_bpe.py --units units/spgispeech units/mls --num_units 5000 --vocab_size 8000 \\
           --output_dir units_bpe/

Reads units Parquet (folders or files) or .km text files (ids separated by spaces, an utterance a line). Writes
units_bpe.model (SentencePiece over units as private-use characters), units_bpe.vocab (its pieces as unit ids),
units_bpe.json (num_units, offset, vocab_size, counts, the corpora's hashes), and compression.csv and .png: units a
token on held-out utterances, for this vocabulary and for smaller ones, by which to choose its size.

The corpus is streamed; what SentencePiece sees is a random sample of whole utterances, at most --max_units units, for
which it takes about 93 bytes a unit. Every id below --num_units is a piece, whether the sample has it or not. Merges
are at most 16 units long, SentencePiece's default.
"""

import codecs
import csv
import heapq
import importlib
import io
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from towerspeech import units as dsu
from towerspeech.command import quiet, run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, write_json
from towerspeech.stage import stage
from towerspeech.units_parquet import check_one_kmeans, read_unit_texts
from train_bpe_tokenizer.merging import UNIT_BPE

LEAST_SENTENCE_BYTES = 10  # SentencePiece's own limit on its max_sentence_length
UTF8_BYTES = 4  # of a private-use character
MAX_HELD_OUT = 500_000  # units: more would not make the report any better
KM_BYTES = 1 << 22  # of a .km file, read at once
DIGITS_AND_SPACE = b"0123456789 \t\n\v\f\r"
SMALLER = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # shares of the merges whose compression is reported


# --- The corpus -----------------------------------------------------------------------------------
def read_km(path: Path, num_units: int) -> Iterator[str]:
    """Stream the utterances of a .km file as private-use text; an empty line is an utterance without units.

    Raises:
        UserError: A line is not a list of unit ids below ``num_units``; names file and line.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    check_exists(path, "check --units")
    number = 0
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while lines := file.readlines(KM_BYTES):
            try:  # twice as fast as line by line
                if b"".join(lines).translate(None, DIGITS_AND_SPACE):  # pyarrow reads 0x10, too
                    raise pa.ArrowInvalid
                words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(pa.array(lines, pa.string())))
                units = words.flatten().cast(pa.uint32()).to_numpy()
                if units.max(initial=0) >= num_units:
                    raise pa.ArrowInvalid
                yield from dsu.split_units(units, words.value_lengths().to_numpy().cumsum(dtype="i8"))
            except pa.ArrowInvalid:  # an empty line, or one to be named
                for count, line in enumerate(lines, number + 1):
                    yield dsu.to_text(dsu.parse_km(line, num_units, f"{path}:{count}"))
            number += len(lines)


def read_corpus(paths: list[Path], num_units: int, collapse: bool) -> Iterator[str]:
    """Stream the utterances of units folders, Parquet files and .km files, as private-use text."""
    for path in paths:
        is_km = path.is_file() and path.suffix != ".parquet"
        for text in read_km(path, num_units) if is_km else read_unit_texts(path, num_units):
            yield "".join(dsu.collapse(text)) if collapse else text


class Sample:
    """Keeps, of utterances that come with random keys, those with the lowest, as many as a budget of units holds.

    Their number need not be known beforehand, and memory is that of the sample.
    """

    def __init__(self, max_units: int):
        self.max_units, self.units = max_units, 0
        self._heap: list[tuple[float, int, str]] = []  # (-key, -position, text): the highest key on top
        self._border = 2.0  # keys from here on no longer fit

    def add(self, key: float, position: int, text: str) -> None:
        """Show the sample one utterance, of key 0..1."""
        if 0 < len(text) <= self.max_units and key < self._border:  # one that never fits must not push others out
            heapq.heappush(self._heap, (-key, -position, text))
            self.units += len(text)
            self.shrink(self.max_units)

    def shrink(self, max_units: int) -> None:
        """Give up the highest keys until the budget is kept."""
        while self.units > max_units:
            key, _, text = heapq.heappop(self._heap)
            self.units -= len(text)
            self._border = -key

    def texts(self) -> dict[int, str]:
        """The sampled utterances by position, in the order of the corpus."""
        return dict(sorted((-position, text) for _, position, text in self._heap))


def draw(corpus: Iterator[str], max_units: int, share: float, seed: int) -> tuple[list[str], list[str], dict]:
    """Draw utterances to train on and others to measure on: the lowest and the highest of random keys.

    Returns:
        Training texts (at most ``max_units`` units), held-out texts (that share of the corpus and of ``max_units``, at
        most; none from a corpus that is too small for that), and counts of what was read.
    """
    from tqdm import tqdm

    generator = random.Random(seed)
    sample, held_out = Sample(max_units), Sample(min(int(max_units * share), MAX_HELD_OUT))
    seen = {"utterances": 0, "empty_utterances": 0, "units": 0}
    for text in tqdm(corpus, unit=" utterances", desc="reading", mininterval=1):
        key = generator.random()
        sample.add(key, seen["utterances"], text)
        held_out.add(1 - key, seen["utterances"], text)
        seen["utterances"] += 1
        seen["units"] += len(text)
        if not text:
            seen["empty_utterances"] += 1
    held_out.shrink(int(seen["units"] * share))
    held = held_out.texts()
    return [text for position, text in sample.texts().items() if position not in held], list(held.values()), seen


# --- Training -------------------------------------------------------------------------------------
def train_sentencepiece(texts: list[str], vocab_size: int, log: Path):
    """Train SentencePiece BPE; returns its proto: <unk>, merges, the texts' characters; ``vocab_size`` + 1 at most.

    Raises:
        RuntimeError: SentencePiece left utterances out.
    """
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    logged = log.stat().st_size if log.is_file() else 0
    model = io.BytesIO()
    with quiet(log):
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=1 + vocab_size,  # 1: it needs an <unk>. Units that the texts lack leave room for more merges
            # Longer lines would be dropped with no more than a line in the log.
            max_sentence_length=max(LEAST_SENTENCE_BYTES, UTF8_BYTES * max(map(len, texts)) + 1),
            minloglevel=0,
            **UNIT_BPE,
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
    merges = [piece.piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
    del merges[vocab_size - num_units :]  # the first k are the BPE with k merges
    if len(merges) != vocab_size - num_units:
        raise UserError(
            f"--vocab_size {vocab_size} is more than this corpus gives: {num_units} units and {len(merges)} merges",
            f"give more data, a larger --max_units, or --vocab_size {num_units + len(merges)}",
        )
    del proto.pieces[1:]
    for rank, text in enumerate([*merges, *dsu.to_text(range(num_units))]):
        piece = proto.pieces.add(piece=text, score=-rank)
        piece.type = piece.NORMAL
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


# --- The report -----------------------------------------------------------------------------------
def compression(proto, num_units: int, texts: list[str], measured_on: str) -> list[dict]:
    """Units a token on some texts, of a completed proto and of what it was after fewer merges.

    BPE learns its merges one after another, so its first k are the BPE with k merges.
    """
    from sentencepiece import SentencePieceProcessor

    most = len(proto.pieces) - 1 - num_units
    num_read = sum(map(len, texts))
    rows = []
    for merges in sorted({round(most * share) for share in SMALLER}):
        smaller = type(proto)()
        smaller.CopyFrom(proto)
        del smaller.pieces[1 + merges : 1 + most]
        encoder = SentencePieceProcessor(model_proto=smaller.SerializeToString())
        tokens = sum(map(len, encoder.encode(texts)))
        row = {"vocab_size": num_units + merges, "merges": merges, "units": num_read, "tokens": tokens}
        rows.append({**row, "units_per_token": round(num_read / tokens, 4), "measured_on": measured_on})
    return rows


def draw_compression(rows: list[dict], measured_on: str, path: Path) -> None:
    """Plot ``compression``'s rows."""
    from matplotlib.figure import Figure  # pyplot, for windows, would take half a second more

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["vocab_size"] for row in rows], [row["units_per_token"] for row in rows], marker="o")
    axes.set(xlabel="vocabulary (units and merges)", ylabel="units a token", title=f"Measured on {measured_on}")
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})  # the same bytes from every version


# --- The stage ------------------------------------------------------------------------------------
def check_sizes(num_units: int, vocab_size: int, max_units: int, held_out: float) -> None:
    """Raise UserError unless these arguments of ``train_bpe`` fit together."""
    dsu.check_num_units(num_units)
    if vocab_size < num_units:
        raise UserError(
            f"--vocab_size {vocab_size} is smaller than --num_units {num_units}: every unit is a piece",
            f"give at least {num_units}, which means no merges",
        )
    if max_units < 1:
        raise UserError(f"--max_units {max_units} is not positive", "20000000 takes 2 GB")
    if not 0 <= held_out < 1:
        raise UserError(f"--held_out {held_out} is no share", "give 0.01 for a hundredth of the corpus, 0 for nothing")


def write_report(work, rows: list[dict], measured_on: str) -> None:
    """Write compression.csv and .png, and print the rows of ``compression``."""
    with work.publish("compression.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with work.publish("compression.png") as path:
        draw_compression(rows, measured_on, path)
    print(f"units a token on {measured_on}:")
    for row in rows:
        print(f"  vocabulary {row['vocab_size']:>7,} ({row['merges']:>6,} merges): {row['units_per_token']:.3f}")


def write_bpe(work, proto, num_units: int, counts: dict) -> None:
    """Write the unit BPE: units_bpe.model, .vocab and .json."""
    with work.publish("units_bpe.model") as path:
        path.write_bytes(proto.SerializeToString(deterministic=True))
    with work.publish("units_bpe.vocab") as path, open(path, "w", encoding="utf-8") as file:
        for piece in proto.pieces[1:]:
            file.write(f"{' '.join(map(str, dsu.from_text(piece.piece, num_units)))}\t{piece.score:g}\n")
    facts = {"num_units": num_units, "offset": dsu.OFFSET, "vocab_size": num_units + counts["merges"]}
    facts |= {"counts": counts, "corpora_sha256": work.request["inputs"]["units"]}
    write_json(work.output_dir / "units_bpe.json", facts)


def train_bpe(
    units: list[Path],
    num_units: int,
    output_dir: Path,
    vocab_size: int = 8000,
    max_units: int = 20_000_000,
    held_out: float = 0.01,
    collapse: bool = False,
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
        held_out: Share of the corpus (at most of max_units, and 500,000 units) that is kept from training, to report
            compression on; 0: report on some of the training utterances.
        collapse: Drop consecutive repeats. label_audio.py has done it already; .km files may hold one id a frame.
        seed: Seed of the sample.
        overwrite: Replace the output of a run with other arguments.
    """
    arguments = dict(locals())
    check_sizes(num_units, vocab_size, max_units, held_out)
    check_one_kmeans(units)
    with stage(__file__, output_dir, arguments, inputs=["units"]) as work:
        if work.done:
            return
        texts, apart, seen = draw(read_corpus(units, num_units, collapse), max_units, held_out, seed)
        if not seen["units"]:
            where = ", ".join(map(str, units))
            raise UserError(f"{where}: no units in {seen['utterances']} utterances", "check --units")
        if not texts:
            raise UserError(f"--max_units {max_units} is less than one utterance", "raise it; 20000000 takes 2 GB")
        sampled = sum(map(len, texts))
        print(f"training on {sampled:,} of {seen['units']:,} units ({sampled / seen['units']:.1%})", flush=True)
        # SentencePiece trains on one core: meanwhile the plot's library is loaded, which takes half a second.
        threading.Thread(target=importlib.import_module, args=["matplotlib.figure"]).start()
        proto = train_sentencepiece(texts, vocab_size, output_dir / "sentencepiece.log")
        complete(proto, num_units, vocab_size)
        measured, measured_on = apart, f"{len(apart):,} held-out utterances"
        if not apart:
            measured_on = "training utterances (none are held out)"
            measured, _, _ = draw(iter(texts), MAX_HELD_OUT, 0, seed)
            if held_out:
                print(f"note: no utterance is as small as {held_out:.2%} of the corpus: none are held out", flush=True)
        rows = compression(proto, num_units, measured, measured_on)
        counts = {
            **seen,
            "sampled_utterances": len(texts),
            "sampled_units": sampled,
            "share_sampled": round(sampled / seen["units"], 6),
            "held_out_utterances": len(apart),
            "merges": vocab_size - num_units,
            "units_per_token": rows[-1]["units_per_token"],
            "measured_on": measured_on,
        }
        write_report(work, rows, measured_on)
        write_bpe(work, proto, num_units, counts)
        work.counts.update(counts)
        print(f"{num_units:,} units + {counts['merges']:,} merges: {output_dir}")


if __name__ == "__main__":
    run(train_bpe)
