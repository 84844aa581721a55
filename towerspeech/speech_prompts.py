"""Prompts made of a units folder: transcription and direct speech translation."""

from collections.abc import Mapping
from pathlib import Path

from towerspeech import prompts, units
from towerspeech.errors import UserError
from towerspeech.languages import language
from towerspeech.outside_text import check_outside_text
from towerspeech.units_parquet import read_units


def speech_rows(
    folder: Path,
    dataset: str,
    style: str,
    offset: int = units.OFFSET,
    num_units: int | None = None,
    wanted: range | None = None,
    tgt_lang: str = "en",
    targets: Mapping[str, str] | None = None,
) -> list[dict]:
    """The prompts of a units folder, in the order of its rows: ASR, or direct speech translation into ``tgt_lang``.

    ``source`` is what a score is computed against beside the reference: the transcript of speech that is translated;
    of ASR, which has no such thing, the audio file's path. Styles are original, chat and spire (speech has one
    template, so the last two are the same); ``wanted`` are row numbers, from 1; ``targets`` the translations by id, if
    ``tgt_lang`` is not English.

    Raises:
        UserError: A row is not English, has no units, transcript or translation, repeats an id, or its transcript
            spells units; or there are fewer than wanted.
    """
    rows, seen, number = [], set(), 0
    for number, row in enumerate(read_units(folder, num_units), 1):
        if wanted and number not in wanted:
            continue
        where = f"{folder}, row {number} (id {row['id']})"
        if row["language"] != "en":
            raise UserError(f"{where}: language {row['language']!r}, but speech must be English (en)", "leave it out")
        if not row["id"]:
            raise UserError(f"{where}: no id", "label it from a manifest with ids")
        if not row["units"] or not (row["text"] or "").strip():
            raise UserError(f"{where}: no {'text' if row['units'] else 'units'}", "label it from a manifest with text")
        check_outside_text(row["text"], where)
        if row["id"] in seen:
            raise UserError(f"{where}: the id is there twice", "give each utterance an id of its own")
        seen.add(row["id"])
        speech = units.to_text(row["units"], offset)
        facts = dict(task="asr", dataset=dataset, shots=0, src_lang="en", tgt_lang=tgt_lang, source=row["audio"])
        instruction, output = prompts.asr(speech), row["text"]
        if targets is not None:
            if row["id"] not in targets:
                raise UserError(f"{where}: no translation into {language(tgt_lang).name}", "add it to --translations")
            facts |= dict(task="st", source=row["text"])
            instruction, output = prompts.st(speech, tgt_lang), targets[row["id"]]
        if style == "original":
            prompts.check_reference(output, where)
        rows.append(prompts.prompt_row(style, row["id"], instruction, output, **facts))
    if wanted and number < wanted[-1]:
        raise UserError(f"--test_lines ends at {wanted[-1]}, but {folder} has {number} rows", "name fewer")
    if not rows:
        raise UserError(f"{folder} holds no utterances", "run speech_units/label_audio.py")
    return rows
