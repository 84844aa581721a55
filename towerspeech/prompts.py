"""Every prompt template and stop rule, once.

``original`` marks templates that must equal the original TowerSpeech's byte for byte; ``P`` those of
SpireLM's paper (arXiv 2503.10620, table 1).
"""

from collections.abc import Sequence

from towerspeech.languages import language

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
def speech_document(units: str, text: str) -> str:
    """One utterance and its transcript (P). The transcript is English, as all of the speech is."""
    return f"Speech:{units}\nEnglish: {text}"


def parallel_document(src_lang: str, source: str, tgt_lang: str, target: str) -> str:
    """One sentence pair (P)."""
    return f"{language(src_lang).name}: {source}\n{language(tgt_lang).name}: {target}"


# --- Instructions ---------------------------------------------------------------------------------
def asr(units: str) -> str:
    """Transcribe (P). ``Speech: `` leaves a lone word-start piece before the first unit; SpireLM has it too."""
    return f"Speech: {units}\nEnglish:"


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


# --- Stop rules -----------------------------------------------------------------------------------
# A completion ends at a newline or at an end-of-sequence id; a chat answer at an id alone. Ids, never
# strings such as "<\s>", which the original waited for in vain.
def stop_strings(chat: bool) -> list[str]:
    """Strings that end a generation; they are left out of its text."""
    return [] if chat else ["\n"]


def stop_token_ids(tokenizer) -> list[int]:
    """Ids that end a generation: the tokenizer's own EOS, and <EOD> and <|im_end|> where it has them."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in (EOD, IM_END) if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
