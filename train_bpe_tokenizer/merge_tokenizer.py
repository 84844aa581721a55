"""Add speech units, their BPE merges and special tokens to a base tokenizer.

Usage: python train_bpe_tokenizer/merge_tokenizer.py --base Llama-2-7b/ --units_bpe units_bpe/ --output_dir tokenizer/

Reads the base's tokenizer.model (SentencePiece BPE with byte fallback: Llama-2, Tower, TinyLlama, Mistral v1), or, if
it has none or tiktoken's, its tokenizer.json (byte-level BPE: Llama-3, Qwen, SmolLM2; see byte_level.py); and the
folder that train_bpe.py wrote. Writes a Hugging Face folder (tokenizer.model where the base has one, tokenizer.json,
tokenizer_config.json, chat_template.jinja) and speech_units.json. New ids follow the base's, in SpireLM's order: <CLS>
<EOD> <MASK> <PAD> <SEP>, the units 0..N-1, their merges, <|im_end|> <|im_start|>. Nothing is written before the result
has been compared with the base tokenizer and with the unit BPE.

One difference between SentencePiece and Hugging Face is theirs, in the base as well: before a text that begins with a
space SentencePiece puts a second one, LlamaTokenizer does not. And special tokens spelt out in a text are special
tokens to Hugging Face, plain characters to SentencePiece.
"""

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import check_exists, hash_file, read_json
from towerspeech.stage import stage
from towerspeech.tokenizer import CHAT_TEMPLATE, CHAT_TOKENS, PAD, SPECIAL_TOKENS, vocabulary
from train_bpe_tokenizer.byte_level import merge_byte_level
from train_bpe_tokenizer.merging import AS_PUBLISHED, Merged, UnitBpe, bpe_merges, read_proto, read_units_bpe

METADATA = "speech_units.json"
# Article 1 of the Universal Declaration of Human Rights, its first sentence in the ten languages.
SENTENCES = (
    "All human beings are born free and equal in dignity and rights.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "人人生而自由，在尊严和权利上一律平等。",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
)


# --- Reading --------------------------------------------------------------------------------------
def base_files(base: Path) -> list[Path]:
    """The files of a base folder that are read, the one with the vocabulary first.

    Raises:
        UserError: It holds neither a SentencePiece tokenizer.model nor a tokenizer.json.
    """
    check_exists(base, "name a folder that holds a tokenizer.model or a tokenizer.json")
    model, saved = base / "tokenizer.model", base / "tokenizer.json"
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    try:
        if model.is_file():
            read_proto(model)
            return [model, *(base / name for name in names if (base / name).is_file())]
    except UserError:
        if not saved.is_file():
            raise
        print(f"note: {model} is no SentencePiece model; {saved.name} is read", flush=True)
    if not saved.is_file():
        raise UserError(
            f"{base} holds no tokenizer.model and no tokenizer.json", "name the folder of a model with its tokenizer"
        )
    names += ["config.json", "special_tokens_map.json", "added_tokens.json"]  # transformers asks these too
    return [base / name for name in names if (base / name).is_file()]


# --- A SentencePiece base -------------------------------------------------------------------------
def check_sentencepiece(base: Path, proto, wanted: Sequence[str]) -> None:
    """Raise UserError if units cannot be added to a SentencePiece base, or if somebody has added them already."""
    path = base / "tokenizer.model"
    known = "use a Llama-2-like tokenizer: SentencePiece BPE, byte fallback, identity normalization"
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError(f"{path} is no BPE model", known)
    if not proto.trainer_spec.byte_fallback:
        raise UserError(f"{path} has no byte fallback", known)
    if proto.normalizer_spec.precompiled_charsmap or proto.normalizer_spec.remove_extra_whitespaces:
        raise UserError(f"{path} normalizes text, which LlamaTokenizer does not do", known)
    pieces = [piece.piece for piece in proto.pieces]
    added = [piece for piece in pieces if piece in wanted or any(ord(char) >= dsu.OFFSET for char in piece)]
    if added:
        raise UserError(f"{base} already has {added[0]!r}", AS_PUBLISHED)
    beyond = [token for token, index in vocabulary(base).items() if index >= len(pieces)]
    if beyond:
        raise UserError(
            f"{base}/tokenizer.json adds {beyond[0]!r} beyond tokenizer.model, where the units would go",
            "start from the base model as published, before it was tuned",
        )


def extend_proto(proto, new_pieces: Sequence[str]):
    """Append pieces to a copy of the base's proto: specials as control pieces, units and merges as normal ones.

    Scores go on below the base's last: slow and fast tokenizers agree only if ids and scores have the same order.
    """
    merged = type(proto)()
    merged.CopyFrom(proto)
    # Llama-2 has runs of spaces at -1e9, where a float32 cannot count down by one.
    score = min(piece.score for piece in proto.pieces if piece.score > -(2**23))
    specials = {*SPECIAL_TOKENS, *CHAT_TOKENS}
    for number, text in enumerate(new_pieces, 1):
        piece = merged.pieces.add(piece=text)
        special = text in specials
        piece.score, piece.type = (0, piece.CONTROL) if special else (score - number, piece.NORMAL)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return merged


def own_settings(base: Path) -> tuple[str | None, str | None]:
    """The padding token and the chat template of a base's Hugging Face files, if it has them."""
    settings, template = base / "tokenizer_config.json", base / "chat_template.jinja"
    saved = read_json(settings, "copy it anew") if settings.is_file() else {}
    pad = saved.get("pad_token")
    own = template.read_text(encoding="utf-8-sig") if template.is_file() else saved.get("chat_template")
    return pad["content"] if isinstance(pad, dict) else pad, own


def save_fast(proto, folder: Path, pad: str | None, chat_template: str | None):
    """Write the Hugging Face files of a SentencePiece BPE; returns the tokenizer as loaded from them."""
    from transformers import AddedToken, AutoTokenizer, LlamaTokenizer

    spec = proto.trainer_spec
    controls = [piece.piece for piece in proto.pieces if piece.type == piece.CONTROL]
    named = {"unk_token": spec.unk_piece, "bos_token": spec.bos_piece, "eos_token": spec.eos_piece}
    if pad in {piece.piece for piece in proto.pieces}:
        named["pad_token"] = pad
    fast = LlamaTokenizer(
        vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
        merges=bpe_merges(proto),
        **named,
        extra_special_tokens=[
            AddedToken(token, normalized=False, special=True) for token in controls if token not in named.values()
        ],
        add_prefix_space=proto.normalizer_spec.add_dummy_prefix,
        add_bos_token=True,  # the Llama family was pretrained with it, and transformers 5 no longer adds it by itself
        legacy=False,  # no stray space after a special token
        chat_template=chat_template,
    )
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def merge_sentencepiece(
    base: Path, folder: Path, units_bpe: UnitBpe, specials: Sequence[str], chat_tokens: Sequence[str]
) -> Merged:
    """Extend a base with a tokenizer.model; ``prove`` compares Hugging Face's form with SentencePiece's."""
    from sentencepiece import SentencePieceProcessor

    base_proto = read_proto(base / "tokenizer.model")
    check_sentencepiece(base, base_proto, [*specials, *chat_tokens])
    proto = extend_proto(
        base_proto, [*specials, *dsu.to_text(range(units_bpe.num_units)), *units_bpe.merges, *chat_tokens]
    )
    pad, template = own_settings(base)
    fast = save_fast(proto, folder, PAD if PAD in specials else pad, CHAT_TEMPLATE if chat_tokens else template)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    own = SentencePieceProcessor(model_proto=base_proto.SerializeToString())
    slow = SentencePieceProcessor(model_proto=proto.SerializeToString())
    return Merged(
        fast=fast,
        tokens=[piece.piece for piece in proto.pieces],
        base_tokens=[piece.piece for piece in base_proto.pieces],
        surfaces=[own.decode([index]) for index in range(own.get_piece_size())],
        base_encode=own.encode,
        encode=slow.encode,
        decoders=(fast.batch_decode, slow.decode),
        start=[fast.bos_token_id],
        end=[],
    )


# --- The proof ------------------------------------------------------------------------------------
def probe_texts(surfaces: Sequence[str], units_bpe: UnitBpe) -> tuple[list[str], list[str], list[str]]:
    """Texts to compare tokenizers on: plain text (``surfaces`` in it), unit lines, mixtures of both."""
    plain = [
        *SENTENCES,
        *(prompts.mt_0_shot("en", "de", sentence) for sentence in SENTENCES),
        *(f"x{surface}\n{surface}" for surface in surfaces if surface),
        "two  spaces,   three,\ttabs\t\tand\n\nlines ",
    ]
    generator = random.Random(0)
    units = dsu.to_text(range(units_bpe.num_units))
    lines = [units]
    for pieces in (units, [*units, *units_bpe.merges]):  # random units alone would hold few merges
        lines += ["".join(generator.choices(pieces, k=generator.randint(1, 200))) for _ in range(200)]
    mixed = []
    for index, line in enumerate(lines):
        sentence = SENTENCES[index % len(SENTENCES)]
        mixed += [prompts.speech_document(line, sentence), prompts.asr(line), f"{sentence}{line}{sentence} {line}\n"]
        mixed.append(f"{sentence}  {line}'s {line}\n\n{line}!")  # where pre-tokenizers look beyond a border
    return plain, [*lines, *units_bpe.merges], mixed


def check_same(fast, texts: Sequence[str], got: Sequence, wanted: Sequence, what: str) -> None:
    """Raise UserError if one of the texts has something else in ``got`` than in ``wanted``; tells where, and what.

    Both hold a list of ids of ``fast``, a list of tokens, or a text for each of the texts.
    """

    def name(item: int | str) -> str:  # ascii tells apart what looks the same
        return ascii(item) if isinstance(item, str) else f"{ascii(fast.convert_ids_to_tokens(item))} ({item})"

    for text, one, other in zip(texts, got, wanted, strict=True):
        if one == other:
            continue
        shorter = min(len(one), len(other))
        at = next((at for at in range(shorter) if one[at] != other[at]), shorter)
        if isinstance(one, str):
            place, counted = at, "character"
        elif all(isinstance(item, int) for item in [*one, *other]):
            place, counted = len(fast.decode(one[:at])), "token"
        else:  # all tokens of a vocabulary: the text is no more than a name
            place, counted = 0, "token"
        parts = [items[at : at + 8] for items in (one, other)]
        told = [ascii(part) if isinstance(part, str) else " ".join(map(name, part)) for part in parts]
        raise UserError(
            f"{what} differ on {ascii(text[max(place - 20, 0) : place + 20])}, from {counted} {at} on: "
            f"{told[0] or 'nothing'} and {told[1] or 'nothing'}",
            "this base tokenizer cannot be extended by this script; please report it with the base's name",
        )


def prove(merged: Merged, units_bpe: UnitBpe, first_unit: int) -> int:
    """Compare the merged tokenizer with the base, with the unit BPE, and with a second way of encoding mixtures.

    Returns:
        The number of texts.

    Raises:
        UserError: They differ; see ``check_same``.
    """
    fast, tokens = merged.fast, merged.tokens
    same = functools.partial(check_same, fast)
    before = len(merged.base_tokens)
    same(["the vocabulary"], [tokens[:before]], [merged.base_tokens], "merged and base tokens")
    same(["the vocabulary"], [fast.convert_ids_to_tokens(range(len(fast)))], [tokens], "Hugging Face and merged ids")

    plain, lines, mixed = probe_texts(merged.surfaces, units_bpe)
    encoded = [(texts, fast(texts, add_special_tokens=False)["input_ids"]) for texts in (plain, lines, mixed)]
    same(*encoded[0], merged.base_encode(plain), "ids of the merged and the base tokenizer")
    for texts, ids in encoded:
        same(texts, ids, merged.encode(texts), "ids of the merged tokenizer, encoded in two ways,")
        whole = [[*merged.start, *text_ids, *merged.end] for text_ids in ids]
        same(texts, fast(texts)["input_ids"], whole, "ids with and without the base's BOS and EOS")
    for texts, ids in encoded[1:]:  # plain text may come back in another form: Qwen's is normalized
        for decode in merged.decoders:
            same(texts, decode(ids), texts, "decoded and encoded text")

    # A unit that begins a text would have SentencePiece's word-start piece before it, so not after it either.
    start = merged.base_encode(["x"])[0]
    lines += dsu.to_text(range(units_bpe.num_units))
    ids = [[*start, *(first_unit + number for number in numbers)] for numbers in units_bpe.encode(lines)]
    same(lines, fast([f"x{line}" for line in lines], add_special_tokens=False)["input_ids"], ids, "unit tokens")
    return len(plain) + len(lines) + len(mixed)


# --- The stage ------------------------------------------------------------------------------------
def merge_tokenizer(
    base: Path,
    units_bpe: Path,
    output_dir: Path,
    special_tokens: list[str] | None = None,
    chat: bool = True,
    overwrite: bool = False,
) -> None:
    """Merge a unit BPE into a base tokenizer.

    Args:
        base: Folder with the base's tokenizer.model or tokenizer.json; a model beside it is not read.
        units_bpe: Folder written by train_bpe.py.
        output_dir: New folder.
        special_tokens: Some of <CLS> <EOD> <MASK> <PAD> <SEP>, in that order, or '[]'; default: all. Without <PAD>
            the base's own padding token stays, if it has one.
        chat: Add the ChatML tokens that the base lacks, and TowerSpeech's chat template.
        overwrite: Replace the output of a run with other arguments.
    """
    specials = list(SPECIAL_TOKENS if special_tokens is None else special_tokens)
    if specials != [token for token in SPECIAL_TOKENS if token in specials]:
        raise UserError(
            f"--special_tokens {' '.join(specials)} are not some of ours, in our order",
            f"choose from {' '.join(SPECIAL_TOKENS)}, or give '[]' for none",
        )
    chat_tokens = CHAT_TOKENS if chat else ()
    files = base_files(base)
    arguments = {"base": files, "units_bpe": units_bpe, "special_tokens": specials, "chat": chat}
    with stage(__file__, output_dir, {**arguments, "overwrite": overwrite}, inputs=["base", "units_bpe"]) as work:
        if work.done:
            return
        if (base / METADATA).is_file():
            raise UserError(f"{base} already has speech units", AS_PUBLISHED)
        units = read_units_bpe(units_bpe)
        merge = merge_sentencepiece if files[0].name == "tokenizer.model" else merge_byte_level
        with work.publish() as folder:
            merged = merge(base, folder, units, specials, chat_tokens)
            base_size = len(merged.base_tokens)
            texts = prove(merged, units, base_size + len(specials))
            named = [*specials, *chat_tokens]
            metadata = {
                "num_units": units.num_units,
                "offset": dsu.OFFSET,
                "first_unit_id": base_size + len(specials),
                "merges": len(units.merges),
                "special_tokens": {token: merged.tokens.index(token) for token in named},
                "byte_pieces": merged.byte_pieces,
                "base_vocab_size": base_size,
                "vocab_size": len(merged.tokens),
                "base_sha256": hash_file(files[0]),
                "corpora_sha256": units.corpora_sha256,
                "units_bpe_sha256": hash_file(units_bpe / "units_bpe.model"),
            }
            (folder / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        counts = ("num_units", "merges", "byte_pieces", "vocab_size")
        work.counts.update({**{name: metadata[name] for name in counts}, "texts_compared": texts})
        added = [token for token in named if token not in merged.base_tokens]
        print(
            f"{base_size:,} base tokens + {len(added)} special tokens + {units.num_units:,} units + "
            f"{len(units.merges):,} merges + {merged.byte_pieces} pieces of units' bytes = {len(merged.tokens):,}; "
            f"compared on {texts:,} texts: {output_dir}"
        )


if __name__ == "__main__":
    run(merge_tokenizer)
