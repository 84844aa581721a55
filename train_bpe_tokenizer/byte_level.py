"""Byte-level bases of merge_tokenizer.py: a BPE over bytes, in a tokenizer.json alone (Llama-3, Qwen, SmolLM2).

GPT-2's scheme writes each byte as one character, and a unit is four bytes: F3 B0 80 80 and on, F3 B1 80 80 for unit
4096. Three things make it one token, and keep its merges apart from the text's:

- Merges (F3, B0), (F3 B0, 80), (F3 B0 80, 80) build each unit from its bytes. They come before the base's own, so that
  none of these can take a unit's bytes apart. F3 B0 to F3 BF begin nothing but characters of plane 15: one that is no
  unit may get other tokens than from the base, all other text gets the same.
- The unit BPE's merges come last. They join units with units alone.
- A run of units is split off before the base splits the text in its own way: what stands before and after it is
  tokenized as on its own, and it as on its own.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from towerspeech import units as dsu
from towerspeech.command import UserError
from towerspeech.files import read_json
from towerspeech.tokenizer import CHAT_TEMPLATE, CHAT_TOKENS, PAD

KNOWN = "use a byte-level BPE such as Llama-3's, Qwen's or SmolLM2's, or a SentencePiece BPE with its tokenizer.model"
AS_PUBLISHED = "start from the base as published, or leave out what it has: see --special_tokens and --chat"
GENERIC = "PreTrainedTokenizerFast"  # the class that takes a tokenizer.json as it is; transformers 4 knows it too
# Settings that describe where a tokenizer was loaded from, or repeat what tokenizer.json says.
DROPPED = (
    "added_tokens_decoder",
    "auto_map",
    "backend",
    "extra_special_tokens",
    "is_local",
    "local_files_only",
    "name_or_path",
    "tokenizer_file",
)


def byte_characters() -> list[str]:
    """GPT-2's character for each byte: itself where it is printable in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


CHARACTERS = byte_characters()


def write(text: str) -> str:
    """A text as a byte-level vocabulary has it: one character a byte of its UTF-8."""
    return "".join([CHARACTERS[byte] for byte in text.encode("utf-8")])


# --- Reading --------------------------------------------------------------------------------------
def load_base(base: Path):
    """Load a base's tokenizer as its tokenizer.json describes it.

    Returns:
        The tokenizer, and whether transformers by itself would build another one from code: for some
        classes (GPT2Tokenizer, Qwen2Tokenizer) it takes no more than vocabulary and merges from the file.

    Raises:
        UserError: transformers cannot load it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        usual = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        return PreTrainedTokenizerFast.from_pretrained(base, local_files_only=True), (
            type(usual) is not PreTrainedTokenizerFast
        )
    except Exception as error:  # the tokenizers library raises nothing more special
        raise UserError(
            f"{base}/tokenizer.json does not load: {str(error).splitlines()[0]}", "copy it anew, with its settings"
        ) from None


def _steps(step: dict | None) -> Iterator[dict]:
    """The steps of a pre-tokenizer or decoder, sequences opened."""
    inner = [part for value in (step or {}).values() if isinstance(value, list) for part in value]
    if step and step["type"] == "Sequence":
        for part in inner:
            yield from _steps(part)
    elif step:
        yield step


def check_base(base: Path, saved: dict, vocabulary: dict[str, int], wanted: Sequence[str]) -> None:
    """Raise UserError if units cannot be added to the base, or if somebody has added them already.

    Args:
        base: Its folder.
        saved: Its tokenizer.json.
        vocabulary: All its tokens, added ones too.
        wanted: The special tokens that it must not have yet.
    """
    path = base / "tokenizer.json"
    model = saved["model"]
    if model["type"] != "BPE":
        raise UserError(f"{path} is no BPE model but {model['type']}", KNOWN)
    splits = [step for step in _steps(saved["pre_tokenizer"]) if step["type"] == "ByteLevel"]
    decodes = any(step["type"] == "ByteLevel" for step in _steps(saved["decoder"]))
    if not splits or not decodes or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise UserError(f"{path} is no byte-level BPE", KNOWN)
    if any(step["add_prefix_space"] for step in splits):
        raise UserError(f"{path} puts a space before every text, so before units too", KNOWN)
    missing = [byte for byte in (0xF3, *range(0x80, 0xC0)) if CHARACTERS[byte] not in vocabulary]
    if missing:
        raise UserError(f"{path} has no token for byte 0x{missing[0]:02X}, of which units are made", KNOWN)
    gaps = sorted(set(range(len(vocabulary))).difference(vocabulary.values()))
    if gaps:
        raise UserError(f"{path} has no token with id {gaps[0]}, but higher ones", "fill the gap with an added token")
    added = [token for token in vocabulary if token in wanted or _has_units(token)]
    if added:
        raise UserError(f"{base} already has {added[0]!r}", AS_PUBLISHED)


def _has_units(token: str) -> bool:
    if CHARACTERS[0xF3] in token and all(char in CHARACTERS for char in token):
        token = bytes(map(CHARACTERS.index, token)).decode("utf-8", "ignore")
    return any(ord(char) >= dsu.OFFSET for char in token)


# --- Building -------------------------------------------------------------------------------------
def extend(
    saved: dict,
    vocabulary: dict[str, int],
    specials: Sequence[str],
    num_units: int,
    merges: Sequence[str],
    joins: Sequence[tuple[str, str]],
    chat_tokens: Sequence[str],
) -> tuple[dict, int]:
    """Add tokens to a tokenizer.json.

    Ids follow the base's: specials, units, merges, the ChatML tokens that it lacks, pieces of units' bytes.

    Args:
        saved: The base's tokenizer.json.
        vocabulary: All its tokens, added ones too.
        specials: New special tokens.
        num_units: Number of units.
        merges: The unit BPE's pieces, as private-use text, in order.
        joins: The pairs that make them, best first.
        chat_tokens: ChatML tokens; those that the base has stay as they are.

    Returns:
        The new tokenizer.json, and the number of pieces of units' bytes.
    """
    model, units = saved["model"], [write(unit) for unit in dsu.to_text(range(num_units))]
    builds = dict.fromkeys((unit[:cut], unit[cut]) for cut in (1, 2, 3) for unit in units)  # a set with an order
    pieces = [left + right for left, right in builds if len(left) < 3 and left + right not in vocabulary]
    lacking = [token for token in chat_tokens if token not in vocabulary]
    new = [*specials, *units, *map(write, merges), *lacking, *pieces]
    # An added token keeps its id on loading only if the model's own vocabulary has it (Llama-3's has not).
    everything = {**vocabulary, **{token: len(vocabulary) + index for index, token in enumerate(new)}}
    last = [(write(left), write(right)) for left, right in joins]
    kept = [merge for merge in model["merges"] if tuple(merge) not in builds]  # of a pair's two ranks the later counts
    known = {token["content"] for token in saved["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    run = {"Regex": f"[{dsu.to_text([0])}-{dsu.to_text([num_units - 1])}]+"}
    split = {"type": "Split", "pattern": run, "behavior": "Isolated", "invert": False}
    own = saved["pre_tokenizer"]
    extended = {
        **saved,
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *saved["added_tokens"],
            *(
                {"id": everything[token], "content": token, **flags}
                for token in (*specials, *chat_tokens)
                if token not in known
            ),
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, *(own["pretokenizers"] if own["type"] == "Sequence" else [own])],
        },
        "model": {**model, "vocab": everything, "merges": [*builds, *kept, *last]},
    }
    return extended, len(pieces)


def save(folder: Path, base: Path, own, extended: dict, specials: Sequence[str], chat: bool, rebuilt: bool):
    """Write the Hugging Face files; returns the tokenizer as loaded from them, beside the base's model.

    Args:
        folder: To write to.
        base: The base's folder.
        own: Its tokenizer, as ``load_base`` gives it.
        extended: The new tokenizer.json.
        specials: All special tokens that were asked for.
        chat: Whether to write our chat template; else the base's own stays.
        rebuilt: Whether transformers would build the base's tokenizer from code.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    Tokenizer.from_str(json.dumps(extended)).save(str(folder / "tokenizer.json"))
    path = base / "tokenizer_config.json"
    settings = read_json(path, "copy it anew") if path.is_file() else {}
    settings = {name: value for name, value in settings.items() if name not in DROPPED}
    named = {name: str(token) for name, token in own.special_tokens_map.items() if isinstance(token, str)}
    if PAD in specials:
        named["pad_token"] = PAD
    special = dict.fromkeys((*own.extra_special_tokens, *specials, *(CHAT_TOKENS if chat else ())))
    further = [token for token in map(str, special) if token not in named.values()]
    settings |= {**named, "additional_special_tokens": further, "tokenizer_class": GENERIC}
    if rebuilt:
        # For Qwen2 transformers 5 takes its own class whatever tokenizer_class says, which drops our pre-tokenizer,
        # unless the folder names code of its own. With trust_remote_code off, it then takes tokenizer_class; with
        # trust_remote_code on, it looks for that code and fails, which is better than another tokenizer.
        settings["auto_map"] = {"AutoTokenizer": [None, GENERIC]}
    template = "chat_template.jinja"
    if chat:
        settings.pop("chat_template", None)
        (folder / template).write_text(CHAT_TEMPLATE, encoding="utf-8")
    elif (base / template).is_file():
        shutil.copyfile(base / template, folder / template)
    text = json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    config = folder / "config.json"  # the class that is loaded depends on the model's type too
    if (base / config.name).is_file():
        shutil.copyfile(base / config.name, config)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    finally:
        config.unlink(missing_ok=True)
