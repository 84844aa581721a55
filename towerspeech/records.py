"""JSONL and the original's JSON lists: chats, prompts; bad rows are named by file and line."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import check_exists, open_plain, publish
from towerspeech.languages import LANGUAGES
from towerspeech.prompts import check_reference

# --- JSONL ----------------------------------------------------------------------------------------
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that is half a character, or half of a pair


def iter_jsonl(
    path: Path,
    required: Sequence[str] = (),
    texts: Sequence[str] = (),
    unique_ids: bool = False,
    start: int = 0,
) -> Iterator[tuple[str, dict]]:
    """Stream the rows of a JSONL file, each with its ``file:line``. Blank lines are passed over.

    Args:
        path: The file, in UTF-8, with or without a BOM. A JSON list, as the original TowerSpeech's prompt files are,
            is read whole.
        required: Fields that every row must have.
        texts: Fields that every row must have, as strings.
        unique_ids: Whether a row's id must be no other row's.
        start: Rows to pass over, unread.

    Raises:
        UserError: The file is missing, empty or malformed, a row lacks a field, has something else where a text is
            wanted, or an earlier row's id; names file and line.
    """
    path, fields, ids = _file(path), [*required, *texts], set()
    for where, row in _json_rows(path, start):
        check_object(row, where)
        for name in fields:
            if name not in row:
                raise UserError(f"{where}: field {name!r} is missing", f"every row needs: {', '.join(fields)}")
        check_texts(row, texts, where)
        if unique_ids:
            if row["id"] in ids:  # where it stood is looked up only now: a set of ids alone is small
                first = next(place for place, other in _json_rows(path) if other["id"] == row["id"])
                raise UserError(f"{where}: id {row['id']!r} is there twice, first at {first}", "make ids unique")
            ids.add(row["id"])
        yield where, row


def check_object(row, where: str) -> None:
    """Raise UserError unless a row is an object."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: an object is wanted, got {type(row).__name__}", "mend or remove the line")


def check_texts(row: dict, fields: Iterable[str], where: str, blank: bool = True) -> None:
    """Raise UserError unless these fields of a row are strings; with ``blank=False``, of more than white space."""
    for name in fields:
        value = row.get(name)
        if value is None:
            raise UserError(f"{where}: it has no {name}, but a text is wanted", "write the text, or remove the row")
        if not isinstance(value, str):
            problem = f"{where}: its {name} is a {type(value).__name__}, but a text is wanted: {value!r:.80}"
            raise UserError(problem, "write the text itself, or remove the row")
        if not blank and not value.strip():
            raise UserError(f"{where}: its {name} is blank", "write the text, or remove the row")


def _file(path: Path) -> Path:
    """Raise UserError unless a path names a file that is not empty."""
    check_exists(Path(path), "check the path, or run the stage that makes it")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, but a file is wanted", f"name its files: {path}/...")
    return Path(path)


def _json_rows(path: Path, start: int = 0) -> Iterator[tuple[str, object]]:
    """The values of a JSONL file or a JSON list from number ``start`` on, each with its place."""
    with open_plain(path) as file:
        lines, items = json_lines(path, file)
        if items is not None:
            yield from islice(((f"{path}, item {i}", item) for i, item in enumerate(items, 1)), start, None)
        passed = 0
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8)  # in the middle too: files that were joined have one a file
            if not line.strip():
                continue
            if passed < start:
                passed += 1
                continue
            yield f"{path}:{number}", parse_json(line, path, number)


def json_lines(path: Path, file: Iterator[bytes]) -> tuple[Iterator[bytes], list | None]:
    """The lines of a JSONL file, blank ones too; or no lines but the items, if the file holds one JSON list.

    The first line that is not blank tells which.
    """
    head = []
    for line in file:
        head.append(line)
        line = line.removeprefix(codecs.BOM_UTF8).lstrip()
        if line.startswith(b"["):
            items = parse_json(line + b"".join(file), path, len(head))
            if items:
                return iter(()), items
            break
        if line:
            return chain(head, file), None
    raise UserError(f"{path} holds no rows", "check the path, or run the stage that makes it")


def parse_json(data: bytes, path: Path, number: int):
    """Parse one JSON text that begins in line ``number`` of a file; UserError if it is none."""
    where = f"{path}:{number}"
    try:
        value = json.loads(data.rstrip().decode("utf-8"))
        if SURROGATE.search(data):
            dumps(value).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise UserError(f"{path}:{line}: not JSON ({error.msg})", "mend or remove the line") from None
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason})", "convert the file to UTF-8") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(f"{where}: half a character (the lone surrogate {half})", "mend or remove the row") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand nested lists
        raise UserError(f"{where}: not JSON that can be read ({error})", "mend or remove the line") from None


def read_jsonl(path: Path, required: Sequence[str] = ()) -> list[dict]:
    """All rows of ``iter_jsonl``."""
    return [row for _, row in iter_jsonl(path, required)]


# --- Chats ----------------------------------------------------------------------------------------
ROLES = ("system", "user", "assistant")


def check_messages(messages, where: str) -> None:
    """Raise UserError unless these are the turns of a chat: objects with one of ``ROLES`` and a text as content.

    OpenAI's content parts (a list) are none: no tokenizer here reads audio or images.
    """
    if not isinstance(messages, list) or not messages:
        problem = f"{where}: messages must be a list of turns with role and content, got {messages!r:.80}"
        raise UserError(problem, "mend or remove the row")
    for number, turn in enumerate(messages, 1):
        place = f"{where}, message {number}"
        if not isinstance(turn, dict):
            raise UserError(f"{place} is {turn!r:.80}, but an object with role and content is wanted", "mend the row")
        if turn.get("role") not in ROLES:
            problem = f"its role is {turn['role']!r:.80}" if "role" in turn else "it has no role"
            raise UserError(f"{place}: {problem}", f"use one of {', '.join(ROLES)}")
        check_texts(turn, ["content"], place, blank=False)


# --- Rows and lines, out and in -------------------------------------------------------------------
def dumps(row: dict) -> str:
    """One JSONL line, without its newline."""
    return json.dumps(row, ensure_ascii=False)


def write_jsonl(target: Path, rows: Iterable[dict]) -> int:
    """Write rows as JSONL, atomically; returns their number."""
    count = 0
    with publish(target) as path, open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(dumps(row) + "\n")
            count += 1
    return count


def read_lines(path: Path) -> list[str]:
    """Read a plain text file, one sentence a line; only \\n ends a line, as in sacreBLEU. A BOM is no text."""
    try:
        text = _file(path).read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})", "convert the file to UTF-8") from None
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


# --- Prompts --------------------------------------------------------------------------------------
METADATA = ("task", "dataset", "shots", "src_lang", "tgt_lang", "source")


def facts_of_name(path: Path) -> dict:
    """What a prompt file's name and folder say of its rows, as the original's do: 5_shot/flores_de-en.json."""
    codes = "|".join(LANGUAGES)
    facts = {"dataset": path.stem}
    if name := re.fullmatch(rf"([\w-]+?)_({codes})-({codes})(_(\d+)_shot)?", path.stem):
        facts = {"task": "mt", "dataset": name[1], "src_lang": name[2], "tgt_lang": name[3]}
    elif name := re.fullmatch(rf"AST_({codes})", path.stem):  # the original's cascade of FLEURS
        facts = {"task": "cascaded_st", "dataset": "AST", "src_lang": "en", "tgt_lang": name[1]}
    if shots := re.match(r"(\d+)_shot$", path.resolve().parent.name):
        facts["shots"] = int(shots[1])
    return facts


def check_prompt(row: dict, where: str) -> None:
    """Raise UserError unless a row asks something, has texts as id and reference, and can equal its reference."""
    if "messages" in row:
        check_messages(row["messages"], where)
    elif not isinstance(row.get("instruction"), str) or not row["instruction"]:
        raise UserError(f"{where}: neither instruction nor messages", "run instructions/build_instructions.py")
    check_texts({"output": "", **row}, ("id", "output"), where)
    if "messages" not in row:
        check_reference(row.get("output", ""), where)


def read_prompts(files: list[Path], facts: dict | None = None) -> dict[str, list[dict]]:
    """Read prompt files (JSONL, or the original's JSON lists) as {output file: rows}.

    A file in a folder such as 5_shot/, asr/ or st/ keeps that folder's name. Rows without an id get their number.

    What rows are about (of METADATA), ``facts`` say where rows do not, else their file's name.

    Raises:
        UserError: Malformed rows, ids that repeat, a reference that no output can equal; or two files that would be
            written to one.
    """
    tasks = {}
    for path in map(Path, files):
        folder = path.parent.name if re.fullmatch(r"\d+_shot|asr|st|cascaded_st", path.resolve().parent.name) else ""
        name = str(Path(folder) / f"{path.stem}.jsonl")
        if name in tasks:
            raise UserError(f"{path}: another prompt file is already called {name}", "rename one of them")
        known = facts_of_name(path) | {key: value for key, value in (facts or {}).items() if value is not None}
        rows, seen = [], set()
        for number, (where, row) in enumerate(iter_jsonl(path)):
            row = {**known, **{key: value for key, value in row.items() if value is not None}}
            row.setdefault("id", f"{path.stem}-{number}")
            check_prompt(row, where)
            if row["id"] in seen:
                raise UserError(f"{where}: id {row['id']!r} repeats", "ids must be unique in a file")
            seen.add(row["id"])
            rows.append({**row, "where": where})
        missing = [key for key in METADATA if key != "source" and any(key not in row for row in rows)]
        if missing:
            print(f"{path}: nothing says its {', '.join(missing)}, without which score.py cannot score it")
        tasks[name] = rows
    return tasks


def prompt_hash(row: dict) -> str:
    """SHA-256 of what the model is asked."""
    return hashlib.sha256(dumps(row.get("messages") or row["instruction"]).encode()).hexdigest()
