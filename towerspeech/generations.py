"""A checkpoint's finished generations, and plain line files: read and checked once, to be scored and compared."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from towerspeech.errors import UserError
from towerspeech.files import check_exists, hash_file, read_json
from towerspeech.records import check_texts, iter_jsonl, prompt_hash, read_lines
from towerspeech.stage import RUN_INFO

FACTS = ("task", "dataset", "shots", "src_lang", "tgt_lang")
GENERATED = ("id", *FACTS, "reference", "text", "finish_reason")


class Outputs(NamedTuple):
    """One system's outputs for one test set."""

    file: Path
    facts: dict[str, str]  # FACTS, and whatever else the reader knows
    ids: list[str] | None  # None for line files: the line is the id
    hypotheses: list[str]
    references: list[str]
    sources: list[str] | None  # None where a row has none
    finish_reasons: list[str | None] | None
    sha256: str
    sources_sha256: str = ""  # of a plain file, which sha256 leaves out


@contextlib.contextmanager
def naming(outputs: Outputs) -> Iterator[None]:
    """Name the file in an error that is about its outputs."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{outputs.file}: {error}") from None


def finished_files(folder: Path) -> dict[Path, str]:
    """A checkpoint's generation files and their hashes, which must be those that its run_info.json recorded.

    Raises:
        UserError: The generation is not finished, or a file is missing, changed or not of that run.
    """
    remedy = f"run generate/generate.py for {folder} (it resumes)"
    check_exists(folder, remedy)
    infos = sorted(folder.glob(f"*{RUN_INFO}"))
    if not infos:
        raise UserError(f"{folder} is not finished: it has no {RUN_INFO}", remedy)
    recorded = {}
    for info in infos:
        outputs = read_json(info, remedy, ("outputs",))["outputs"]
        recorded |= {folder / name: sha256 for name, sha256 in outputs.items() if name.endswith(".jsonl")}
    if not recorded:
        raise UserError(f"{infos[0]} records no generations", remedy)
    there = {path for path in folder.rglob("*.jsonl") if not path.name.startswith(".")}
    for path in sorted({*recorded, *there}):
        if path not in there:
            raise UserError(f"{path} is gone", remedy)
        if path not in recorded:
            raise UserError(f"{path} is not of the run that {infos[0]} records", "move it away, or generate anew")
        if hash_file(path) != recorded[path]:
            raise UserError(f"{path} changed since it was generated: not the hash in {infos[0].name}", "generate anew")
    return dict(sorted(recorded.items()))


def read_folder(folder: Path, prompts: dict[str, list[dict]] | None = None) -> list[Outputs]:
    """Read a checkpoint's generations.

    Args:
        folder: As generate/generate.py leaves it.
        prompts: As ``read_prompts`` gives them; generations of the same name must be of these.

    Raises:
        UserError: As ``finished_files`` and ``read_generations`` do.
    """
    return [
        read_generations(path, sha256, (prompts or {}).get(str(path.relative_to(folder))))
        for path, sha256 in finished_files(folder).items()
    ]


def read_generations(path: Path, sha256: str, prompts: list[dict] | None = None) -> Outputs:
    """Read one file of generations; all of its rows must be of one test set, and answer the prompts, if given.

    Raises:
        UserError: A malformed row, a repeated id, rows of two test sets or of other prompts; names file and line.
    """
    rows = []
    for where, row in iter_jsonl(path, GENERATED, unique_ids=True):
        rows.append({**row, "where": where})
        for name in FACTS:
            if row[name] != rows[0][name]:
                raise UserError(f"{where}: {name} is {row[name]!r}, above {rows[0][name]!r}", "generate anew")
        check_texts(row, ("text", "reference"), where)
    if prompts is not None:
        check_prompts(path, rows, prompts)
    sources = [row.get("source") for row in rows]
    return Outputs(
        file=path,
        facts={name: str(rows[0][name]) for name in FACTS},
        ids=[row["id"] for row in rows],
        hypotheses=[row["text"] for row in rows],
        references=[row["reference"] for row in rows],
        sources=sources if all(isinstance(text, str) for text in sources) else None,
        finish_reasons=[row["finish_reason"] for row in rows],
        sha256=sha256,
    )


def check_prompts(path: Path, rows: list[dict], prompts: list[dict]) -> None:
    """Raise UserError unless the rows answer these very prompts, all of them, and carry their references."""
    remedy = "generate anew from these prompts, or name those that were used"
    asked = {prompt["id"]: prompt for prompt in prompts}
    for row in rows:
        prompt = asked.pop(row["id"], None)
        if prompt is None:
            problem = f"is none of the prompts from {prompts[0]['where']} on"
        elif row.get("prompt_sha256") != prompt_hash(prompt):
            problem = f"was generated from another prompt than {prompt['where']}"
        elif row["reference"] != prompt.get("output"):
            problem = f"has another reference than {prompt['where']}"
        else:
            continue
        raise UserError(f"{row['where']}: id {row['id']!r} {problem}", remedy)
    for prompt in asked.values():
        raise UserError(f"{path} has no output for {prompt['where']}, id {prompt['id']!r}", remedy)


def read_line_files(hypotheses: Path, references: Path, sources: Path | None, facts: dict[str, str]) -> Outputs:
    """Read outputs, references and perhaps sources from plain files, one segment a line."""
    outputs = read_lines(hypotheses)
    lines = {"references": read_lines(references), "sources": read_lines(sources) if sources else None}
    for (name, texts), path in zip(lines.items(), (references, sources), strict=True):
        if texts is not None and len(texts) != len(outputs):
            raise UserError(
                f"{len(outputs)} hypotheses in {hypotheses} for {len(texts)} {name} in {path}",
                "all need one line a segment, in the same order",
            )
    return Outputs(
        file=hypotheses,
        facts=facts,
        ids=None,
        hypotheses=outputs,
        **lines,
        finish_reasons=None,
        sha256=hashlib.sha256(f"{hash_file(hypotheses)} {hash_file(references)}".encode()).hexdigest(),
        sources_sha256=hash_file(sources) if sources else "",
    )
