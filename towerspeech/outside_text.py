"""Text from outside is text: whatever it spells, it becomes neither a control token nor a speech unit.

A Hugging Face tokenizer takes ``<s>`` or ``<|im_end|>`` for the control token wherever a text spells it, and merges
may make one of its characters. So what comes from outside goes through ``marker``, which breaks such spellings with a
mark, and is encoded with ``text_tokenizer``, which takes the marks out again after it has looked for control tokens.
What our own templates put around a text is not marked, and stays what it is.
"""

import copy
import functools
import json
import re
from collections.abc import Callable

from towerspeech.errors import UserError
from towerspeech.tokenizer import CHAT_TOKENS, SPECIAL_TOKENS

MARK = "\U000ffffe"  # of plane 15, whose characters no text from outside may hold, but never a unit
UNMARK = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}  # as a normalizer of the tokenizers library
PLANE_15 = re.compile("[\U000f0000-\U000fffff]")
FIRST_BYTE = b"\xf3"  # of these characters, and of other rare ones, in UTF-8
SPEECH_TASKS = ("asr", "st")


def control_tokens(tokenizer) -> list[str]:
    """What a text must not turn into, the longest first: special tokens, and whatever was added to a vocabulary.

    Added white space (code models have it) is text, and added units are told apart by their characters.
    """
    own = {*SPECIAL_TOKENS, *CHAT_TOKENS} & tokenizer.get_vocab().keys()
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens, *own}
    tokens = {token for token in tokens if len(token.strip()) > 1 and not PLANE_15.search(token)}
    return sorted(tokens, key=lambda token: (-len(token), token))


def marker(tokenizer) -> Callable[[str], str]:
    """Make a function that marks a text from outside, so that ``text_tokenizer`` takes no control token from it.

    Other processes can be given it.
    """
    tokens = control_tokens(tokenizer)
    return functools.partial(_mark, re.compile("|".join(map(re.escape, tokens)) or r"\Z(?!\Z)"))


def _mark(spelled: re.Pattern, text: str) -> str:
    while spelled.search(text):  # again: tokens may overlap
        text = spelled.sub(lambda match: match[0][0] + MARK + match[0][1:], text)
    return text


def text_tokenizer(tokenizer):
    """Copy a fast tokenizer so that marks leave no trace; texts without control tokens get the very same ids.

    The copy is for encoding alone: save the original. A tokenizer that is not fast, or that makes a control token of
    its mere characters, is refused.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path} is no fast tokenizer", "it needs a tokenizer.json")
    from tokenizers import Tokenizer

    tokens = control_tokens(tokenizer)
    controls = set(tokens)
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizers = [UNMARK, *([saved["normalizer"]] if saved["normalizer"] else [])]
    saved["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    for token in saved["added_tokens"]:
        if token["content"] in controls:
            token["normalized"] = False  # looked for before the marks are taken out
    if merges := saved["model"].get("merges"):
        saved["model"]["merges"] = [pair for pair in merges if "".join(pair) not in controls]
    made = copy.copy(tokenizer)
    made._tokenizer = Tokenizer.from_str(json.dumps(saved))
    mark, ids = marker(tokenizer), set(tokenizer.convert_tokens_to_ids(tokens))
    for token in tokens:  # the proof, before it is used
        if ids.intersection(made(mark(token), add_special_tokens=False)["input_ids"]):
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer makes {token} of its mere characters",
                "use one of the BPE kind, whose control tokens are not pieces of its text",
            )
    return made


def check_outside_text(text: str, where: str) -> None:
    """Raise UserError if a text from outside holds characters of plane 15, which would be speech units."""
    if FIRST_BYTE not in text.encode("utf-8", "surrogatepass"):  # a quarter of the time that the pattern takes
        return
    if unit := PLANE_15.search(text):
        raise UserError(
            f"{where}: character {unit.start() + 1} of the text is U+{ord(unit[0]):X}, which is for speech units",
            "take such private-use characters (icons of a font, say) out of the text",
        )


def check_units(text: str, task: str | None, num_units: int, offset: int, where: str) -> None:
    """Check the speech units in a text that may hold some: a prompt, or a turn of a chat.

    Raises:
        UserError: A character of plane 15 is none of the tokenizer's ``num_units`` units, of which 0 has the code
            point ``offset``; or one does not follow ``Speech:``, and the row's task is no speech task.
    """
    for char in {*PLANE_15.findall(text)}:
        if not offset <= ord(char) < offset + num_units:
            unit = f"speech unit U+{ord(char):X} (id {ord(char) - offset})"
            raise UserError(
                f"{where}: {unit} is none of the tokenizer's {num_units}",
                "use the checkpoint, the k-means and the unit offset that belong together",
            )
    if task not in SPEECH_TASKS:
        check_outside_text(re.sub(r"(?i)(speech: ?)[\U000f0000-\U000fffff]+", r"\1", text), where)
