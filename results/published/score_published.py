"""Score the outputs that the original TowerSpeech saved, and compare with the scores that it recorded in them.

Usage: python results/published/score_published.py --outputs data/towerspeech_outputs --flores data/flores200 \\
           --wmt23 data/wmt23 --output_dir results/published

Reads the saved files: one hypothesis a line, with the headers (``Data Path, Model Path: ...``) and recorded scores
(``Results bleu: ...``) that the original glued to them; saved_files.tsv beside this script, which says what each file
is; references from FLORES-200 (devtest/<code>.devtest) and WMT23 (generaltest2023.en-de.ref.refA.de). FLEURS needs no
others: its English test utterances read sentences of FLORES devtest, and which one each of them reads is found from
the transcripts.
Writes <mixture>/<step>.csv in long form (results/score.py); rows of signature `reported|...` are scores that the
original recorded; recorded.tsv: each recorded score beside ours; and files.tsv: what became of each file. Figures
alone, no text. All of it is made anew each time, which takes a minute or two.
"""

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from towerspeech import metrics
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, hash_file, locked, publish, remove
from towerspeech.languages import LANGUAGES
from towerspeech.records import read_lines
from towerspeech.results_table import TEST_SET, as_rows, write_results

METRICS = ("bleu", "chrf2", "chrf2++", "wer", "cer")  # the same on every machine: not all have spBLEU's model
TOLERANCE = 1e-6
REPORTED = "reported|recorded by the original in the saved file"
FILES = ("file", "sha256", "runs", "hypotheses", "outcome", "csv", "references_sha256", "note")
RECORDED = ("file", "run", "metric", "recorded", "ours", "equal", "note")

# What is glued on. A model's path ends where the first hypothesis begins, with a space, or the next glued text.
GLUED = re.compile(
    r"Data Path, Model Path: \S+ \.\.\. \S+?(?= |Data Path, |Results |\n|$)"
    r"|Results wer: (?P<wer>\S+)\s*"
    r"|Results bleu: \{'bleu': (?P<bleu>[^,}]+)[^}]*\} results chrF: \{'score': (?P<chrf2>[^,}]+)[^}]*\}"
    r"(?: results comet: ?(?:\{'mean_score': (?P<comet22>[^,}]+)[^}]*\})?)?"
)
LABEL = re.compile(r"\s*German(?: text)?: ?")

# Sentences of FLORES devtest, counted from 0, that the original's English-German FLEURS lacks: with these left out its
# recorded scores come about, to all digits.
NO_GERMAN = (30, 124, 592)
FLEURS_UTTERANCES = 647
SAVED = Path(__file__).with_name("saved_files.tsv")
PLACED = 0.25  # least similarity of an utterance's best transcript to its sentence; the saved ones have 0.36 or more


class Run(NamedTuple):
    """The outputs of one run, and what was recorded after them (BLEU in 0..100)."""

    hypotheses: list[str]
    records: list[dict[str, float]]


class Saved(NamedTuple):
    """One saved file."""

    name: str  # its path below the outputs' folder
    sha256: str
    runs: list[Run]


class Texts(NamedTuple):
    """References, line by line."""

    flores: dict[str, list[str]]  # by language code
    wmt23: list[str]  # en-de
    fleurs: list[int]  # the FLORES line that each utterance reads; empty if not found


class Case(NamedTuple):
    """What a file is scored as."""

    file: Saved
    note: str = ""
    facts: dict[str, str] | None = None  # the columns of TEST_SET; None: it has no scores, and the note says why
    hypotheses: list[str] = []
    references: list[str] | None = None  # None: recorded scores alone
    recorded_on: tuple[str, list[str]] | None = None  # task and references of the recorded scores, if they are others

    @property
    def csv(self) -> str:
        return f"{self.facts['mixture']}/{self.facts['checkpoint']}.csv" if self.facts else ""


# --- Reading --------------------------------------------------------------------------------------
def read_saved(path: Path, name: str) -> Saved:
    """Take a saved file apart: hypotheses, glued headers, recorded scores."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})", "convert the file to UTF-8") from None
    runs, start = [], 0
    for part in [*GLUED.finditer(text), None]:
        piece = text[start : part.start() if part else len(text)]
        if piece.strip():
            runs.append(Run(piece.removesuffix("\n").split("\n"), []))
        if not part:
            break
        start = part.end()
        record = {metric: float(part[metric]) for metric in ("wer", "bleu", "chrf2", "comet22") if part[metric]}
        if record and not runs:
            raise UserError(f"{path} begins with a recorded score, but has no outputs before it", "move it away")
        if record:
            runs[-1].records.append(record | ({"bleu": 100 * record["bleu"]} if "bleu" in record else {}))
    return Saved(name, hash_file(path), runs)


def place_utterances(transcripts: list[list[str]], sentences: list[str]) -> list[int]:
    """The sentence that each utterance reads: the one most similar to any of its transcripts, by TF-IDF of words.

    Args:
        transcripts: Several systems' transcripts of the same utterances.
        sentences: All that may have been read.

    Returns:
        Indices of ``sentences``; empty without transcripts, or if an utterance is like no sentence.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not transcripts:
        return []
    vectorizer = TfidfVectorizer(token_pattern=r"\w+")
    known = vectorizer.fit_transform(sentences).T
    similarity = vectorizer.transform(transcripts[0]) @ known  # (utterances, sentences), sparse
    for others in transcripts[1:]:
        similarity = similarity.maximum(vectorizer.transform(others) @ known)
    similarity = similarity.toarray()
    return similarity.argmax(axis=1).tolist() if similarity.max(axis=1).min() >= PLACED else []


def read_known() -> dict[str, dict[str, str]]:
    """What each saved file is, by its name: the columns of saved_files.tsv.

    Models, mixtures and checkpoints are called what the original's files and folders are called (`unnamed` and
    `no_step` where these say nothing). Files of two models may meet under the names `unnamed` and `base`: their steps
    are called no_run_<step>, neither base nor a number, so that summarize.py draws no line through them. The cascades'
    prompts have no examples (AST_de.json), though their folder is called 5_shot.
    """
    import pandas

    table = pandas.read_csv(SAVED, sep="\t", dtype=str, keep_default_na=False)
    return {row["file"]: row for row in table.to_dict("records")}


def read_texts(flores: Path, wmt23: Path, files: list[Saved], known: dict[str, dict[str, str]]) -> Texts:
    """Read the references, and find FLEURS's among them."""
    by_language = {code: read_lines(flores / "devtest" / f"{LANGUAGES[code].flores}.devtest") for code in LANGUAGES}
    fleurs = [file for file in files if file.name in known and known[file.name]["references"] == "fleurs_english"]
    transcripts = [one.hypotheses for file in fleurs for one in file.runs]
    transcripts = [lines for lines in transcripts if len(lines) == FLEURS_UTTERANCES]
    german = read_lines(wmt23 / "generaltest2023.en-de.ref.refA.de")
    return Texts(by_language, german, place_utterances(transcripts, by_language["en"]))


# --- What is what ---------------------------------------------------------------------------------
def sort_out(file: Saved, texts: Texts, known: dict[str, dict[str, str]]) -> Case:
    """A file's test set and references, by its row of saved_files.tsv."""
    if not file.runs:
        return Case(file, "empty")
    if file.name not in known:
        return Case(file, "its name is not known here")
    row, lines, german = known[file.name], file.runs[-1].hypotheses, texts.flores["de"]
    if not row["task"]:
        return Case(file, row["note"])
    if row["cut"]:
        lines = [LABEL.sub("", line.split("\\n")[0], count=1) for line in lines]
    spoken = [german[line] for line in texts.fleurs if line not in NO_GERMAN]  # FLEURS from English to German
    references, recorded_on = {
        "": (None, None),
        "flores": (texts.flores[row["tgt_lang"]], None),
        "wmt23": (texts.wmt23, None),
        "fleurs_english": ([texts.flores["en"][line] for line in texts.fleurs], None),
        "fleurs_german": (spoken, ("asr", spoken)),
        # Made from the first 641 of the 647 transcripts, but scored against the 641 that have a German sentence.
        "fleurs_german_shifted": ([german[line] for line in texts.fleurs[: len(lines)]], ("cascaded_st", spoken)),
    }[row["references"]]
    if references is not None and len(lines) != len(references):
        return Case(file, f"{len(lines)} lines, for {len(references)} references")
    return Case(file, row["note"], {name: row[name] for name in TEST_SET}, lines, references, recorded_on)


def account(case: Case) -> tuple[str, ...]:
    """A file's row of files.tsv."""
    file, outcome, references = case.file, "reported" if case.facts else "no score", ""
    if case.references:
        outcome, references = "scored", hashlib.sha256("\n".join(case.references).encode()).hexdigest()
    size = (str(len(file.runs)), str(len(file.runs[-1].hypotheses) if file.runs else 0))
    return (file.name, file.sha256, *size, outcome, case.csv, references, case.note)


# --- Scores ---------------------------------------------------------------------------------------
def score_case(case: Case) -> tuple:
    """A file's rows of its CSV (a pandas.DataFrame), and of recorded.tsv."""

    def compute(task: str, references: list[str] | None) -> list[metrics.Score]:
        target_lang = case.facts["tgt_lang"]
        rows = metrics.signatures(task, target_lang, METRICS)
        return metrics.score(task, case.hypotheses, references, target_lang, rows=rows) if references else []

    scores = compute(case.facts["task"], case.references)
    on_recorded = compute(*case.recorded_on) if case.recorded_on else scores
    return make_rows(case, scores), compare_recorded(case, {score.metric: score.score for score in on_recorded})


def same_outputs(record: dict[str, float], scores: dict[str, float]) -> bool:
    """Whether a record is of the outputs that were scored, by its BLEU."""
    return "bleu" not in record or "bleu" not in scores or abs(record["bleu"] - scores["bleu"]) < TOLERANCE


def make_rows(case: Case, scores: list[metrics.Score]):
    """A file's rows: our scores; and recorded ones, WER, and COMET if it is of the very outputs that are there."""
    computed = {score.metric: score.score for score in scores}
    reported = {}
    for record in case.file.runs[-1].records:
        if same_outputs(record, computed):
            reported |= {metric: record[metric] for metric in ("wer", "comet22") if metric in record}
    n = len(case.hypotheses)
    scores = [*scores, *(metrics.Score(metric, score, None, None, n, REPORTED) for metric, score in reported.items())]
    return as_rows(scores, case.facts, case.file.sha256)


def compare_recorded(case: Case, computed: dict[str, float]) -> list[tuple[str, ...]]:
    """A file's rows of recorded.tsv; ``computed`` is ours of its last run, on what the recorded scores are of."""
    rows = []
    last = [line.strip() for line in case.file.runs[-1].hypotheses]
    for number, one in enumerate(case.file.runs, 1):
        same = [line.strip() for line in one.hypotheses] == last
        for position, record in enumerate(one.records, 1):
            for metric, recorded in record.items():
                notes = [case.note]
                if metric == "comet22":
                    notes.append("COMET was not computed anew")
                if number < len(case.file.runs):
                    notes.append("the same outputs as the last run's" if same else "not the last run's outputs")
                if not same_outputs(record, computed):
                    notes.append(f"record {position} of {len(one.records)}, of outputs that were not saved")
                ours, equal = computed.get("wer_basic" if metric == "wer" else metric) if same else None, ""
                if ours is not None:
                    equal = "yes" if abs(ours - recorded) < TOLERANCE else "no"
                numbers = (str(recorded), "" if ours is None else str(ours))
                rows.append((case.file.name, str(number), metric, *numbers, equal, "; ".join(filter(None, notes))))
    return rows


# --- All files ------------------------------------------------------------------------------------
def read_cases(outputs: Path, flores: Path, wmt23: Path) -> list[Case]:
    """What each of the saved files is; arguments as in ``score_published``."""
    for folder in (outputs, flores, wmt23):
        check_exists(folder, "name the folder")
    paths = sorted(path for path in outputs.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise UserError(f"{outputs} holds no files", "name the folder that holds MT and ASR")
    files = [read_saved(path, path.relative_to(outputs).as_posix()) for path in paths]
    known = read_known()
    texts = read_texts(flores, wmt23, files, known)
    cases = []
    first: dict[str, str] = {}  # files by content
    for file in files:
        original = first.setdefault(file.sha256, file.name)
        copied = file.runs and original != file.name
        cases.append(Case(file, f"the same bytes as {original}") if copied else sort_out(file, texts, known))
    return cases


def score_cases(cases: list[Case], workers: int) -> list[tuple]:
    """What ``score_case`` gives for each of the cases, computed in several processes, long ones first."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from tqdm import tqdm

    long_first = sorted(range(len(cases)), key=lambda i: -len(cases[i].hypotheses if cases[i].references else ()))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        computed = pool.map(score_case, [cases[i] for i in long_first])
        computed = dict(zip(long_first, tqdm(computed, "scoring", len(cases), unit="set"), strict=True))
    return [computed[i] for i in range(len(cases))]


def write_tsv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...]) -> None:
    import pandas

    with publish(path) as temporary:
        pandas.DataFrame(rows, columns=list(header)).to_csv(temporary, sep="\t", index=False, lineterminator="\n")


def report(output_dir: Path, accounts: list[tuple[str, ...]], recorded: list[tuple[str, ...]]) -> None:
    """Say what became of the files, and how many scores are equal."""
    outcomes = Counter(row[FILES.index("outcome")] for row in accounts)
    print(f"{output_dir}: {outcomes.total()} files:", ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    equal = Counter((row[2], row[5]) for row in recorded)
    for metric in dict.fromkeys(metric for metric, _ in equal):
        yes, no, unknown = (equal[metric, answer] for answer in ("yes", "no", ""))
        print(f"recorded {metric}: {yes} equal to ours, {no} not, {unknown} not computed anew")


def score_published(outputs: Path, flores: Path, wmt23: Path, output_dir: Path, workers: int = 2) -> None:
    """Score saved outputs, and compare with what they record.

    Args:
        outputs: The folder of the saved files: MT, ASR, En-De_outputs_tinyllama_llama.
        flores: FLORES-200's folder.
        wmt23: The folder of WMT23's general test.
        output_dir: Where the CSVs, recorded.tsv and files.tsv go.
        workers: Processes.
    """
    cases = read_cases(outputs, flores, wmt23)
    with_scores = [case for case in cases if case.facts]
    for path in sorted(output_dir.rglob("*.csv")):
        if path.relative_to(output_dir).as_posix() not in {case.csv for case in with_scores}:
            raise UserError(f"{path} is not of these outputs", "remove it, or name another --output_dir")
    tables: dict[str, list] = {}
    recorded = []
    for case, (table, rows) in zip(with_scores, score_cases(with_scores, workers), strict=True):
        tables.setdefault(case.csv, []).append(table)
        recorded += rows
    accounts = [account(case) for case in cases]
    import pandas

    with locked(output_dir / ".folder.lock"):
        for temporary in output_dir.rglob(".tmp-*"):  # a killed attempt's: we hold the lock
            remove(temporary)
        for csv, of_csv in tables.items():
            write_results(output_dir / csv, pandas.concat(of_csv).sort_values([*TEST_SET, "metric"]))
        write_tsv(output_dir / "recorded.tsv", recorded, RECORDED)
        write_tsv(output_dir / "files.tsv", accounts, FILES)
    report(output_dir, accounts, recorded)


if __name__ == "__main__":
    run(score_published)
