"""Time build_mixture.py beside datasets.map and Megatron's own preprocessing, and measure its memory at two sizes.

Usage: python benchmarks/bench_mixture.py --output_dir runs/bench_mixture

Makes synthetic text (JSONL.gz and Parquet) and units, and a 32,000-piece tokenizer with 5000 units, and compares
  speed   from Parquet, from JSONL.gz and from units to tokens on disk, at two processes and at one: whole runs, their
          start and imports included, beside (a) load_dataset, a batched map and a file of its ids, and (b) the loop of
          Megatron-LM's tools/preprocess_data.py with megatron-core's writer. All write the same bytes.
  memory  of build_mixture.py from JSONL.gz at 10 and at 100 million tokens: of the process that reads, and of all
          together
and ends with one JSON line a comparison. At two processes ours has to be three times as fast as the faster of the
others. datasets.map is run in its two ways to use two cores, two processes or one whose tokenizer has two threads, and
the faster counts. Memory is the kernel's peak of each process (VmHWM), summed; of the larger size it may be 1.2 times.
"""

import filecmp
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

from benchmarks.corpora import NUM_UNITS, write_text_corpus, write_unit_corpus
from benchmarks.measure import apart, comparison, copy_mistral_tokenizer, report, run_script
from benchmarks.other_mixtures import with_datasets, with_megatron
from towerspeech.command import run
from towerspeech.files import publish, read_json

VOCAB_SIZE = 8000  # of the units
TOKENS_A_WORD = 1.44  # of the text
FASTER = 3.0
LARGER = 1.2
LOOK_EVERY = 0.05  # seconds


def make(folder: Path, write: Callable, *arguments) -> Path:
    """Make a corpus, unless an earlier run has."""
    if not folder.is_dir():
        print(f"making {folder.name}", flush=True)
        with publish(folder) as path:
            apart(write, *arguments, path)
    return folder


def write_text(tokens: int, tokenizer: Path, parquet: bool, folder: Path) -> None:
    write_text_corpus(round(tokens / TOKENS_A_WORD), tokenizer, folder, parquet)


def make_tokenizer(units: Path, base: Path, folder: Path) -> Path:
    """Merge units into the tokenizer, with a BPE of the corpus."""
    sizes = ["--num_units", NUM_UNITS, "--vocab_size", VOCAB_SIZE, "--max_units", 5_000_000]
    run_script("train_bpe_tokenizer/train_bpe.py", folder / "units_bpe", "--units", units, *sizes)
    words = ["--base", base, "--units_bpe", folder / "units_bpe"]
    run_script("train_bpe_tokenizer/merge_tokenizer.py", folder / "tokenizer", *words)
    return folder / "tokenizer"


# --- Speed ----------------------------------------------------------------------------------------
def build(kind: str, paths: list[Path], tokenizer: Path, output_dir: Path, num_processes: int) -> float:
    """Seconds of build_mixture.py over all of a source."""
    source = {"name": "source", "kind": kind, "paths": list(map(str, paths)), "budget": 1}
    words = ["--tokenizer", tokenizer, "--sources", json.dumps([source]), "--num_processes", num_processes]
    whole = ["--reserve", 1e9, "--validation_tokens", 0]
    return run_script("data_mixture/build_mixture.py", output_dir, *words, *whole).seconds


def bench_speed(
    name: str, kind: str, files: list[Path], tokenizer: Path, output_dir: Path, processes: int, rounds: int
) -> list[dict]:
    """Run all sides in turns; the best of the rounds counts, for each side."""
    output_dir.mkdir(parents=True, exist_ok=True)
    datasets_ways = {"processes": [processes]}
    if processes > 1:
        datasets_ways["threads of one process"] = [1, True]
    took: dict[str, list[float]] = {}
    same = []

    def measured(way: str, seconds: float, tokens: Path) -> None:
        took.setdefault(way, []).append(seconds)
        if way != "ours":
            same.append(filecmp.cmp(output_dir / "mixture/source.bin", tokens, shallow=False))
        print(f"{name}, --num_processes {processes}, {way}: {seconds:.1f} s", flush=True)

    for _ in range(rounds):
        seconds = build(kind, files, tokenizer, output_dir / "mixture", processes)
        measured("ours", seconds, output_dir / "mixture/source.bin")
        tokens = output_dir / "megatron.bin"
        measured("megatron", apart(with_megatron, kind, files, tokenizer, tokens, processes)[0], tokens)
        tokens = output_dir / "datasets.bin"
        for way, words in datasets_ways.items():
            measured(way, apart(with_datasets, kind, files, tokenizer, tokens, *words)[0], tokens)
        fastest = min(datasets_ways, key=lambda way: min(took[way]))
        datasets_ways = {fastest: datasets_ways[fastest]}
    info = read_json(output_dir / "mixture/run_info.json", "run again")
    num_tokens, best = info["counts"]["source"], {way: min(seconds) for way, seconds in took.items()}
    lines = []
    for label, way in (("datasets.map", fastest), ("Megatron's preprocessing", "megatron")):
        goal = FASTER if processes > 1 and best[way] == min(best[way] for way in (fastest, "megatron")) else None
        facts = {"our_tokens_per_s": round(num_tokens / best["ours"]), "tokens": num_tokens}
        facts["their_tokens_per_s"] = round(num_tokens / best[way])
        if way == fastest:
            facts["fastest_way"] = way
        shown = f"{name}, --num_processes {processes}, beside {label}"
        lines.append(comparison(shown, best["ours"], best[way], goal, sum(same) / len(same), **facts))
    return lines


# --- Memory ---------------------------------------------------------------------------------------
class PeaksBelow:
    """While it is entered, follows the processes that this one starts, and those that they start.

    Attributes:
        peaks: The largest resident memory of each, in bytes, by its id.
        own: The ids of those that this process itself has started.
    """

    def __init__(self):
        self.peaks: dict[int, int] = {}
        self.own: set[int] = set()
        self.before = {*children(os.getpid())}  # a helper of multiprocessing's, say
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.follow)

    def __enter__(self) -> "PeaksBelow":
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.thread.join()

    def follow(self) -> None:
        while not self.ended.wait(LOOK_EVERY):
            coming = [process for process in children(os.getpid()) if process not in self.before]
            self.own.update(coming)
            for process in coming:  # which grows
                if peak := resident_peak(process):
                    self.peaks[process] = peak
                coming += children(process)


def children(process: int) -> list[int]:
    """The processes that the threads of a process have started; none if it has ended."""
    told = []
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            told += map(int, thread.read_text().split())
        except OSError:
            continue
    return told


def resident_peak(process: int) -> int | None:
    """The kernel's VmHWM of a process in bytes; None if it has ended."""
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return None
    return int(peak[1]) * 1024 if peak else None


def bench_memory(corpora: list[Path], tokenizer: Path, output_dir: Path) -> list[dict]:
    """build_mixture.py at two processes: the smaller size's peaks beside the larger's."""
    reading, together, tokens = [], [], []
    for corpus in corpora:
        folder = output_dir / corpus.name
        with PeaksBelow() as below:
            build("text", sorted(corpus.glob("*.jsonl.gz")), tokenizer, folder, 2)
        reading.append(sum(below.peaks.get(process, 0) for process in below.own) / 1e6)
        together.append(sum(below.peaks.values()) / 1e6)
        tokens.append(read_json(folder / "run_info.json", "run again")["counts"]["source"])
        print(f"{corpus.name}: MB by process {[round(peak / 1e6) for peak in below.peaks.values()]}", flush=True)
    facts = {"unit": "MB", "tokens": tokens[1], "their_tokens": tokens[0]}
    return [
        comparison("memory of the process that reads, beside a smaller size's", *reading[::-1], 1 / LARGER, **facts),
        comparison("memory of all processes, beside a smaller size's", *together[::-1], 1 / LARGER, **facts),
    ]


def bench_mixture(
    output_dir: Path,
    tokens: int = 5_000_000,
    rounds: int = 2,
    small_tokens: int = 10_000_000,
    large_tokens: int = 100_000_000,
) -> None:
    """Run the comparisons.

    Args:
        output_dir: Scratch folder.
        tokens: Size of each source whose encoding is timed, or nearly.
        rounds: How often each side runs at two processes; at one it runs once.
        small_tokens: Size of the smaller of the sources whose memory is measured.
        large_tokens: Size of the larger one.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of ours: at one process, too, a process is a core
    output_dir = output_dir.resolve()
    copy_mistral_tokenizer(output_dir / "mistral")
    units = make(output_dir / f"units_{tokens}", write_unit_corpus, tokens)
    text = make(output_dir / f"text_{tokens}", write_text, tokens, output_dir / "mistral", True)
    tokenizer = make_tokenizer(units / "units", output_dir / "mistral", output_dir)
    inputs = {
        "Parquet": ("text", sorted(text.glob("*.parquet"))),
        "JSONL.gz": ("text", sorted(text.glob("*.jsonl.gz"))),
        "units": ("speech", sorted((units / "units").glob("*.parquet"))),
    }
    lines = []
    for name, (kind, files) in inputs.items():
        for processes, times in ((2, rounds), (1, 1)):
            folder = output_dir / f"speed_{name}"
            lines += bench_speed(f"from {name}", kind, files, tokenizer, folder, processes, times)
    corpora = [
        make(output_dir / f"text_gz_{size}", write_text, size, output_dir / "mistral", False)
        for size in (small_tokens, large_tokens)
    ]
    report(lines + bench_memory(corpora, tokenizer, output_dir / "memory"))


if __name__ == "__main__":
    run(bench_mixture)
