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
import os
import random
import shutil
import sys
from pathlib import Path

from benchmarks.measure import measure
from towerspeech import units as dsu
from towerspeech.command import UserError, run
from towerspeech.files import read_json
from towerspeech.units_parquet import shard_name, write_units

REPO = Path(__file__).resolve().parent.parent
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
def call(script: str, output_dir: Path, *words) -> dict:
    """Run a script of the repo; its seconds from outside, its peak memory, and the machine's load before it."""
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, REPO / script, *words, "--output_dir", output_dir]
    print(" ".join(["$ python", script, *map(str, command[2:])])[:300], flush=True)
    load = os.getloadavg()[0]
    seconds, memory = measure(command, output_dir.with_suffix(".log"))
    return {"s": seconds, "gb": memory / 2**30, "load": load}


def line(name: str, ours: dict, theirs: dict, goal: float | None, units: int | None = None, **facts) -> dict:
    """One comparison: in seconds, or with ``units`` in units a second. ``goal`` is the least ratio."""
    told = [units / side["s"] if units else side["s"] for side in (ours, theirs)]
    ratio = theirs["s"] / ours["s"]
    return {
        "name": name,
        **{key: round(value, 0 if units else 2) for key, value in zip(("ours", "theirs"), told, strict=True)},
        "unit": "units/s" if units else "s",
        "ratio": round(ratio, 2),
        "goal": goal and round(goal, 2),
        "holds": None if goal is None else ratio >= goal and facts.get("same", True),
        **{f"{key}_gb": round(side["gb"], 2) for key, side in (("our", ours), ("their", theirs))},
        "load": round(ours["load"], 1),
        **facts,
    }


def bench_training(corpus: Path, units: int, output_dir: Path) -> list[dict]:
    """Ours from .km and from Parquet, SentencePiece's from a text file: whole runs in turn, the best of three each.

    The tokenizers trainer comes after them: during its minute a virtual machine may give its free memory back to its
    host, and who runs next waits for it.
    """
    words = ["--num_units", NUM_UNITS, "--vocab_size", VOCAB_SIZE, "--max_units", units]
    rounds = [("sentencepiece", "corpus.km", "units")] * TIMES + [("tokenizers",)] * TIMES
    runs = {name: [] for name in ("sentencepiece", "corpus.km", "units", "tokenizers")}
    for name in (name for names in rounds for name in names):
        if name in ("sentencepiece", "tokenizers"):
            script, source = "benchmarks/other_tokenizers.py", ["--way", name, "--source", corpus / "corpus.txt"]
        else:
            script, source = "train_bpe_tokenizer/train_bpe.py", ["--units", corpus / name, *words]
        target = output_dir / (f"ours_{Path(name).stem}" if script.startswith("train") else name)
        runs[name].append(call(script, target, *source))
    best = {name: min(found, key=lambda run: run["s"]) for name, found in runs.items()}
    return [
        line(f"training from {told}, beside {way}", best[source], best[way], goal)
        for source, told in (("corpus.km", ".km"), ("units", "Parquet"))
        for way, goal in (("sentencepiece", 1 / 1.2), ("tokenizers", None))
    ]


def bench_encoding(name: str, tokenizer: Path, corpus: Path, units: int, output_dir: Path) -> list[dict]:
    """build_mixture.py beside the tokenizer called line by line, for one tokenizer; the best of three runs each."""
    source = {"name": "speech", "kind": "speech", "paths": [str(corpus / "units")], "budget": 1}
    our_words = ["--tokenizer", tokenizer, "--sources", json.dumps([source])]
    their_words = ["--way", "lines", "--source", corpus / "units", "--tokenizer", tokenizer]
    sides = {"ours": [], "our calls": [], "theirs": [], "their calls": []}
    for _ in range(TIMES):
        whole = call("benchmarks/other_tokenizers.py", output_dir / "lines", *their_words)
        seconds = read_json(output_dir / "lines/seconds.json", "run again")["seconds"]
        sides["theirs"].append(whole)
        sides["their calls"].append({**whole, "s": seconds})
        whole = call("data_mixture/build_mixture.py", output_dir / "mixture", *our_words)
        counts = read_json(output_dir / "mixture/run_info.json", "run again")["counts"]
        sides["ours"].append(whole)
        sides["our calls"].append({**whole, "s": counts["last_attempt"]["tokenize_s"]})
    best = {side: min(runs, key=lambda found: found["s"]) for side, runs in sides.items()}
    facts = {
        "units": units,
        "same": filecmp.cmp(output_dir / "lines/tokens.bin", output_dir / "mixture/speech.bin", False),
    }
    title = f"encoding, {name}"
    return [
        line(f"{title}: tokenization beside the calls alone", best["our calls"], best["their calls"], 5.0, **facts),
        line(f"{title}: whole run", best["ours"], best["theirs"], None, **facts),
    ]


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
            call("train_bpe_tokenizer/merge_tokenizer.py", folder / "tokenizer", *words)
            lines += bench_encoding(name, folder / "tokenizer", corpus, units, folder)
    for told in lines:
        print(json.dumps(told))


if __name__ == "__main__":
    run(bench_tokenizer)
