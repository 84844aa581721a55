"""Every prompt template, once.

``original`` marks templates that must equal the original TowerSpeech's byte for byte; ``P`` those of
SpireLM's paper (arXiv 2503.10620, table 1); ``S`` those of its repository, utter-project/SpireLM, file
instruction-templates/spire-style-template.json at commit 4499c00. S puts them into a user's message
(scripts/build_instructions.py), and has none with examples.
"""

from collections.abc import Sequence

from towerspeech.errors import UserError
from towerspeech.languages import language


# --- Continued pretraining documents --------------------------------------------------------------
def speech_document(speech: str, text: str, template: str = "transcript", code: str = "en") -> str:
    """One utterance: units and transcript (P), ``units`` alone, or ``text_to_speech``: the transcript, then units."""
    if template == "units":
        return f"Speech:{speech}"
    name = language(code).name
    return f"{name}: {text}\nSpeech:{speech}" if template == "text_to_speech" else f"Speech:{speech}\n{name}: {text}"


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


def check_reference(reference: str, where: str) -> None:
    """Raise UserError if a completion, which ends at a newline, can never equal its reference."""
    if "\n" in reference.strip():
        raise UserError(
            f"{where}: the reference has several lines, but a completion ends at its first newline",
            "build these prompts with --style chat, whose answers may have several, or join the lines",
        )
