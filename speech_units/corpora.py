"""Corpora as they lie on disk: for each a function that finds it below a folder and streams one split's utterances.

And what its transcripts become with --text clean (``TEXT_RULES``).
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from speech_units.utterances import (
    GARBAGE,
    MALFORMED,
    MISSING,
    Source,
    Utterance,
    header,
    lines,
    milliseconds,
    table,
    tar_lengths,
)
from towerspeech.errors import UserError
from towerspeech.files import check_exists
from towerspeech.languages import LANGUAGES

LEVELS = 2  # how far below --root index files are looked for
CHUNK = 1 << 20  # characters of a large JSON file read at once
LARGEST_OBJECT = 1 << 28  # characters; beyond it a JSON file is taken for malformed
READABLE = (".wav", ".flac", ".ogg", ".opus", ".mp3")  # by libsndfile
# By which files a corpus is told, whatever its split.
SIGNS = {
    "librispeech": ["*/*/*/*.trans.txt"],
    "mls": ["*/transcripts.txt"],
    "gigaspeech": ["GigaSpeech.json"],
    "spgispeech": ["train.csv", "val.csv", "test.csv"],
    "voxpopuli": ["asr_*.tsv.gz", "asr_*.tsv", "raw_audios"],
    "fleurs": ["en_us/*.tsv", "*_*/audio/*.tar.gz"],
    "covost2": ["covost_v2.*.tsv"],
    "common_voice": ["clips"],
    "europarl_st": ["*/*/*/segments.lst"],
}


# --- Text rules -----------------------------------------------------------------------------------
PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
NO_SPEECH = re.compile("<(SIL|MUSIC|NOISE|OTHER)>")
# Straight marks around a text whose own marks are doubled, as in CSV; and pairs that differ.
QUOTED = re.compile(r'("+?)((?:[^"]|"")*)\1')
PAIRS = ("“”", "„“", "„”", "«»", "‘’")


def one_line(text: str) -> str:
    """Single spaces, none around: done to every text."""
    return " ".join(text.split())


def lower_case(text: str) -> str:
    """LibriSpeech is in capitals."""
    return text.lower()


def gigaspeech_punctuation(text: str) -> str:
    """``HELLO <COMMA> WORLD <PERIOD>`` becomes ``hello, world.``"""
    for tag, mark in PUNCTUATION.items():
        text = re.sub(rf"\s*{tag}", mark, text)
    return text.lower()


def unquoted(text: str) -> str:
    """Common Voice's sentences may stand in quotation marks as a whole; ``"Yes" and "no"`` does not."""
    text = text.strip()
    if len(text) > 1 and (match := QUOTED.fullmatch(text)):
        return unquoted(match[2].replace('""', '"'))
    if any(text[0] == a and text[-1] == b and not {a, b} & {*text[1:-1]} for a, b in PAIRS if len(text) > 1):
        return unquoted(text[1:-1])
    return text


TEXT_RULES: dict[str, Callable[[str], str]] = {
    "librispeech": lower_case,
    "gigaspeech": gigaspeech_punctuation,
    "common_voice": unquoted,
    "covost2": unquoted,  # of its translations too
}  # the others' texts stay: voxpopuli and fleurs have a column for each --text


def clean(corpus: str | None, text: str) -> str:
    """A transcript or translation of a corpus as --text clean has it."""
    return one_line(TEXT_RULES.get(corpus, str)(text))


# --- Finding --------------------------------------------------------------------------------------
def folders_below(root: Path, levels: int) -> list[Path]:
    """The folders that lie this many levels below; 0: the folder itself."""
    folders = [root]
    for _ in range(levels):
        folders = [Path(entry) for folder in folders for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(folders)


def below(root: Path, *patterns: str, beside: str = "") -> list[list[Path]]:
    """A list of files for each folder, as few levels down as possible, in which a pattern has any, which is the first.

    Only files that ``beside`` is beside.
    """
    for level in range(LEVELS + 1):
        copies = []
        for folder in folders_below(root, level):
            matches = (sorted(p for p in folder.glob(g) if (p.parent / beside).exists()) for g in patterns)
            copies += [next(filter(None, matches), [])]
        if any(copies):
            return list(filter(None, copies))
    return []


def find(
    corpus: str, root: Path, *patterns: str, beside: str = "", remedy: str = "check --split and --language"
) -> list[Path]:
    """Index files of a corpus, all in one folder, which is ``root`` or up to LEVELS below; see ``below``.

    Raises:
        UserError: There are none (it says what the folder looks like), or several copies.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder", "check --root")
    copies = below(root, *patterns, beside=beside)
    if len(copies) > 1:
        problem = f"{root} holds several copies of {corpus}: {copies[0][0]}, {copies[1][0]}"
        raise UserError(problem, "give the folder of one as --root")
    if not copies:
        looked = f"{root}: no {' or '.join(patterns)}, there or up to {LEVELS} levels below"
        raise _not_found(looked, corpus, root, remedy)
    return copies[0]


def _not_found(problem: str, corpus: str, root: Path, remedy: str) -> UserError:
    """The error, which also says what the folder looks like; the remedy is for a folder that is the corpus's."""
    seen = [name for name, signs in SIGNS.items() if below(root, *signs)]
    if seen and corpus not in seen:
        return UserError(f"{problem}; it looks like {seen[0]}", f"use --corpus {seen[0]}, or another --root")
    return UserError(problem, remedy if seen else f"give the folder of {corpus} as --root")


def find_one(corpus: str, root: Path, *patterns: str, **others: str) -> Path:
    """As ``find``, the only file."""
    found = find(corpus, root, *patterns, **others)
    if len(found) > 1:
        raise UserError(f"{root} holds both {found[0]} and {found[1]}", "give the folder of one as --root")
    return found[0]


def need(corpus: str, root: Path, path: Path, delimiter: str, columns: list[str]) -> None:
    """Raise UserError unless a table's first line names these columns."""
    there = header(path, delimiter)
    if missing := [name for name in columns if name not in there]:
        problem = f"{path}:1: no column {missing[0]!r} among {', '.join(there)[:200]}"
        raise _not_found(problem, corpus, root, "get the corpus's own file")


# --- One file an utterance ------------------------------------------------------------------------
def librispeech(root: Path, split: str, language: str, text: str) -> Source:
    """<part>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt, and the FLAC files beside it."""
    index = find("librispeech", root, f"{split}/*/*/*.trans.txt")

    def utterances() -> Iterator[Utterance]:
        for path in index:
            for where, line in lines(path):
                name, _, said = (line or "").partition(" ")
                if line == "":
                    continue
                if not name:
                    yield Utterance(where, problem=MALFORMED)
                    continue
                speaker = name.split("-")[0]
                yield Utterance(where, name, f"{path.parent}/{name}.flac", said, fields={"speaker": speaker})

    return Source(index[0].parents[3], index, utterances())


def mls(root: Path, split: str, language: str, text: str) -> Source:
    """<split>/transcripts.txt, and audio/<speaker>/<book>/<speaker>_<book>_<number>.flac or .opus beside it."""
    own = f"mls_{LANGUAGES[language].name.lower()}*"
    path = find_one("mls", root, f"{own}/{split}/transcripts.txt", f"{split}/transcripts.txt")
    ending = next((file.suffix for file in path.parent.glob("audio/*/*/*") if file.suffix in READABLE), ".flac")

    def utterances() -> Iterator[Utterance]:
        for where, row in table(path, "\t", ["id", "text"]):
            parts = row["id"].split("_") if row else []
            if len(parts) != 3:
                yield Utterance(where, problem=MALFORMED)
                continue
            audio = f"{path.parent}/audio/{parts[0]}/{parts[1]}/{row['id']}{ending}"
            yield Utterance(where, row["id"], audio, row["text"], fields={"speaker": parts[0]})

    return Source(path.parents[1], [path], utterances())


def spgispeech(root: Path, split: str, language: str, text: str) -> Source:
    """<split>.csv (wav_filename|wav_filesize|transcript), and <split>/<call>/<number>.wav beside it."""
    path = find_one("spgispeech", root, f"{split}.csv")
    need("spgispeech", root, path, "|", ["wav_filename", "transcript"])
    folders = (path.parent / split, path.parent / "spgispeech" / split)
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])

    def utterances() -> Iterator[Utterance]:
        for where, row in table(path, "|"):
            if row is None:
                yield Utterance(where, problem=MALFORMED)
                continue
            name = row["wav_filename"].removesuffix(".wav").replace("/", "_")
            yield Utterance(where, name, f"{folder}/{row['wav_filename']}", row["transcript"])

    return Source(path.parent, [path], utterances())


FLEURS_COLUMNS = ["id", "file_name", "raw_transcription", "transcription", "phonemes", "num_samples", "gender"]
FLEURS_FOLDERS = {
    **{"en": "en_us", "de": "de_de", "es": "es_419", "fr": "fr_fr", "it": "it_it"},
    **{"pt": "pt_br", "ru": "ru_ru", "zh": "cmn_hans_cn", "nl": "nl_nl", "ko": "ko_kr"},
}


def fleurs(root: Path, split: str, language: str, text: str) -> Source:
    """<folder>/<split>.tsv, and audio/<split>.tar.gz or audio/<split>/ beside it.

    A sentence has several readers, so that the file's name is the id. Other languages' folders beside it have the
    same sentences: those are the translations, in their original spelling.
    """
    own = FLEURS_FOLDERS[language]
    path = find_one("fleurs", root, *([f"{split}.tsv"] if root.name == own else []), f"{own}/{split}.tsv")
    audio = path.parent / "audio" / split
    tar = Path(f"{audio}.tar.gz")
    if not audio.is_dir() and not tar.is_file():
        raise UserError(f"{path}: neither {tar} nor {audio}/ is there", "download the audio too")
    others = {code: path.parents[1] / name / path.name for code, name in FLEURS_FOLDERS.items() if code != language}
    others = {code: other for code, other in others.items() if other.is_file()}
    column = "transcription" if text == "clean" else "raw_transcription"

    def utterances() -> Iterator[Utterance]:
        sentences: dict[str, dict[str, str]] = {}
        for code, other in others.items():
            for _, row in table(other, "\t", FLEURS_COLUMNS):
                if row:
                    sentences.setdefault(row["id"], {}).setdefault(code, row["raw_transcription"])
        members = tar_lengths(tar) if not audio.is_dir() else {}
        for where, row in table(path, "\t", FLEURS_COLUMNS):
            if row is None:
                yield Utterance(where, problem=MALFORMED)
                continue
            utterance = Utterance(where, Path(row["file_name"]).stem, f"{audio}/{row['file_name']}", row[column])
            utterance.fields["sentence_id"] = row["id"]
            utterance.source = row["raw_transcription"]
            utterance.targets = sentences.get(row["id"], {})
            if not audio.is_dir():
                utterance.audio = str(tar)
                member, utterance.length_s, utterance.problem = members.get(row["file_name"], ("", 0.0, MISSING))
                utterance.place = {"member": member}
            yield utterance

    return Source(path.parents[1], [path, *others.values()], utterances())


def _clip(where: str, row: dict, folder: Path) -> Utterance:
    name = row["path"].removesuffix(".mp3")  # which the oldest releases leave out
    return Utterance(where, name, f"{folder}/clips/{name}.mp3", row["sentence"], fields={"speaker": row["client_id"]})


def common_voice(root: Path, split: str, language: str, text: str) -> Source:
    """<split>.tsv (client_id, path, sentence, ...), and clips/*.mp3 beside it; with or without a language's folder."""
    path = find_one("common_voice", root, f"{language}/{split}.tsv", f"{split}.tsv", beside="clips")
    need("common_voice", root, path, "\t", ["client_id", "path", "sentence"])

    def utterances() -> Iterator[Utterance]:
        for where, row in table(path, "\t"):
            yield Utterance(where, problem=MALFORMED) if row is None else _clip(where, row, path.parent)

    return Source(path.parent, [path], utterances())


def covost2(root: Path, split: str, language: str, text: str) -> Source:
    """covost_v2.<source>_<target>.tsv (path, translation, split), one a target, and Common Voice 4's validated.tsv."""
    found = find("covost2", root, f"covost_v2.{language}_*.tsv")
    targets = {path.stem.split("_")[-1].split("-")[0]: path for path in found}  # zh of zh-CN
    targets = {code: path for code, path in targets.items() if code in LANGUAGES}
    if not targets:
        raise UserError(f"{found[0].parent}: no TSV of CoVoST into one of {', '.join(LANGUAGES)}", "check --root")
    names = (f"{language}/validated.tsv", "validated.tsv")
    nearest = found[0].parent if below(found[0].parent, *names, beside="clips") else root
    remedy = "put Common Voice 4 (validated.tsv and clips/) there"
    validated = find_one("covost2", nearest, *names, beside="clips", remedy=remedy)
    for path in targets.values():
        need("covost2", root, path, "\t", ["path", "translation", "split"])
    need("covost2", root, validated, "\t", ["client_id", "path", "sentence"])
    splits = ("train", "train_covost") if split == "train" else (split,)

    def unescaped(value: str) -> str:  # as CoVoST's own scripts read and write all of these TSVs
        return re.sub(r"\\(.)", r"\1", value)

    def utterances() -> Iterator[Utterance]:
        translations: dict[str, dict[str, str]] = {}
        first = {}
        for code, path in targets.items():
            for where, row in table(path, "\t"):
                if row is None:
                    yield Utterance(where, problem=MALFORMED)
                elif row["split"] in splits:
                    translations.setdefault(row["path"], {})[code] = unescaped(row["translation"])
                    first.setdefault(row["path"], where)
        for where, row in table(validated, "\t"):
            if row is None:
                yield Utterance(where, problem=MALFORMED)
            elif row["path"] in first:
                utterance = _clip(where, row | {"sentence": unescaped(row["sentence"])}, validated.parent)
                utterance.targets = translations.pop(row["path"], {})  # a second line is a duplicate
                yield utterance
        for path in translations:
            utterance = _clip(first[path], {"path": path, "sentence": "", "client_id": ""}, validated.parent)
            utterance.problem = f"{MISSING} (not in {validated.name})"
            yield utterance

    base = Path(os.path.commonpath([*(path.parent for path in targets.values()), validated.parent]))
    return Source(base, [*targets.values(), validated], utterances())


# --- Segments of long recordings ------------------------------------------------------------------
def list_items(path: Path, name: str) -> Iterator[dict]:
    """Stream the objects of the list that a JSON file's top object has as ``name``; the file may be of many GB.

    Raises:
        UserError: There is no such list, or it is malformed.
    """
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8") as file:

        def read(characters: int) -> str:
            try:
                return file.read(characters)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 ({error.reason})", "download it again") from None

        buffer, begun, wanted = "", None, CHUNK
        while begun is None:
            chunk = read(CHUNK)
            buffer += chunk
            begun = re.search(rf'"{name}"\s*:\s*\[', buffer)
            if begun is None and (not chunk or len(buffer) > LARGEST_OBJECT):
                raise UserError(f"{path} has no list {name!r}", "is it the corpus's own file?")
        place = begun.end()
        while True:
            place = re.compile(r"[\s,]*").match(buffer, place).end()
            if buffer.startswith("]", place):
                return
            try:
                item, place = decoder.raw_decode(buffer, place)
                wanted = CHUNK
                yield item
            except ValueError as error:  # it goes on in the next chunk, or is malformed
                chunk = read(wanted)
                wanted *= 2  # so that a long object is not parsed over and over
                buffer, place = buffer[place:] + chunk, 0
                if not chunk or len(buffer) > LARGEST_OBJECT:
                    raise UserError(f"{path}: not JSON: {error}", "download it again") from None


def gigaspeech(root: Path, split: str, language: str, text: str) -> Source:
    """GigaSpeech.json (audios[].segments[]), one JSON of GBs, and audio/ beside it; splits are subsets: XL, DEV."""
    path = find_one("gigaspeech", root, "GigaSpeech.json")
    subset = f"{{{split.strip('{}').upper()}}}"

    def utterances() -> Iterator[Utterance]:
        for number, audio in enumerate(list_items(path, "audios")):
            where = f"{path}, audio {number}"
            try:
                recording, segments = f"{path.parent}/{audio['path']}", audio["segments"]
            except (KeyError, TypeError):
                yield Utterance(where, problem=MALFORMED)
                continue
            for segment in segments:
                try:
                    if subset not in segment["subsets"]:
                        continue
                    utterance = Utterance(f"{path}, {segment['sid']}", segment["sid"], recording, segment["text_tn"])
                    utterance.start_s, utterance.end_s = float(segment["begin_time"]), float(segment["end_time"])
                    if segment.get("speaker", "N/A") != "N/A":
                        utterance.fields["speaker"] = segment["speaker"]
                    if NO_SPEECH.search(utterance.text):
                        utterance.problem = GARBAGE
                except (KeyError, TypeError, ValueError):
                    utterance = Utterance(where, problem=MALFORMED)
                yield utterance

    return Source(path.parent, [path], utterances())


def voxpopuli(root: Path, split: str, language: str, text: str) -> Source:
    """asr_<language>.tsv.gz, and raw_audios/original/<year>/<session>_original.ogg."""
    path = find_one("voxpopuli", root, f"asr_{language}.tsv.gz", f"asr_{language}.tsv", remedy="download it too")
    folder = find_one("voxpopuli", root, "raw_audios/original", remedy="download the audio too: raw_audios/original/")
    column = "normed_text" if text == "clean" else "original_text"
    need("voxpopuli", root, path, "|", ["session_id", "start_time", "end_time", "split", column])

    def utterances() -> Iterator[Utterance]:
        for where, row in table(path, "|"):
            if row is not None and row["split"] != split:
                continue
            try:
                session, start, end = row["session_id"], float(row["start_time"]), float(row["end_time"])
            except (TypeError, ValueError):
                yield Utterance(where, problem=MALFORMED)
                continue
            name = f"{session}-{row['id_']}" if row.get("id_") else milliseconds(session, start, end)
            audio = f"{folder}/{session[:4]}/{session}_original.ogg"
            utterance = Utterance(where, name, audio, row[column], start, end)
            if row.get("speaker_id"):
                utterance.fields["speaker"] = row["speaker_id"]
            yield utterance

    return Source(Path(os.path.commonpath([path.parent, folder.parents[1]])), [path], utterances())


def europarl_st(root: Path, split: str, language: str, text: str) -> Source:
    """<source>/<target>/<split>/segments.{lst,<source>,<target>}, and <source>/audios/*, converted from M4A.

    A segment that is there for several targets is one utterance with as many translations.
    """
    found = find("europarl_st", root, f"{language}/*/{split}/segments.lst")
    targets = {path.parts[-3]: path for path in found if path.parts[-3] in LANGUAGES}
    if not targets:
        raise UserError(f"{root}: none of its targets is one of {', '.join(LANGUAGES)}", "check --root")
    for target, path in targets.items():
        texts = [path.with_suffix(f".{code}") for code in (language, target)]
        for other in texts:
            check_exists(other, "get the corpus's own files")
            if sum(1 for _ in lines(other)) != sum(1 for _ in lines(path)):
                raise UserError(f"{other} and {path.name} have unequal numbers of lines", "get the corpus's own files")
    folder = found[0].parents[2]
    audio = {file.stem: file for file in sorted(folder.glob("audio*/*")) if file.suffix in READABLE}
    if not audio and next(folder.glob("audios/*.m4a"), None):
        problem = f"{folder}/audios holds .m4a alone, which libsndfile does not read"
        convert = 'ffmpeg -i "$f" -ac 1 -ar 16000 "${f%.m4a}.flac"'
        raise UserError(problem, f"convert them: for f in {folder}/audios/*.m4a; do {convert}; done")

    def utterances() -> Iterator[Utterance]:
        by_id: dict[str, Utterance] = {}  # some tens of thousands
        left = []
        for target, path in targets.items():
            ids_here = set()
            texts = (lines(path.with_suffix(f".{code}")) for code in (language, target))
            for (where, line), (_, source), (_, said) in zip(lines(path), *texts, strict=True):
                parts = (line or "").split()
                try:
                    name, start, end = parts[0], float(parts[1]), float(parts[2])
                except (IndexError, ValueError):
                    name = ""
                if not name or source is None or said is None:
                    left.append(Utterance(where, problem=MALFORMED))
                    continue
                utterance = Utterance(where, milliseconds(name, start, end), "", source, start, end)
                utterance.audio = str(audio.get(name, f"{folder}/audios/{name}.flac"))
                if utterance.id in ids_here:
                    left.append(utterance)  # a duplicate
                    continue
                ids_here.add(utterance.id)
                first = by_id.setdefault(utterance.id, utterance)
                if target != language:
                    first.targets[target] = said
        yield from by_id.values()
        yield from left

    files = {path.with_suffix(f".{code}"): 0 for target, path in targets.items() for code in ("lst", language, target)}
    return Source(folder.parent, list(files), utterances())


CORPORA: dict[str, Callable[[Path, str, str, str], Source]] = {
    "librispeech": librispeech,
    "mls": mls,
    "gigaspeech": gigaspeech,
    "spgispeech": spgispeech,
    "voxpopuli": voxpopuli,
    "fleurs": fleurs,
    "common_voice": common_voice,
    "covost2": covost2,
    "europarl_st": europarl_st,
}
