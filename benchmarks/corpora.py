"""Synthetic corpora of a seed: units with transcripts, and text of the words of a vocabulary by Zipf's law."""

import gzip
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.measure import REPO
from towerspeech import units as dsu
from towerspeech.units_parquet import shard_name, write_units

NUM_UNITS = 5000
UNITS_A_WORD = 14  # about 35 units and 2.5 words a second
NUM_SHARDS = 8
NUM_WORDS = 50_000
SHORTEST, LONGEST = 20, 2000  # words of a text; their logarithm is spread evenly, so that the mean is 430
WORDS_A_SENTENCE, WORDS_A_COMMA, WORDS_A_PARAGRAPH = 18, 12, 120
TEXTS_AT_ONCE = 2000


# --- Units ----------------------------------------------------------------------------------------
def make_utterances(num_units: int, seed: int = 0) -> list:
    """Random walks over 5000 units, 200-1500 steps each, ``num_units`` in all: each unit has four likely successors.

    Returns:
        Arrays of unit ids, (length,) uint16, without repeats.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    lengths = generator.integers(200, 1501, num_units // 200 + 1)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), num_units)) + 1]
    lengths[-1] -= max(0, int(lengths.sum()) - num_units)
    lengths = np.sort(lengths)[::-1]  # so that the walks that still go on come first
    successors = generator.integers(0, NUM_UNITS, (NUM_UNITS, 4))
    walks = np.empty((lengths[0], len(lengths)), np.uint16)
    walks[0] = generator.integers(0, NUM_UNITS, len(lengths))
    for step in range(1, len(walks)):
        going = int(np.count_nonzero(lengths > step))
        last = walks[step - 1, :going].astype(np.int64)
        likely = successors[last, generator.choice(4, going, p=[0.5, 0.25, 0.15, 0.1])]
        unit = np.where(generator.random(going) < 0.6, likely, generator.integers(0, NUM_UNITS, going))
        walks[step, :going] = np.where(unit == last, (unit + 1) % NUM_UNITS, unit)
    order = generator.permutation(len(lengths))
    return [walks[: lengths[index], index].copy() for index in order]


def write_unit_corpus(num_units: int, folder: Path) -> None:
    """Write corpus.km, corpus.txt and units/, the same utterances in each."""
    folder.mkdir(parents=True)
    utterances = [utterance.tolist() for utterance in make_utterances(num_units)]
    with open(folder / "corpus.km", "w") as km, open(folder / "corpus.txt", "w", encoding="utf-8") as text:
        for utterance in utterances:
            km.write(" ".join(map(str, utterance)) + "\n")
            text.write(dsu.to_text(utterance) + "\n")
    generator, words = random.Random(0), (REPO / "LICENSE").read_text().split()
    rows = [
        {
            "id": f"utt{index:06d}",
            "audio": f"utt{index:06d}.wav",
            "language": "en",
            "duration_s": len(utterance) / 35,
            "units": utterance,
            "text": " ".join(generator.choices(words, k=len(utterance) // UNITS_A_WORD)) + ".",
        }
        for index, utterance in enumerate(utterances)
    ]
    (folder / "units").mkdir()
    for shard in range(NUM_SHARDS):
        write_units(folder / "units" / f"{shard_name(shard, NUM_SHARDS)}.parquet", rows[shard::NUM_SHARDS])


# --- Text -----------------------------------------------------------------------------------------
def make_words(tokenizer: Path, generator) -> list[str]:
    """Words in the order of their frequency, from the pieces of a SentencePiece model, which are in theirs.

    Frequent words are pieces; rarer ones are put together of two to four of them, so that a word has about as many
    tokens as in real text (1.3 to 1.5 for English).
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    pieces = [piece for piece in pieces if piece[-1:].islower() and max(piece[1:] or "a") < "\u0250"]
    words = [piece[1:] for piece in pieces if piece[0] == "\u2581" and piece[1:].isalpha() and piece[1:].islower()]
    ends = [piece for piece in pieces if piece.isalpha() and piece.islower()]
    known = dict.fromkeys(words)  # which keeps their order
    while len(known) < NUM_WORDS:
        begin = words[int(generator.integers(len(words)))]
        more = generator.integers(len(ends), size=min(3, int(generator.geometric(0.65))))
        known["".join([begin, *(ends[index] for index in more)])] = None
    return [*known]


def make_texts(num_words: int, tokenizer: Path, seed: int = 0) -> Iterator[str]:
    """Distinct texts of sentences and paragraphs, ``num_words`` in all or a few more."""
    import numpy as np

    generator = np.random.default_rng(seed)
    words = make_words(tokenizer, generator)
    # How often a word comes, and as what: itself, or with what follows it. Capitals make other words of the same.
    forms = [[f"{word}{end}" for word in words] for end in (" ", ", ", ". ", ".\n")]
    forms += [[f"{word.capitalize()} " for word in words]]
    forms = np.array([form for each in forms for form in each], object)
    cumulated = np.cumsum(1 / (np.arange(len(words)) + 2.7))  # Mandelbrot's form of the law
    cumulated /= cumulated[-1]
    made = 0
    while made < num_words:
        lengths = np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST), TEXTS_AT_ONCE)).astype(int)
        ends = np.cumsum(lengths)
        number = np.searchsorted(cumulated, generator.random(ends[-1]))
        drawn = generator.random(ends[-1])
        kind = np.zeros(ends[-1], int)
        kind[drawn < 1 / WORDS_A_COMMA + 1 / WORDS_A_SENTENCE] = 1
        kind[drawn < 1 / WORDS_A_SENTENCE] = 2
        kind[drawn < 1 / WORDS_A_PARAGRAPH] = 3
        kind[ends - 1] = 2
        first = np.concatenate([[0], np.flatnonzero(kind >= 2)[:-1] + 1])  # of a sentence
        kind[first[kind[first] < 2]] = 4
        spoken = forms[kind * len(words) + number].tolist()
        start = 0
        for end in ends.tolist():
            if made >= num_words:
                return
            yield "".join(spoken[start:end]).strip()
            made += end - start
            start = end


def write_text_corpus(num_words: int, tokenizer: Path, folder: Path, parquet: bool) -> None:
    """Write texts as NUM_SHARDS files of JSONL.gz, and as Parquet if wanted: neighbours lie in different files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    held = [[] for _ in range(NUM_SHARDS)]
    with ExitStack() as closing:
        names = [folder / f"text-{shard}.jsonl.gz" for shard in range(NUM_SHARDS)]
        files = [closing.enter_context(gzip.open(name, "wt", 1, encoding="utf-8")) for name in names]
        for index, text in enumerate(make_texts(num_words, tokenizer)):
            files[index % NUM_SHARDS].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if parquet:
                held[index % NUM_SHARDS].append(text)
    for shard, texts in enumerate(held):
        if parquet:
            table = pa.table({"text": texts})
            pq.write_table(table, folder / f"text-{shard}.parquet", row_group_size=8192, compression="zstd")
