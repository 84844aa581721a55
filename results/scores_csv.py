"""What score.py and score_comet.py share: the test sets that they are to score, and the CSVs that they add to."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import locked
from towerspeech.generations import Outputs, read_folder, read_line_files
from towerspeech.metrics import SACREBLEU_METRICS, Score, headline
from towerspeech.records import read_prompts
from towerspeech.results_table import COLUMNS, METRICS, SYSTEM, TEST_SET, as_rows, read_results, write_results

COMET_METRICS = ("comet22", "cometkiwi22")


# --- What is to be scored -------------------------------------------------------------------------
def read_test_sets(arguments: dict) -> list[tuple[Path, Outputs]]:
    """The test sets that a command is asked to score, each with the CSV that its scores belong to.

    Args:
        arguments: The command's, by name: generations, model, mixture, output_dir and perhaps prompts; or hypotheses,
            references, sources if the command has them, target_lang, task, output and perhaps model and mixture.
    """
    folder_way = ("generations", "output_dir")
    line_way = [name for name in ("hypotheses", "references", "sources", "target_lang", "output") if name in arguments]
    given = [name for name in (*folder_way, *line_way, "prompts") if arguments[name]]
    if given not in ([*folder_way], [*folder_way, "prompts"], line_way):
        raise UserError(
            f"got {', '.join(f'--{name}' for name in given) or 'neither generations nor hypotheses'}",
            "give either --generations and --output_dir (with --model, --mixture, --prompts), "
            f"or {', '.join(f'--{name}' for name in line_way)}",
        )
    model, mixture = arguments["model"], arguments["mixture"]
    if arguments["generations"]:
        if not model:
            raise UserError("--model is missing", "name the model as it shall stand in the CSV")
        prompts = read_prompts(arguments["prompts"] or [])
        return read_checkpoints(arguments["generations"], model, mixture, arguments["output_dir"], prompts)
    hypotheses, references, output = (arguments[name] for name in ("hypotheses", "references", "output"))
    # Not their names alone: a/out.de and b/out.de are two systems. Seen from the CSV, wherever we are called from.
    system, dataset = (os.path.relpath(path, output.parent) for path in (hypotheses, references))
    facts = {"model": model or system, "mixture": mixture, "checkpoint": "", "task": arguments["task"]}
    facts |= {"dataset": dataset, "shots": "", "src_lang": "", "tgt_lang": arguments["target_lang"]}
    return [(output, read_line_files(hypotheses, references, arguments.get("sources"), facts))]


def read_checkpoints(
    folders: list[Path], model: str, mixture: str, output_dir: Path, prompts: dict[str, list[dict]]
) -> list[tuple[Path, Outputs]]:
    """Read all generations of all checkpoints; generate.py's and generate_ASR.py's folders of one share a CSV."""
    sets: dict[tuple, tuple[Path, Outputs]] = {}
    unanswered = set(prompts)
    for folder in folders:
        checkpoint = checkpoint_name(folder)
        for outputs in read_folder(folder, prompts):
            unanswered.discard(str(outputs.file.relative_to(folder)))
            facts = {"model": model, "mixture": mixture, "checkpoint": checkpoint} | outputs.facts
            key = tuple(facts.values())
            if key in sets:
                problem = f"{outputs.file} and {sets[key][1].file} hold the same test set"
                raise UserError(problem, "score them into two --output_dir")
            sets[key] = output_dir / f"{checkpoint}.csv", outputs._replace(facts=facts)
    if unanswered:
        raise UserError(f"--prompts has {min(unanswered)}, of which there are no generations", "check --prompts")
    return list(sets.values())


def checkpoint_name(folder: Path) -> str:
    """``300`` for checkpoint-300, else the folder's name: base, sft."""
    name = folder.resolve().name
    match = re.fullmatch(r"checkpoint-(\d+)", name)
    return match[1] if match else name


def choose_metrics(words: list[str], known: tuple[str, ...]) -> list[str]:
    """Names as people write them, with commas or spaces between them -> our names."""
    short = {"chrf": "chrf2", "chrf++": "chrf2++"}
    names = [short.get(name, name) for word in words for name in word.split(",")]
    for name in names:
        if name not in known and name in COMET_METRICS:
            command = f".venv-comet/bin/python results/score_comet.py --metrics {name}"
            raise UserError(f"{name} has a command of its own", f"{command} (bash install.sh comet)")
        if name not in known:
            raise UserError(f"unknown metric {name!r}", f"name of: {', '.join(known)}")
    return names


# --- The CSVs -------------------------------------------------------------------------------------
class ScoresCsv:
    """A results CSV that is added to, one test set after the other."""

    def __init__(self, path: Path):
        import pandas

        self.path = path
        self.table = read_results(path) if path.is_file() else pandas.DataFrame(columns=list(COLUMNS), dtype=str)

    def missing(self, outputs: Outputs, signed: dict[str, str]) -> list[str]:
        """Those of the wanted rows (with their signatures) that are not there, for these very outputs."""
        same = self._of_test_set(outputs) & (self.table["generations_sha256"] == outputs.sha256)
        there = self.table[same].set_index("metric")["signature"].to_dict()
        return [metric for metric, signature in signed.items() if there.get(metric) != signature]

    def add(self, outputs: Outputs, scores: list[Score]) -> None:
        """Put a test set's new rows in place of its old ones, and say so; drop what was computed on other outputs.

        Rows of other metrics on the same outputs stay. The order of the rows depends on them alone. Numbers are
        written in full.
        """
        import pandas

        new = as_rows(scores, outputs.facts, outputs.sha256)
        of_test_set = self._of_test_set(outputs)
        of_others = of_test_set & (self.table["generations_sha256"] != outputs.sha256)
        replaced = of_others | (of_test_set & self.table["metric"].isin(new["metric"]))
        table = pandas.concat([new, self.table[~replaced]])
        self.table = table.sort_values(
            [*TEST_SET, "metric"],
            key=lambda column: column.str.zfill(9) if column.name == "shots" else column,
            ignore_index=True,
        )
        write_results(self.path, self.table)
        tell(outputs, scores, int(of_others.sum()))

    def _of_test_set(self, outputs: Outputs):
        """Which rows are of a system's test set: a pandas.Series of bools."""
        return (self.table[list(TEST_SET)] == [outputs.facts[name] for name in TEST_SET]).all(axis=1)


@contextlib.contextmanager
def opened(sets: list[tuple[Path, Outputs]]) -> Iterator[dict[Path, ScoresCsv]]:
    """Hold the locks of the test sets' CSVs.

    Raises:
        UserError: A CSV is another system's.
    """
    with contextlib.ExitStack() as locks:
        tables = {}
        for path, outputs in sorted(dict(sets).items()):
            locks.enter_context(locked(path.with_name(f".{path.stem}.lock")))
            for temporary in path.parent.glob(f".tmp-{path.name}-*"):  # a killed attempt's: we hold the lock
                temporary.unlink()
            tables[path] = ScoresCsv(path)
            for name in SYSTEM if outputs.ids else ():  # a CSV of line files may hold several systems
                for value in tables[path].table[name]:
                    if value != outputs.facts[name]:
                        problem = f"{path} is of {name} {value!r}, not {outputs.facts[name]!r}"
                        raise UserError(problem, "name another --output_dir")
        yield tables


def tell(outputs: Outputs, scores: list[Score], num_replaced: int) -> None:
    """Print a test set's main scores."""
    main = {*SACREBLEU_METRICS, *COMET_METRICS, headline(outputs.facts["tgt_lang"])}
    told = [f"{len(outputs.references):,} segments"]
    for score in scores:
        if score.metric in main:
            shown = METRICS[score.metric]
            told.append(f"{shown.heading} {score.score * shown.factor:.{shown.digits + 1}f}")
    if num_replaced:
        told.append(f"in place of {num_replaced} rows of other outputs or references")
    print(f"scored {outputs.file}: {', '.join(told)}", flush=True)
