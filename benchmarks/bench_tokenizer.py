"""Time the unit BPE's training and the encoding of unit corpora beside SentencePiece's and tokenizers' own calls.

Usage: python benchmarks/bench_tokenizer.py --output_dir runs/bench_tokenizer
       python benchmarks/bench_tokenizer.py --output_dir runs/bench_tokenizer --smollm2 models/smollm2

Makes a corpus of synthetic units with transcripts (K = 5000, utterances of 200-1500 units), as .km, as text and as
units Parquet, and compares, all sides in one run, each in a process of its own
  training  train_bpe.py, the whole run, beside one SentencePiece call and beside the tokenizers library's trainer
  encoding  build_mixture.py's tokenization beside calling the fast tokenizer line by line; for a 32,000-piece
            SentencePiece tokenizer (mistral-common's) and for SmolLM2's byte-level one
and ends with one JSON line a comparison. ``ratio`` is how many times as fast ours is. Training has to be within 1.2
times SentencePiece's seconds (0.83 times as fast), encoding 5 times as fast, with the same tokens.
"""

import filecmp
import json
from pathlib import Path

from benchmarks.corpora import NUM_UNITS, write_unit_corpus
from benchmarks.measure import apart, comparison, copy_mistral_tokenizer, report, run_script
from benchmarks.other_tokenizers import line_by_line, with_sentencepiece, with_tokenizers
from towerspeech.command import run
from towerspeech.files import publish, read_json

VOCAB_SIZE = 8000
TIMES = 3  # the best of so many runs counts, for each side: other work on the machine only ever adds to it


# --- Running --------------------------------------------------------------------------------------
def bench_training(corpus: Path, units: int, output_dir: Path) -> list[dict]:
    """Ours from .km and from Parquet, SentencePiece's from a text file: whole runs in turn, the best of three each.

    The tokenizers trainer comes after them: during its minute a virtual machine may give its free memory back to its
    host, and who runs next waits for it.
    """
    output_dir.mkdir(exist_ok=True)
    sizes = ["--num_units", NUM_UNITS, "--vocab_size", VOCAB_SIZE, "--max_units", units]
    theirs = [corpus / "corpus.txt", VOCAB_SIZE, output_dir]
    runs = {"sentencepiece": [], ".km": [], "Parquet": [], "tokenizers": []}
    for _ in range(TIMES):
        runs["sentencepiece"].append(apart(with_sentencepiece, *theirs)[0])
        for name, source in ((".km", corpus / "corpus.km"), ("Parquet", corpus / "units")):
            out = output_dir / source.stem
            runs[name].append(run_script("train_bpe_tokenizer/train_bpe.py", out, "--units", source, *sizes).seconds)
    for _ in range(TIMES):
        runs["tokenizers"].append(apart(with_tokenizers, *theirs)[0])
    seconds = {name: min(took) for name, took in runs.items()}
    return [
        comparison(f"training from {source}, beside {way}", seconds[source], seconds[way], goal)
        for source in (".km", "Parquet")
        for way, goal in (("sentencepiece", 1 / 1.2), ("tokenizers", None))
    ]


def bench_encoding(name: str, tokenizer: Path, corpus: Path, units: int, output_dir: Path) -> dict:
    """build_mixture.py beside the tokenizer called line by line, for one tokenizer; the best of three runs each."""
    source = {"name": "speech", "kind": "speech", "paths": [str(corpus / "units")], "budget": 1}
    our_words = ["--tokenizer", tokenizer, "--sources", json.dumps([source])]
    our_words += ["--reserve", 1e12, "--validation_tokens", 0]  # all there is, in its order
    ours, theirs = [], []
    for _ in range(TIMES):
        theirs.append(apart(line_by_line, corpus / "units", tokenizer, output_dir / "lines.bin")[1])
        run_script("data_mixture/build_mixture.py", output_dir / "mixture", *our_words)
        counts = read_json(output_dir / "mixture/run_info.json", "run again")["counts"]
        ours.append(counts["last_attempt"]["tokenize_s"])
    same = filecmp.cmp(output_dir / "lines.bin", output_dir / "mixture/speech.bin", False)
    rates = {"our_units_per_s": round(units / min(ours)), "their_units_per_s": round(units / min(theirs))}
    return comparison(f"encoding, {name}", min(ours), min(theirs), 5.0, same, **rates)


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
        with publish(corpus) as folder:
            apart(write_unit_corpus, units, folder)
    lines = bench_training(corpus, units, output_dir / "training")
    copy_mistral_tokenizer(output_dir / "mistral")
    bases = {"mistral-common's SentencePiece": output_dir / "mistral", "SmolLM2": smollm2}
    for name, base in bases.items():
        if base:
            folder = output_dir / f"encoding_{base.name}"
            words = ["--base", base, "--units_bpe", output_dir / "training/units"]
            run_script("train_bpe_tokenizer/merge_tokenizer.py", folder / "tokenizer", *words)
            lines.append(bench_encoding(name, folder / "tokenizer", corpus, units, folder))
    report(lines)


if __name__ == "__main__":
    run(bench_tokenizer)
