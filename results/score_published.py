"""Score the outputs that the original TowerSpeech saved, and compare with the scores that it recorded in them.

Usage: python results/score_published.py --outputs data/towerspeech_outputs --flores data/flores200 \\
           --wmt23 data/wmt23 --output_dir results/published

Reads the saved files: one hypothesis a line, with the headers (``Data Path, Model Path: ...``) and recorded scores
(``Results bleu: ...``) that the original glued to them; references from FLORES-200 (devtest/<code>.devtest) and WMT23
(generaltest2023.en-de.ref.refA.de). FLEURS needs no others: its English test utterances read sentences of FLORES
devtest, and which one each of them reads is found from the transcripts.
Writes <mixture>/<step>.csv in long form (results/score.py), named as the original's files and folders are (`unnamed`
and `no_step` where these say nothing, `no_run_<step>` where the steps need not be of one training run); rows of
signature `reported|...` are scores that the original recorded; recorded.tsv: each recorded score beside ours; and last
files.tsv: what became of each file. Figures only, no text.
What is scored already stays: the CSVs of changed outputs alone are made anew.
"""

import csv
import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from towerspeech import metrics
from towerspeech.command import UserError, run
from towerspeech.files import check_exists, hash_file, locked, publish, remove
from towerspeech.languages import LANGUAGES, parse_pair
from towerspeech.records import read_lines

METRICS = ("bleu", "chrf2", "chrf2++", "wer", "cer")  # the same on every machine: not all have spBLEU's model
TOLERANCE = 1e-6
REPORTED = "reported|recorded by the original in the saved file"
FILES = ("file", "sha256", "runs", "hypotheses", "outcome", "csv", "references_sha256", "note")
RECORDED = ("file", "run", "metric", "recorded", "ours", "equal", "note")

# What is glued on. A model's path ends where the first hypothesis begins, with a space, or the next glued text.
GLUED = re.compile(
    r"Data Path, Model Path: \S+ \.\.\. (?P<model>\S+?)(?= |Data Path, |Results |\n|$)"
    r"|Results wer: (?P<wer>\S+)\s*"
    r"|Results bleu: \{'bleu': (?P<bleu>[^,}]+)[^}]*\} results chrF: \{'score': (?P<chrf2>[^,}]+)[^}]*\}"
    r"(?: results comet: ?(?:\{'mean_score': (?P<comet22>[^,}]+)[^}]*\})?)?"
)
LABEL = re.compile(r"\s*German(?: text)?: ?")

BILINGUAL = "En-De_outputs_tinyllama_llama"
NAMES = [
    re.compile(pattern)
    for pattern in (
        r"MT/(?P<shots>\d)_shot/((?P<step>\w+)/)?flores_((?P<mixture>\w+)_)?(?P<pair>[a-z]{2}-[a-z]{2})",
        r"ASR/((?P<step>\w+)/)?(ASR_)?((?P<mixture>\w+?)_)?(?P<speech>covost|fleurs(_ST)?|ls_clean|ls_other|vox)\.txt",
        rf"{BILINGUAL}/vllm_greedy/vllm_(?P<mixture>\w+)_(flores|wmt)_(?P<shots>\d)",
        rf"{BILINGUAL}/vllm_greedy/(?P<speech>ASR)(_new)?\.txt",
        rf"{BILINGUAL}/((?P<step>\d+)_)?((?P<mixture>\w+)_)?wmt(_(?P<shots>few))?\.txt",
    )
]
NO_RUN = ("unnamed", "base")  # files of two models may meet under these names: their steps are not to be joined
MODELS = {"llama": "Llama-2-7B"} | dict.fromkeys(("cpt", "text", "text_ext", "tiny_llama"), "TinyLlama-1.1B")

# Sentences of FLORES devtest, counted from 0, that the original's English-German FLEURS lacks: with these left out its
# recorded scores come about, to all digits.
NO_GERMAN = (30, 124, 592)
FLEURS_UTTERANCES = 647
PLACED = 0.25  # least similarity of an utterance's best transcript to its sentence; the saved ones have 0.36 or more
SHIFTED = "recorded against references that run ahead from line 223 on; the CSV has it against the right ones"
RAW = "scored: each line up to its first written-out \\n, without the label German: or German text:"


class Run(NamedTuple):
    """The outputs of one run, and what was recorded after them (BLEU in 0..100)."""

    hypotheses: list[str]
    records: list[dict[str, float]]
    model_path: str


class Saved(NamedTuple):
    """One saved file."""

    name: str  # its path below the outputs' folder
    sha256: str
    runs: list[Run]
    named: dict[str, str | None] | None  # what its name says; None: nothing that is known here


class Texts(NamedTuple):
    """References, line by line."""

    flores: dict[str, list[str]]  # by language code
    wmt23: list[str]  # en-de
    fleurs: list[int]  # the FLORES line that each utterance reads; empty if not found


class Job(NamedTuple):
    """Something to be scored."""

    task: str
    hypotheses: list[str]
    references: list[str]
    tgt_lang: str


class Case(NamedTuple):
    """What is to be done with a file."""

    facts: dict[str, str]  # the columns of metrics.TEST_SET
    job: Job | None  # None: there are no references
    recorded_by: Job | None  # what the recorded scores were computed on
    note: str

    @property
    def csv(self) -> str:
        return f"{self.facts['mixture']}/{self.facts['checkpoint']}.csv"


# --- Reading --------------------------------------------------------------------------------------
def read_saved(path: Path, name: str) -> Saved:
    """Take a saved file apart: hypotheses, glued headers, recorded scores."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})", "convert the file to UTF-8") from None
    runs, model_path, start = [], "", 0
    for part in [*GLUED.finditer(text), None]:
        piece = text[start : part.start() if part else len(text)]
        if piece.strip():
            runs.append(Run(piece.removesuffix("\n").split("\n"), [], model_path))
        if not part:
            break
        start = part.end()
        if part["model"]:
            model_path = part["model"]
        elif not runs:
            raise UserError(f"{path} begins with a recorded score, but has no outputs before it", "move it away")
        else:
            record = {metric: float(part[metric]) for metric in ("wer", "bleu", "chrf2", "comet22") if part[metric]}
            runs[-1].records.append(record | ({"bleu": 100 * record["bleu"]} if "bleu" in record else {}))
    matches = (pattern.fullmatch(name) for pattern in NAMES)
    return Saved(name, hash_file(path), runs, next((match.groupdict() for match in matches if match), None))


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


def read_texts(flores: Path, wmt23: Path, files: list[Saved]) -> Texts:
    """Read the references, and find FLEURS's among them."""
    by_language = {code: read_lines(flores / "devtest" / f"{LANGUAGES[code].flores}.devtest") for code in LANGUAGES}
    fleurs = [file for file in files if file.named and file.named.get("speech") == "fleurs"]
    transcripts = [one.hypotheses for file in fleurs for one in file.runs]
    transcripts = [lines for lines in transcripts if len(lines) == FLEURS_UTTERANCES]
    german = read_lines(wmt23 / "generaltest2023.en-de.ref.refA.de")
    return Texts(by_language, german, place_utterances(transcripts, by_language["en"]))


# --- What is what ---------------------------------------------------------------------------------
def name_system(file: Saved) -> dict[str, str]:
    """Model, mixture and checkpoint, by the original's names alone."""
    mixture, step = file.named.get("mixture"), file.named.get("step")
    bilingual = file.name.startswith(BILINGUAL)
    if bilingual and file.runs[0].model_path:  # .../only_text_experiment/Hf_ckpt/tinyllama-1b/1000
        *_, folder, step = file.runs[0].model_path.split("/")
        mixture = mixture or folder
    model = MODELS.get(mixture, "tinyllama_llama") if bilingual else "TowerSpeech"
    mixture = mixture or "unnamed"
    if step and mixture in NO_RUN:
        step = f"no_run_{step}"  # neither base nor a number, so that summarize.py draws no line through it
    return {"model": model, "mixture": mixture, "checkpoint": step or "no_step"}


def sort_out(file: Saved, texts: Texts) -> Case | str:
    """Find a file's test set and references by its name and its number of lines; or say why it has no scores."""
    if not file.runs:
        return "empty"
    if not file.named:
        return "its name is not known here"
    named, hypotheses = file.named, file.runs[-1].hypotheses
    n, speech, english, german = len(hypotheses), named.get("speech"), texts.flores["en"], texts.flores["de"]
    spoken = [german[line] for line in texts.fleurs if line not in NO_GERMAN]  # FLEURS from English to German

    def case(task: str, dataset: str, pair: str, references: list[str] | None, note: str = "") -> Case:
        src, tgt = parse_pair(pair) if task != "asr" else ("en", "en")
        # The cascades' prompts have no examples (AST_de.json), though their folder is called 5_shot.
        shots = (named.get("shots") or "") if task == "mt" else "0"
        facts = dict(task=task, dataset=dataset, shots=shots, src_lang=src, tgt_lang=tgt)
        job = Job(task, hypotheses, references, tgt) if references else None
        return Case(name_system(file) | facts, job, job, note)

    if speech == "fleurs_ST" and spoken and n == len(spoken):
        scored = case("st", "fleurs", "en-de", spoken, "recorded: the WER against the German text")
        return scored._replace(recorded_by=Job("asr", hypotheses, spoken, "de"))
    if speech:
        dataset = "covost" if speech == "ASR" else speech  # the headers of ASR.txt and ASR_new.txt say so
        if dataset == "fleurs" and n == len(texts.fleurs):
            return case("asr", dataset, "en", [english[line] for line in texts.fleurs])
        if any("wer" in record for record in file.runs[-1].records):
            return case("asr", dataset, "en", None, "no references among the given texts")
        return "no references among the given texts, and no recorded score"
    if file.name.startswith(BILINGUAL):
        raw = not file.runs[-1].model_path
        if raw:
            hypotheses = [LABEL.sub("", line.split("\\n")[0], count=1) for line in hypotheses]
        for dataset, references in (("flores", german), ("wmt23", texts.wmt23)):
            if n == len(references):
                misnamed = "wmt" in Path(file.name).name and dataset == "flores"
                notes = ["holds FLORES, whatever its name says"] * misnamed + [RAW] * raw
                return case("mt", dataset, "en-de", references, "; ".join(notes))
    elif n == len(english):
        return case("mt", "flores", named["pair"], texts.flores[parse_pair(named["pair"])[1]])
    elif spoken and n == len(spoken) and named["pair"] == "en-de":
        # Made from the first 641 of the 647 transcripts, but scored against the 641 that have a German sentence.
        scored = case("cascaded_st", "fleurs", "en-de", [german[line] for line in texts.fleurs[:n]], SHIFTED)
        return scored._replace(recorded_by=scored.job._replace(references=spoken))
    return f"{n} lines: of no test set that is known here"


# --- Scores ---------------------------------------------------------------------------------------
def compute(job: Job) -> list[metrics.Score]:
    """Our own scores of one job."""
    wanted = metrics.signatures(job.task, job.tgt_lang, METRICS)
    return metrics.score(job.task, job.hypotheses, job.references, job.tgt_lang, rows=wanted)


def as_numbers(scores: list[metrics.Score]) -> dict[str, float]:
    """Scores by metric."""
    return {score.metric: float(score.score) for score in scores}


def same_outputs(record: dict[str, float], scores: dict[str, float]) -> bool:
    """Whether a record is of the outputs that were scored, by its BLEU."""
    return "bleu" not in record or "bleu" not in scores or abs(record["bleu"] - scores["bleu"]) < TOLERANCE


def make_rows(file: Saved, case: Case, scores: list[metrics.Score]) -> list[dict[str, str]]:
    """A file's rows: our scores; and recorded ones, WER, and COMET if it is of the very outputs that are there."""
    reported = {}
    for record in file.runs[-1].records:
        if same_outputs(record, as_numbers(scores)):
            reported |= {metric: record[metric] for metric in ("wer", "comet22") if metric in record}
    n = len(file.runs[-1].hypotheses)
    scores = [*scores, *(metrics.Score(metric, score, None, None, n, REPORTED) for metric, score in reported.items())]
    return [
        case.facts
        | {name: "" if value is None else str(value) for name, value in score._asdict().items()}
        | {"generations_sha256": file.sha256}
        for score in scores
    ]


def compare_recorded(file: Saved, case: Case, computed: dict[str, float]) -> list[tuple]:
    """A file's rows of recorded.tsv.

    Args:
        file: The file.
        case: What it is.
        computed: Our scores of its last run, on what the original computed its own on.
    """
    rows = []
    last = [line.strip() for line in file.runs[-1].hypotheses]
    for number, one in enumerate(file.runs, 1):
        same = [line.strip() for line in one.hypotheses] == last
        for position, record in enumerate(one.records, 1):
            for metric, recorded in record.items():
                ours = computed.get("wer_basic" if metric == "wer" else metric) if same else None
                notes = [case.note]
                if metric == "comet22":
                    notes.append("COMET was not computed anew")
                if number < len(file.runs):
                    notes.append("the same outputs as the last run's" if same else "not the last run's outputs")
                if not same_outputs(record, computed):
                    notes.append(f"record {position} of {len(one.records)}, of outputs that were not saved")
                equal = "" if ours is None else "yes" if abs(ours - recorded) < TOLERANCE else "no"
                shown = "" if ours is None else ours
                rows.append((file.name, number, metric, recorded, shown, equal, "; ".join(filter(None, notes))))
    return rows


# --- Writing --------------------------------------------------------------------------------------
def account(file: Saved, case: Case | str) -> tuple[str, ...]:
    """A file's row of files.tsv."""
    size = (str(len(file.runs)), str(len(file.runs[-1].hypotheses) if file.runs else 0))
    if isinstance(case, str):
        return (file.name, file.sha256, *size, "no score", "", "", case)
    outcome = "scored" if case.job else "reported"
    references = hashlib.sha256("\n".join(case.job.references).encode()).hexdigest() if case.job else ""
    return (file.name, file.sha256, *size, outcome, case.csv, references, case.note)


def read_tsv(path: Path) -> list[tuple[str, ...]]:
    """The rows of a table of ours, without its header; none if it is not there."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file, delimiter="\t")][1:]


def write_tsv(path: Path, header: tuple, rows: list[tuple]) -> None:
    """Write a table that is no results CSV, atomically."""
    with publish(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *rows])


def held_scores(file: Saved, case: Case, rows: list[dict[str, str]]) -> list[metrics.Score] | None:
    """Our scores of this very file that a CSV holds, computed in the same way; None if some are missing."""
    wanted = metrics.signatures(case.job.task, case.job.tgt_lang, METRICS)
    wanted.pop("truncated")  # nothing tells which outputs were cut off
    found = {
        row["metric"]: metrics.Score(*(row[name] for name in metrics.Score._fields))
        for row in rows
        if row["generations_sha256"] == file.sha256 and all(row[name] == value for name, value in case.facts.items())
    }
    if any(metric not in found or found[metric].signature != signature for metric, signature in wanted.items()):
        return None
    return [found[metric] for metric in wanted]


class Folder:
    """The output folder, as it fills."""

    def __init__(self, path: Path, files: list[Saved], cases: list[Case | str]):
        self.path = path
        self.pairs = [(file, case) for file, case in zip(files, cases, strict=True) if isinstance(case, Case)]
        self.accounts = {file.name: account(file, case) for file, case in zip(files, cases, strict=True)}
        self.members: dict[str, list[tuple[Saved, Case]]] = {}  # of each CSV
        for file, case in self.pairs:
            self.members.setdefault(case.csv, []).append((file, case))
        held = {csv.relative_to(path).as_posix(): metrics.read_results(csv) for csv in path.rglob("*.csv")}
        if foreign := sorted(held.keys() - self.members):
            raise UserError(f"{path / foreign[0]} is not of these outputs", "remove it, or name another --output_dir")
        known = read_tsv(path / "files.tsv")
        self.scores: dict[str, list[metrics.Score]] = {}  # ours, by file
        for file, case in self.pairs:
            kept = held_scores(file, case, held.get(case.csv, [])) if case.job else []
            if kept is not None and (not case.job or self.accounts[file.name] in known):
                self.scores[file.name] = kept
        self.current = [name for name in self.members if self.is_full(name) and self.rows(name) == held.get(name)]
        complete = len(self.current) == len(self.members) and (path / "recorded.tsv").is_file()
        self.done = complete and known == list(self.accounts.values())

    def is_full(self, name: str) -> bool:
        """Whether all scores of a CSV are there."""
        return all(file.name in self.scores for file, _ in self.members[name])

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of a CSV, in the order that results/score.py gives them."""
        rows = [row for file, case in self.members[name] for row in make_rows(file, case, self.scores[file.name])]
        return sorted(rows, key=lambda row: [row[column] for column in (*metrics.TEST_SET, "metric")])

    def write(self, name: str) -> None:
        """Write a CSV, and take note of it."""
        metrics.write_results(self.path / name, self.rows(name))
        self.current.append(name)
        self.note()

    def note(self) -> None:
        """Write files.tsv with the files of the finished CSVs alone: one that holds them all means done."""
        finished = {file.name for name in self.current for file, _ in self.members[name]}
        write_tsv(self.path / "files.tsv", FILES, [row for name, row in self.accounts.items() if name in finished])


def fill(folder: Folder, workers: int) -> None:
    """Compute what is missing, and write each CSV as soon as its scores are there; then the tables."""
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from tqdm import tqdm

    folder.note()
    for name in folder.members:
        if name not in folder.current and folder.is_full(name):
            folder.write(name)
    recorded_on: dict[str, dict[str, float]] = {}  # our scores where the original scored something else
    with ProcessPoolExecutor(workers) as pool:
        ours = {pool.submit(compute, c.job): (f, c) for f, c in folder.pairs if f.name not in folder.scores}
        others = {pool.submit(compute, c.recorded_by): f for f, c in folder.pairs if c.recorded_by is not c.job}
        for future in tqdm(as_completed([*ours, *others]), "scoring", len(ours) + len(others), unit="set"):
            if future in others:
                recorded_on[others[future].name] = as_numbers(future.result())
                continue
            file, case = ours[future]
            folder.scores[file.name] = future.result()
            if folder.is_full(case.csv):
                folder.write(case.csv)
    recorded = []
    for file, case in folder.pairs:
        computed = recorded_on.get(file.name) or as_numbers(folder.scores[file.name])
        recorded += compare_recorded(file, case, computed)
    write_tsv(folder.path / "recorded.tsv", RECORDED, recorded)
    write_tsv(folder.path / "files.tsv", FILES, list(folder.accounts.values()))

    outcomes = Counter(row[FILES.index("outcome")] for row in folder.accounts.values())
    print(f"{folder.path}: {len(folder.accounts)} files:", ", ".join(f"{n} {name}" for name, n in outcomes.items()))
    for metric in dict.fromkeys(row[RECORDED.index("metric")] for row in recorded):
        equal = Counter(row[RECORDED.index("equal")] for row in recorded if row[RECORDED.index("metric")] == metric)
        print(f"recorded {metric}: {equal['yes']} equal to ours, {equal['no']} not, {equal['']} not computed anew")


def score_published(outputs: Path, flores: Path, wmt23: Path, output_dir: Path, workers: int = 2) -> None:
    """Score saved outputs, and compare with what they record.

    Args:
        outputs: The folder of the saved files: MT, ASR, En-De_outputs_tinyllama_llama.
        flores: FLORES-200's folder.
        wmt23: The folder of WMT23's general test.
        output_dir: Where the CSVs, recorded.tsv and files.tsv go.
        workers: Processes.
    """
    for folder in (outputs, flores, wmt23):
        check_exists(folder, "name the folder")
    paths = sorted(path for path in outputs.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise UserError(f"{outputs} holds no files", "name the folder that holds MT and ASR")
    files = [read_saved(path, path.relative_to(outputs).as_posix()) for path in paths]
    texts = read_texts(flores, wmt23, files)
    cases: list[Case | str] = []
    first: dict[str, str] = {}  # files by content
    for file in files:
        original = first.setdefault(file.sha256, file.name)
        copied = file.runs and original != file.name
        cases.append(f"the same bytes as {original}" if copied else sort_out(file, texts))
    with locked(output_dir / ".folder.lock"):
        for temporary in output_dir.rglob(".tmp-*"):  # a killed attempt's: we hold the lock
            remove(temporary)
        folder = Folder(output_dir, files, cases)
        if folder.done:
            print(f"already scored: {output_dir}")
        else:
            fill(folder, workers)


if __name__ == "__main__":
    run(score_published)
