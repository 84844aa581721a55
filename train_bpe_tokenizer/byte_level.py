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
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from towerspeech import units as dsu
from towerspeech.errors import UserError
from towerspeech.files import read_json
from towerspeech.model_folder import copy_files
from towerspeech.tokenizer import CHAT_TEMPLATE, PAD
from train_bpe_tokenizer.merging import AS_PUBLISHED, Merged, UnitBpe, bpe_merges

KNOWN = "use a byte-level BPE such as Llama-3's, Qwen's or SmolLM2's, or a SentencePiece BPE with its tokenizer.model"
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


def write(text: str) -> str:
    """A text as a byte-level vocabulary has it: one character a byte of its UTF-8."""
    from tokenizers.pre_tokenizers import ByteLevel

    return "".join([part for part, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)])


# --- Reading --------------------------------------------------------------------------------------
def load_base(base: Path):
    """A base's tokenizer as its tokenizer.json describes it, and whether transformers itself would build another one.

    It does so for some classes (GPT2Tokenizer, Qwen2Tokenizer), of which it takes vocabulary and merges alone.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        usual = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        own = PreTrainedTokenizerFast.from_pretrained(base, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise UserError(
            f"{base}/tokenizer.json does not load: {str(error).splitlines()[0]}", "copy it anew, with its settings"
        ) from None
    return own, type(usual) is not PreTrainedTokenizerFast


def _steps(step: dict | None) -> Iterator[dict]:
    """The steps of a pre-tokenizer or decoder, sequences opened."""
    if step and step["type"] == "Sequence":
        for part in step.get("pretokenizers", step.get("decoders")):
            yield from _steps(part)
    elif step:
        yield step


def check_base(base: Path, saved: dict, vocabulary: dict[str, int], wanted: Sequence[str]) -> None:
    """Raise UserError if units cannot be added to the base, or if it has them, or one of ``wanted``, already."""
    from tokenizers.decoders import ByteLevel

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
    units = dsu.to_text(range(64))  # all bytes that units are made of are in these
    for byte, char in zip(units.encode("utf-8"), write(units), strict=True):
        if char not in vocabulary:
            raise UserError(f"{path} has no token for byte 0x{byte:02X}, of which units are made", KNOWN)
    gaps = sorted(set(range(len(vocabulary))).difference(vocabulary.values()))
    if gaps:
        raise UserError(f"{path} has no token with id {gaps[0]}, but higher ones", "fill the gap with an added token")
    byte_level = ByteLevel()  # reads a token that is none of its own as plain text
    added = [
        token
        for token in vocabulary
        if token in wanted or any(ord(char) >= dsu.OFFSET for char in byte_level.decode([token]))
    ]
    if added:
        raise UserError(f"{base} already has {added[0]!r}", AS_PUBLISHED)


# --- Building -------------------------------------------------------------------------------------
def extend(
    saved: dict, vocabulary: dict[str, int], units_bpe: UnitBpe, specials: Sequence[str], chat_tokens: Sequence[str]
) -> tuple[dict, int]:
    """Add tokens to a base's tokenizer.json; ``save`` makes the special ones special.

    Ids follow the base's: specials, units, merges, the ChatML tokens that it lacks, pieces of units' bytes.

    Returns:
        The new tokenizer.json, and the number of pieces of units' bytes.
    """
    model, units = saved["model"], [write(unit) for unit in dsu.to_text(range(units_bpe.num_units))]
    builds = dict.fromkeys((unit[:cut], unit[cut]) for cut in (1, 2, 3) for unit in units)  # a set with an order
    pieces = [left + right for left, right in builds if len(left) < 3 and left + right not in vocabulary]
    lacking = [token for token in chat_tokens if token not in vocabulary]
    new = [*specials, *units, *map(write, units_bpe.merges), *lacking, *pieces]
    # An added token keeps its id on loading only if the model's own vocabulary has it (Llama-3's has not).
    everything = {**vocabulary, **{token: len(vocabulary) + index for index, token in enumerate(new)}}
    last = [(write(left), write(right)) for left, right in bpe_merges(units_bpe.proto)]
    kept = [merge for merge in model["merges"] if tuple(merge) not in builds]  # of a pair's two ranks the later counts
    extended = {
        **saved,
        "truncation": None,
        "padding": None,
        "pre_tokenizer": split_units_first(saved["pre_tokenizer"], units_bpe.num_units),
        "model": {**model, "vocab": everything, "merges": [*builds, *kept, *last]},
    }
    return extended, len(pieces)


def split_units_first(own: dict, num_units: int) -> dict:
    """A pre-tokenizer that splits runs of units off, and leaves the rest to the base's own."""
    run = {"Regex": f"[{dsu.to_text([0])}-{dsu.to_text([num_units - 1])}]+"}
    split = {"type": "Split", "pattern": run, "behavior": "Isolated", "invert": False}
    then = own["pretokenizers"] if own["type"] == "Sequence" else [own]
    return {"type": "Sequence", "pretokenizers": [split, *then]}


def settings_of(base: Path, own, specials: Sequence[str], chat_tokens: Sequence[str]) -> dict:
    """The new tokenizer_config.json: the base's, with the special tokens that were added."""
    path = base / "tokenizer_config.json"
    saved = read_json(path, "copy it anew") if path.is_file() else {}
    settings = {name: value for name, value in saved.items() if name not in DROPPED}
    if chat_tokens:
        settings.pop("chat_template", None)  # ours is a file
    named = {name: str(token) for name, token in own.special_tokens_map.items() if isinstance(token, str)}
    if PAD in specials:
        named["pad_token"] = PAD
    special = dict.fromkeys(map(str, (*own.extra_special_tokens, *specials, *chat_tokens)))  # each once, in order
    further = [token for token in special if token not in named.values()]
    return {**settings, **named, "additional_special_tokens": further, "tokenizer_class": GENERIC}


def load_beside(base: Path, folder: Path):
    """Load the new tokenizer as beside the base's model: the class depends on the type of the model too."""
    from transformers import AutoTokenizer

    copy_files(base, folder, ["config.json"])
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    finally:
        (folder / "config.json").unlink(missing_ok=True)


def save(
    folder: Path, base: Path, extended: dict, settings: dict, specials: Sequence[str], chat_tokens: Sequence[str]
) -> None:
    """Write tokenizer.json, in which the special tokens become such, settings, and the base's own template or ours."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(extended))
    known = {token["content"] for token in extended["added_tokens"]}
    added = [token for token in (*specials, *chat_tokens) if token not in known]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if chat_tokens:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    else:
        copy_files(base, folder, ["chat_template.jinja"])


def merge_byte_level(
    base: Path, folder: Path, units_bpe: UnitBpe, specials: Sequence[str], chat_tokens: Sequence[str]
) -> Merged:
    """Extend a base with a tokenizer.json alone; to be compared with the base on text, the unit BPE on units."""
    own, rebuilt = load_base(base)
    saved, vocabulary = json.loads(own.backend_tokenizer.to_str()), own.get_vocab()
    check_base(base, saved, vocabulary, specials)
    extended, byte_pieces = extend(saved, vocabulary, units_bpe, specials, chat_tokens)
    settings = settings_of(base, own, specials, chat_tokens)
    if rebuilt:
        # For Qwen2 transformers 5 takes its own class whatever tokenizer_class says, which drops our pre-tokenizer,
        # unless the folder names code of its own. With trust_remote_code off, it then takes tokenizer_class; with
        # trust_remote_code on, it looks for that code and fails, which is better than another tokenizer.
        settings["auto_map"] = {"AutoTokenizer": [None, GENERIC]}
    save(folder, base, extended, settings, specials, chat_tokens)
    first, (lowest, highest) = len(vocabulary) + len(specials), dsu.to_text([0, units_bpe.num_units - 1])
    runs = re.compile(f"([{lowest}-{highest}]+)")

    def base_encode(texts: list[str]) -> list[list[int]]:
        return own(texts, add_special_tokens=False)["input_ids"]

    def encode(texts: list[str]) -> list[list[int]]:
        """The base's ids of the text around runs of units, the unit BPE's of the runs."""
        split = [runs.split(text) for text in texts]
        parts = {part for line in split for part in line}
        spoken = [part for part in parts if runs.fullmatch(part)]
        written = [part for part in parts if not runs.fullmatch(part)]
        ids = dict(zip(written, base_encode(written), strict=True))
        for part, numbers in zip(spoken, units_bpe.encode(spoken), strict=True):
            ids[part] = [first + number for number in numbers]
        return [[index for part in line for index in ids[part]] for line in split]

    bare, whole = base_encode(["x"])[0], own("x")["input_ids"]
    at = whole.index(bare[0])
    tokens, fast = extended["model"]["vocab"], load_beside(base, folder)
    return Merged(
        fast=fast,
        tokens=sorted(tokens, key=tokens.get),
        base_tokens=sorted(vocabulary, key=vocabulary.get),
        surfaces=own.batch_decode([[index] for index in range(len(vocabulary))]),
        base_encode=base_encode,
        encode=encode,
        decoders=(fast.batch_decode,),
        start=whole[:at],
        end=whole[at + len(bare) :],
        byte_pieces=byte_pieces,
    )
