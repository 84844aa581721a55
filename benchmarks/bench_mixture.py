"""Time build_mixture.py beside datasets.map and Megatron's own preprocessing, and measure its memory at two sizes.

Usage: python benchmarks/bench_mixture.py --output_dir runs/bench_mixture

Makes synthetic text (JSONL.gz and Parquet) and units, and a 32,000-piece tokenizer with 5000 units, and compares
  speed   from Parquet, from JSONL.gz and from units to tokens on disk, at two processes and at one, beside (a)
          load_dataset, a batched map and a file of its ids, and (b) the loop of Megatron-LM's tools/preprocess_data.py
          with megatron-core's writer. All write the same bytes. The time is that of a whole run without its start
          (imports, the tokenizer), which a run on a few documents tells: a mixture is some hundred times as large.
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
FEW = 10_000  # tokens, of which a run is its start
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


def ways_of(kind: str, tokenizer: Path, output_dir: Path, processes: int) -> dict[str, Callable[[list[Path]], float]]:
    """The ways from files of a source to ``output_dir``, by name; each tells the seconds that it took."""
    ways = {"ours": lambda files: build(kind, files, tokenizer, output_dir / "ours", processes)}

    def add(name: str, function: Callable, *words) -> None:
        target = output_dir / f"{name}.bin"
        ways[name] = lambda files: apart(function, kind, files, tokenizer, target, *words)[0]

    add("megatron", with_megatron, processes)
    add("processes", with_datasets, processes)
    if processes > 1:
        add("threads of one process", with_datasets, 1, True)
    return ways


def bench_speed(
    name: str,
    kind: str,
    few: list[Path],
    files: list[Path],
    tokenizer: Path,
    output_dir: Path,
    processes: int,
    rounds: int,
) -> list[dict]:
    """Run all ways in turns, first on a few documents, which tells their start; the best of the rounds counts."""
    output_dir.mkdir(parents=True, exist_ok=True)
    ways = ways_of(kind, tokenizer, output_dir, processes)
    starts = {way: call(few) for way, call in ways.items()}
    took, same = {way: [] for way in ways}, []
    for _ in range(rounds):
        for way, call in ways.items():
            took[way].append(call(files))
            shown = f"{took[way][-1]:.1f} s, start {starts[way]:.1f} s"
            print(f"{name}, --num_processes {processes}, {way}: {shown}", flush=True)
            if way != "ours":
                same.append(filecmp.cmp(output_dir / "ours/source.bin", output_dir / f"{way}.bin", shallow=False))
    tokens = read_json(output_dir / "ours/run_info.json", "run again")["counts"]["source"]
    seconds = {way: min(took[way]) - starts[way] for way in ways}
    datasets_way = min(seconds.keys() - {"ours", "megatron"}, key=seconds.get)
    lines = []
    for label, way in (("datasets.map", datasets_way), ("Megatron's preprocessing", "megatron")):
        faster = seconds[way] == min(seconds[datasets_way], seconds["megatron"])
        facts = {
            "tokens": tokens,
            "our_tokens_per_s": round(tokens / seconds["ours"]),
            "their_tokens_per_s": round(tokens / seconds[way]),
            "our_start_s": round(starts["ours"], 1),
            "their_start_s": round(starts[way], 1),
        }
        if way == datasets_way:
            facts["fastest_way"] = way
        shown = f"{name}, --num_processes {processes}, beside {label}"
        goal = FASTER if processes > 1 and faster else None
        lines.append(comparison(shown, seconds["ours"], seconds[way], goal, sum(same) / len(same), **facts))
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
    tokens: int = 60_000_000,
    rounds: int = 1,
    small_tokens: int = 10_000_000,
    large_tokens: int = 100_000_000,
) -> None:
    """Run the comparisons.

    Args:
        output_dir: Scratch folder.
        tokens: Size of each source whose encoding is timed at two processes, or nearly.
        rounds: How often each side runs at two processes; at one it runs once.
        small_tokens: Size of those timed at one process, and of the smaller of those whose memory is measured.
        large_tokens: Size of the larger one.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of ours: at one process, too, a process is a core
    output_dir = output_dir.resolve()
    copy_mistral_tokenizer(output_dir / "mistral")
    sizes = (FEW, small_tokens, tokens)
    units = {n: make(output_dir / f"units_{n}", write_unit_corpus, n) / "units" for n in sizes}
    text = {n: make(output_dir / f"text_{n}", write_text, n, output_dir / "mistral", True) for n in sizes}
    tokenizer = make_tokenizer(units[tokens], output_dir / "mistral", output_dir)
    lines = []
    for name, kind, corpora, files in (
        ("Parquet", "text", text, "*.parquet"),
        ("JSONL.gz", "text", text, "*.jsonl.gz"),
        ("units", "speech", units, "*.parquet"),
    ):
        few, small, many = (sorted(corpora[n].glob(files)) for n in sizes)
        folder = output_dir / f"speed_{name}"
        lines += bench_speed(f"from {name}", kind, few, many, tokenizer, folder, 2, rounds)
        lines += bench_speed(f"from {name}", kind, few, small, tokenizer, folder, 1, 1)
    large = make(output_dir / f"text_gz_{large_tokens}", write_text, large_tokens, output_dir / "mistral", False)
    corpora = [text[small_tokens], large]
    report(lines + bench_memory(corpora, tokenizer, output_dir / "memory"))


if __name__ == "__main__":
    run(bench_mixture)
