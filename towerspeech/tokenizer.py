"""What a tokenizer folder says about units, special tokens and chat."""

from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import check_exists, hash_file, read_json
from towerspeech.units import MAX_NUM_UNITS, OFFSET, OFFSETS

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


def read_metadata(tokenizer_dir: Path, required: bool = True) -> dict:
    """Read what a tokenizer folder knows about units: num_units, offset, merges, special tokens, sizes.

    Folders of merge_tokenizer.py have it in speech_units.json, with more. Of others it is found in the vocabulary:
    SpireLM's (units from U+F0000 on) and the original TowerSpeech's (from 990000 on, with BPE pieces over them, in any
    order).

    Raises:
        UserError: The tokenizer knows no units; if they are not ``required``, it has num_units 0.
    """
    path = Path(tokenizer_dir) / "speech_units.json"
    remedy = "make one with train_bpe_tokenizer/merge_tokenizer.py"
    if path.is_file():
        return read_json(path, remedy)
    ids = vocabulary(Path(tokenizer_dir)) or {}
    plane, problem = range(OFFSET, OFFSET + MAX_NUM_UNITS), ""
    pieces = {token: index for token, index in ids.items() if token and all(ord(char) in plane for char in token)}
    chars = sorted(ord(token) for token in pieces if len(token) == 1)
    if not chars:
        problem = "knows no speech units"
    elif chars[0] not in OFFSETS or chars[-1] - chars[0] + 1 != len(chars):
        problem = (
            f"has {len(chars)} characters of plane 15 from {chars[0]} to {chars[-1]}, but units follow one another "
            f"from {' or '.join(map(str, OFFSETS))} on"
        )
    if problem and required:
        raise UserError(f"{path} is missing: this tokenizer {problem}", remedy)
    if problem:
        return {"num_units": 0, "offset": OFFSET}
    # The new tokens begin with the special ones right below the units; the original had a <pad> among its own.
    special_tokens = {token: ids[token] for token in (*SPECIAL_TOKENS, *CHAT_TOKENS) if token in ids}
    base = min(pieces.values())
    while base - 1 in {*special_tokens.values(), ids.get("<pad>")}:
        base -= 1
    return {
        "num_units": len(chars),
        "offset": chars[0],
        "merges": len(pieces) - len(chars),
        "special_tokens": special_tokens,
        "base_vocab_size": base,
        "vocab_size": max(ids.values()) + 1,
    }


def vocabulary(folder: Path) -> dict[str, int] | None:
    """All tokens of a folder's tokenizer.json, else tokenizer.model, with their ids; None if it has neither."""
    if (folder / "tokenizer.json").is_file():
        saved = read_json(folder / "tokenizer.json", "copy it anew", ["model"])
        known = saved["model"]["vocab"]
        if not isinstance(known, dict):  # a unigram's list of pieces and scores
            known = {piece: index for index, (piece, _) in enumerate(known)}
        return {**known, **{token["content"]: token["id"] for token in saved.get("added_tokens", [])}}
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{folder}/tokenizer.model is no SentencePiece model: {error}", "copy it anew") from None
        return {model.id_to_piece(index): index for index in range(model.get_piece_size())}
    return None


def unit_tokens(tokenizer, num_units: int, offset: int = OFFSET) -> dict[int, list[int]]:
    """The ids of a Hugging Face tokenizer's units and merges, in order, each with the units that it stands for.

    A piece of a word start and units, as the original TowerSpeech's BPE may have learned it, is none of them, though
    it decodes to units alone.
    """
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    alphabet = range(offset, offset + num_units)
    return {
        index: [ord(char) - offset for char in text]
        for index, (text, name) in enumerate(zip(texts, names, strict=True))
        if text and all(ord(char) in alphabet for char in text) and not name.startswith("▁")
    }


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of a folder's tokenizer.json: token files and models that were made for each other have the same."""
    path = Path(folder) / "tokenizer.json"
    check_exists(path, f"{folder} must be a Hugging Face folder with a fast tokenizer")
    return hash_file(path)


def stop_token_ids(tokenizer) -> list[int]:
    """Ids that end a generation: the tokenizer's own EOS, and <EOD> and <|im_end|> where it has them."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in (EOD, IM_END) if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
