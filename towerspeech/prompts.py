"""Every prompt template and stop rule, once.

``original`` marks templates that must equal the original TowerSpeech's byte for byte; ``P`` those of
SpireLM's paper (arXiv 2503.10620, table 1); ``S`` those of its repository, utter-project/SpireLM, file
instruction-templates/spire-style-template.json at commit 4499c00. S puts them into a user's message
(scripts/build_instructions.py), and has none with examples.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from towerspeech import units
from towerspeech.languages import language
from towerspeech.records import read_units
from towerspeech.stage import UserError
from towerspeech.tokenizer import check_outside_text

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = ("<CLS>", "<EOD>", "<MASK>", "<PAD>", "<SEP>")  # SpireLM's order; CHAT_TOKENS follow the units
CHAT_TOKENS = (IM_END, IM_START)
EOD, PAD = "<EOD>", "<PAD>"

# {% generation %} marks what TRL trains on: the assistant's content and the <|im_end|> that closes it.
# The newline after it is the next turn's.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# --- Continued pretraining documents --------------------------------------------------------------
def speech_document(speech: str, text: str) -> str:
    """One utterance and its transcript (P). The transcript is English, as all of the speech is."""
    return f"Speech:{speech}\nEnglish: {text}"


def parallel_document(src_lang: str, source: str, tgt_lang: str, target: str) -> str:
    """One sentence pair (P)."""
    return f"{language(src_lang).name}: {source}\n{language(tgt_lang).name}: {target}"


# --- Instructions ---------------------------------------------------------------------------------
def asr(speech: str) -> str:
    """Transcribe (P, S). ``Speech: `` leaves a lone word-start piece before the first unit; SpireLM has it too."""
    return f"Speech: {speech}\nEnglish:"


def st(speech: str, tgt_lang: str) -> str:
    """Translate speech directly (S): ``asr`` with the language's name swapped."""
    return f"Speech: {speech}\n{language(tgt_lang).name}:"


def mt_0_shot(src_lang: str, tgt_lang: str, source: str) -> str:
    """Translate (original, all FLORES and WMT23 en-X files)."""
    src, tgt = language(src_lang).name, language(tgt_lang).name
    return f"Translate the following {src} source text to {tgt}:\n{src}: {source}\n{tgt}:"


def mt_few_shot(
    src_lang: str, tgt_lang: str, source: str, examples: Sequence[tuple[str, str]], separator: str = "\n"
) -> str:
    """Translate after examples (original). ``separator`` joins them: its WMT23 files have ``\\n `` there."""
    src, tgt = language(src_lang).name, language(tgt_lang).name
    shown = [f"{src} text: {s}\n{tgt} text: {t}" for s, t in examples]
    return separator.join([*shown, f"{src} text: {source}\n{tgt} text:"])


def mt_spire(src_lang: str, tgt_lang: str, source: str) -> str:
    """Translate (S)."""
    src, tgt = language(src_lang).name, language(tgt_lang).name
    return f"Translate the following text from {src} to {tgt}.\n{src}: {source}\n{tgt}:"


def cascaded_st(tgt_lang: str, transcript: str) -> str:
    """Translate an English ASR output (original, AST_de.json, its slips included)."""
    tgt = language(tgt_lang).name
    return f"Translate the following English source text to {tgt} Text: {transcript}\n. {tgt}:"


# --- Prompt rows ----------------------------------------------------------------------------------
def prompt_row(style: str, row_id: str, instruction: str, output: str, **facts) -> dict:
    """One row of a prompts file: a text to complete (original) or a user's message (chat, spire)."""
    asked = {"instruction": instruction}
    if style != "original":
        asked = {"messages": [{"role": "user", "content": instruction}]}
    return {"id": row_id, **asked, "output": output, **facts}


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
    of ASR, which has no such thing, the audio file's path.

    Args:
        folder: Units Parquet.
        dataset: Name of the test set.
        style: original, chat or spire (speech has one template, so the last two are the same).
        offset: Of the unit characters.
        num_units: If given, every id must lie below it.
        wanted: Row numbers, from 1; default: all.
        tgt_lang: Language to write.
        targets: The translations by id, if it is not English.

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
        instruction, output = asr(speech), row["text"]
        if targets is not None:
            if row["id"] not in targets:
                raise UserError(f"{where}: no translation into {language(tgt_lang).name}", "add it to --translations")
            facts |= dict(task="st", source=row["text"])
            instruction, output = st(speech, tgt_lang), targets[row["id"]]
        if style == "original":
            check_reference(output, where)
        rows.append(prompt_row(style, row["id"], instruction, output, **facts))
    if wanted and number < wanted[-1]:
        raise UserError(f"--test_lines ends at {wanted[-1]}, but {folder} has {number} rows", "name fewer")
    if not rows:
        raise UserError(f"{folder} holds no utterances", "run speech_units/label_audio.py")
    return rows


# --- Stop rules -----------------------------------------------------------------------------------
# A completion ends at a newline or at an end-of-sequence id; a chat answer at an id alone. Ids, never
# strings such as "<\s>", which the original waited for in vain.
def stop_strings(chat: bool) -> list[str]:
    """Strings that end a generation; they are left out of its text."""
    return [] if chat else ["\n"]


def check_reference(reference: str, where: str) -> None:
    """Raise UserError if a completion, which ends at a newline, can never equal its reference."""
    if "\n" in reference.strip():
        raise UserError(
            f"{where}: the reference has several lines, but a completion ends at its first newline",
            "build these prompts with --style chat, whose answers may have several, or join the lines",
        )


def stop_token_ids(tokenizer) -> list[int]:
    """Ids that end a generation: the tokenizer's own EOS, and <EOD> and <|im_end|> where it has them."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in (EOD, IM_END) if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
