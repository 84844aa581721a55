"""Time the unit BPE's training and the encoding of unit corpora beside SentencePiece's and tokenizers' own calls.

Usage: python benchmarks/bench_tokenizer.py --output_dir runs/bench_tokenizer
       python benchmarks/bench_tokenizer.py --output_dir runs/bench_tokenizer --smollm2 models/smollm2

Makes a corpus of synthetic units with transcripts (K = 5000, utterances of 200-1500 units), as .km, as text and as
units Parquet, and compares, all sides in one run, each in a process of its own
  training  train_bpe.py, the whole run, beside one SentencePiece call and beside the tokenizers library's trainer
  encoding  build_mixture.py, and its tokenization alone, beside calling the fast tokenizer line by line; for a
            32,000-piece SentencePiece tokenizer (mistral-common's) and for SmolLM2's byte-level one
and ends with one JSON line a comparison. ``ratio`` is how many times as fast ours is. Training has to be within 1.2
times SentencePiece's seconds (0.83 times as fast), encoding 5 times as fast, with the same tokens. ``load`` is the
machine's over the last minute when our side began: above 1, others were at work.
"""

import filecmp
import importlib.util
import json
import multiprocessing
import random
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Measured, comparison, run_script
from towerspeech import units as dsu
from towerspeech.command import UserError, run
from towerspeech.files import read_json
from towerspeech.units_parquet import shard_name, write_units

NUM_UNITS, VOCAB_SIZE = 5000, 8000
UNITS_A_WORD = 14  # about 35 units and 2.5 words a second
NUM_SHARDS = 8
TIMES = 3  # the best of so many runs counts, for each side: other work on the machine only ever adds to it
WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were her all she there would their we him been has when who will more no if out so said what up its about into
than them can only other new some could time these two may then do first any my now such like our over man even most
made after also did many before must through years where much your way well down should because each just those people
how too little state good very make world still own see men work long get here between both life being under never day
same another know while last might us great old year off come since against go came right used take three
"""


# --- The corpus -----------------------------------------------------------------------------------
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


def write_corpus(num_units: int, folder: Path) -> None:
    """Write corpus.km, corpus.txt and units/, the same utterances in each."""
    folder.mkdir(parents=True)
    utterances = [utterance.tolist() for utterance in make_utterances(num_units)]
    with open(folder / "corpus.km", "w") as km, open(folder / "corpus.txt", "w", encoding="utf-8") as text:
        for utterance in utterances:
            km.write(" ".join(map(str, utterance)) + "\n")
            text.write(dsu.to_text(utterance) + "\n")
    generator, words = random.Random(0), WORDS.split()
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


# --- Running --------------------------------------------------------------------------------------
def fastest(runs: list[Measured]) -> Measured:
    """The run that counts."""
    return min(runs, key=lambda run: run.seconds)


def line(name: str, ours: Measured, theirs: Measured, goal: float | None, **facts) -> dict:
    """One comparison, with memory and load."""
    memory = {"our_gb": round(ours.memory_gb, 2), "their_gb": round(theirs.memory_gb, 2), "load": round(ours.load, 1)}
    return comparison(name, ours.seconds, theirs.seconds, goal, **memory, **facts)


def bench_training(corpus: Path, units: int, output_dir: Path) -> list[dict]:
    """Ours from .km and from Parquet, SentencePiece's from a text file: whole runs in turn, the best of three each.

    The tokenizers trainer comes after them: during its minute a virtual machine may give its free memory back to its
    host, and who runs next waits for it.
    """
    ours, theirs = "train_bpe_tokenizer/train_bpe.py", "benchmarks/other_tokenizers.py"
    sizes = ["--num_units", NUM_UNITS, "--vocab_size", VOCAB_SIZE, "--max_units", units]
    text = ["--source", corpus / "corpus.txt"]
    runs = {"sentencepiece": [], "corpus.km": [], "units": [], "tokenizers": []}
    for _ in range(TIMES):
        way = "sentencepiece"
        runs[way].append(run_script(theirs, output_dir / way, "--way", way, *text))
        for source in ("corpus.km", "units"):
            out = output_dir / f"ours_{Path(source).stem}"
            runs[source].append(run_script(ours, out, "--units", corpus / source, *sizes))
    for _ in range(TIMES):
        way = "tokenizers"
        runs[way].append(run_script(theirs, output_dir / way, "--way", way, *text))
    return [
        line(f"training from {told}, beside {way}", fastest(runs[source]), fastest(runs[way]), goal)
        for source, told in (("corpus.km", ".km"), ("units", "Parquet"))
        for way, goal in (("sentencepiece", 1 / 1.2), ("tokenizers", None))
    ]


def bench_encoding(name: str, tokenizer: Path, corpus: Path, units: int, output_dir: Path) -> list[dict]:
    """build_mixture.py beside the tokenizer called line by line, for one tokenizer; the best of three runs each."""
    source = {"name": "speech", "kind": "speech", "paths": [str(corpus / "units")], "budget": 1}
    our_words = ["--tokenizer", tokenizer, "--sources", json.dumps([source])]
    their_words = ["--way", "lines", "--source", corpus / "units", "--tokenizer", tokenizer]
    ours, our_calls, theirs, their_calls = [], [], [], []
    for _ in range(TIMES):
        whole = run_script("benchmarks/other_tokenizers.py", output_dir / "lines", *their_words)
        theirs.append(whole)
        seconds = read_json(output_dir / "lines/seconds.json", "run again")["seconds"]
        their_calls.append(replace(whole, seconds=seconds))
        whole = run_script("data_mixture/build_mixture.py", output_dir / "mixture", *our_words)
        ours.append(whole)
        counts = read_json(output_dir / "mixture/run_info.json", "run again")["counts"]
        our_calls.append(replace(whole, seconds=counts["last_attempt"]["tokenize_s"]))
    same = filecmp.cmp(output_dir / "lines/tokens.bin", output_dir / "mixture/speech.bin", False)
    lines = []
    for what, mine, other, goal in (
        ("tokenization beside the calls alone", fastest(our_calls), fastest(their_calls), 5.0),
        ("whole run", fastest(ours), fastest(theirs), None),
    ):
        told = line(f"encoding, {name}: {what}", mine, other, goal, equal=same, units=units, same=same)
        rates = {"ours": round(units / mine.seconds), "theirs": round(units / other.seconds), "unit": "units/s"}
        lines.append({**told, **rates})
    return lines


def bench_tokenizer(output_dir: Path, units: int = 20_000_000, smollm2: Path | None = None) -> None:
    """Run the comparisons.

    Args:
        output_dir: Scratch folder.
        units: Size of the corpus.
        smollm2: Folder that tiny/make_smollm2.py wrote.
    """
    output_dir = output_dir.resolve()
    corpus = output_dir / f"corpus_{units}"
    if not corpus.is_dir():
        print(f"making {units:,} units", flush=True)
        # In a process of its own: a child's peak memory begins at its parent's.
        partial = corpus.with_name(f".{corpus.name}")
        shutil.rmtree(partial, ignore_errors=True)
        maker = multiprocessing.get_context("spawn").Process(target=write_corpus, args=(units, partial))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise UserError(f"the corpus could not be made: status {maker.exitcode}", "see above")
        partial.rename(corpus)
    lines = bench_training(corpus, units, output_dir / "training")
    mistral = output_dir / "mistral"
    mistral.mkdir(exist_ok=True)
    package = Path(importlib.util.find_spec("mistral_common").origin).parent
    shutil.copy(package / "data/tokenizer.model.v1", mistral / "tokenizer.model")
    for name, base in {"mistral-common's SentencePiece": mistral, "SmolLM2": smollm2}.items():
        if base:
            folder = output_dir / f"encoding_{Path(base).name}"
            words = ["--base", base, "--units_bpe", output_dir / "training/ours_units"]
            run_script("train_bpe_tokenizer/merge_tokenizer.py", folder / "tokenizer", *words)
            lines += bench_encoding(name, folder / "tokenizer", corpus, units, folder)
    for told in lines:
        print(json.dumps(told))


if __name__ == "__main__":
    run(bench_tokenizer)
