"""Score the outputs that the original TowerSpeech saved, and compare with the scores that it recorded in them.

Usage: python results/published/score_published.py --outputs data/towerspeech_outputs --flores data/flores200 \\
           --wmt23 data/wmt23 --output_dir results/published

Reads the saved files: one hypothesis a line, with the headers (``Data Path, Model Path: ...``) and recorded scores
(``Results bleu: ...``) that the original glued to them; references from FLORES-200 (devtest/<code>.devtest) and WMT23
(generaltest2023.en-de.ref.refA.de). FLEURS needs no others: its English test utterances read sentences of FLORES
devtest, and which one each of them reads is found from the transcripts.
Writes <mixture>/<step>.csv in long form (results/score.py), named as the original's files and folders are (`unnamed`
and `no_step` where these say nothing, `no_run_<step>` where the steps need not be of one training run); rows of
signature `reported|...` are scores that the original recorded; recorded.tsv: each recorded score beside ours; and
files.tsv: what became of each file. Figures only, no text. All of it is made anew each time, which takes a minute or
two.
"""

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
from towerspeech.results_table import TEST_SET, as_rows, write_results

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
def name_case(file: Saved, task: str, dataset: str) -> dict[str, str]:
    """The columns of TEST_SET: model, mixture and checkpoint by the original's names alone."""
    mixture, step = file.named.get("mixture"), file.named.get("step")
    bilingual = file.name.startswith(BILINGUAL)
    if bilingual and file.runs[0].model_path:  # .../only_text_experiment/Hf_ckpt/tinyllama-1b/1000
        *_, folder, step = file.runs[0].model_path.split("/")
        mixture = mixture or folder
    model = MODELS.get(mixture, "tinyllama_llama") if bilingual else "TowerSpeech"
    mixture = mixture or "unnamed"
    if step and mixture in NO_RUN:
        step = f"no_run_{step}"  # neither base nor a number, so that summarize.py draws no line through it
    # The cascades' prompts have no examples (AST_de.json), though their folder is called 5_shot.
    shots = (file.named.get("shots") or "") if task == "mt" else "0"
    source, target = parse_pair(file.named.get("pair") or "en-de") if task != "asr" else ("en", "en")
    return dict(zip(TEST_SET, (model, mixture, step or "no_step", task, dataset, shots, source, target), strict=True))


def sort_out(file: Saved, texts: Texts) -> Case:
    """Find a file's test set and references by its name and its number of lines."""
    if not file.runs:
        return Case(file, "empty")
    if not file.named:
        return Case(file, "its name is not known here")
    lines, german = file.runs[-1].hypotheses, texts.flores["de"]
    spoken = [german[line] for line in texts.fleurs if line not in NO_GERMAN]  # FLEURS from English to German
    as_spoken = bool(spoken) and len(lines) == len(spoken)
    speech = file.named.get("speech")
    if speech == "fleurs_ST" and as_spoken:
        note = "recorded: the WER against the German text"
        return Case(file, note, name_case(file, "st", "fleurs"), lines, spoken, ("asr", spoken))
    if speech:
        facts = name_case(file, "asr", "covost" if speech == "ASR" else speech)  # as the headers of ASR*.txt say
        if speech == "fleurs" and len(lines) == len(texts.fleurs):
            return Case(file, "", facts, lines, [texts.flores["en"][line] for line in texts.fleurs])
        if any("wer" in record for record in file.runs[-1].records):
            return Case(file, "no references among the given texts", facts, lines)
        return Case(file, "no references among the given texts, and no recorded score")
    notes, bilingual = [], file.name.startswith(BILINGUAL)
    if bilingual and not file.runs[-1].model_path:
        lines, notes = [LABEL.sub("", line.split("\\n")[0], count=1) for line in lines], [RAW]
    if bilingual and len(lines) == len(texts.wmt23):
        return Case(file, "; ".join(notes), name_case(file, "mt", "wmt23"), lines, texts.wmt23)
    facts = name_case(file, "mt", "flores")
    if len(lines) == len(german):
        if "wmt" in Path(file.name).name:
            notes.insert(0, "holds FLORES, whatever its name says")
        return Case(file, "; ".join(notes), facts, lines, texts.flores[facts["tgt_lang"]])
    if as_spoken and file.named.get("pair") == "en-de":
        # Made from the first 641 of the 647 transcripts, but scored against the 641 that have a German sentence.
        read, facts = [german[line] for line in texts.fleurs[: len(lines)]], name_case(file, "cascaded_st", "fleurs")
        return Case(file, SHIFTED, facts, lines, read, ("cascaded_st", spoken))
    return Case(file, f"{len(lines)} lines: of no test set that is known here")


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
    texts = read_texts(flores, wmt23, files)
    cases = []
    first: dict[str, str] = {}  # files by content
    for file in files:
        original = first.setdefault(file.sha256, file.name)
        copied = file.runs and original != file.name
        cases.append(Case(file, f"the same bytes as {original}") if copied else sort_out(file, texts))
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
