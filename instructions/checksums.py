"""Checksums of the prompts of FLORES-200 and WMT23, whose text may not be in the repo: checksums.json, beside this.

A file's SHA-256 tells whether it is the one that was meant; four hex digits a prompt tell which prompts are others.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from towerspeech.records import dumps

RECORDED = Path(__file__).with_name("checksums.json")
DIGITS = 4  # of each prompt's own checksum; 27,169 prompts are 109 kB


def checksums(rows: list[dict]) -> dict[str, str]:
    """A prompt file's checksums, of what each row asks and of its reference: ids and other facts may change.

    Returns:
        ``sha256`` of all rows, and ``prompts``, DIGITS hex digits a row.
    """
    texts = [dumps([row["instruction"], row["output"]]).encode() for row in rows]
    each = "".join(hashlib.sha256(text).hexdigest()[:DIGITS] for text in texts)
    return {"sha256": hashlib.sha256(b"\n".join(texts)).hexdigest(), "prompts": each}


def verify(files: Iterable[tuple[str, list[dict]]]) -> list[str]:
    """Compare prompt files with the recorded checksums.

    Args:
        files: Name (0_shot/flores_de-en.jsonl) and rows of each; those without a recorded checksum are passed over.

    Returns:
        What is to be said: how many files are the recorded ones, and of each other file which prompts differ.
    """
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    known = [(name, checksums(rows), recorded[name]) for name, rows in files if name in recorded]
    if not known:
        return []
    equal = sum(built == wanted for _, built, wanted in known)
    said = [f"{equal} of {len(known)} files have the checksums of {RECORDED.name}"]
    for name, built, wanted in known:
        if built != wanted:
            ours, theirs = _each(built), _each(wanted)
            differing = [str(i + 1) for i in range(min(len(ours), len(theirs))) if ours[i] != theirs[i]]
            number = f"{len(ours):,} prompts, not {len(theirs):,}; " if len(ours) != len(theirs) else ""
            said.append(f"{name} differs: {number}lines {', '.join(differing) or 'none'} are of another release")
    return said


def _each(sums: dict[str, str]) -> list[str]:
    """The checksums of a file's prompts, one by one."""
    return [sums["prompts"][i : i + DIGITS] for i in range(0, len(sums["prompts"]), DIGITS)]
