"""Add speech units, their BPE merges and special tokens to a base tokenizer.

Usage: python train_bpe_tokenizer/merge_tokenizer.py --base Llama-2-7b/ --units_bpe units_bpe/ --output_dir tokenizer/

Reads the base's tokenizer.model (SentencePiece BPE with byte fallback: Llama-2, Tower, TinyLlama, Mistral v1) and the
folder that train_bpe.py wrote. Writes a Hugging Face folder (tokenizer.model, tokenizer.json, tokenizer_config.json,
chat_template.jinja) and speech_units.json. New ids follow the base's, in SpireLM's order: <CLS> <EOD> <MASK> <PAD>
<SEP>, the units 0..N-1, their merges, <|im_end|> <|im_start|>. Nothing is written before the result has been compared
with the base tokenizer, and its two forms (SentencePiece's and Hugging Face's) with each other.

One difference between the two forms is Hugging Face's own, in the base as well: before a text that begins with a
space SentencePiece puts a second one, LlamaTokenizer does not. And special tokens spelt out in a text are special
tokens to Hugging Face, plain characters to SentencePiece.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.stage import UserError, check_exists, hash_file, run, stage

NORMAL, CONTROL = 1, 3  # SentencePiece's types of pieces
BPE = 2  # SentencePiece's type of model
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
def read_proto(path: Path):
    """Read a SentencePiece model file as a protocol buffer."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path} is no SentencePiece model", "check the file; it may be a Git LFS pointer") from None
    return proto


def base_model_file(base: Path) -> Path:
    """The tokenizer.model of a base folder.

    Raises:
        UserError: There is none, as in the folders of byte-level tokenizers (Llama-3, Qwen, SmolLM2).
    """
    check_exists(base, "name a folder that holds a tokenizer.model")
    path = base / "tokenizer.model"
    if not path.is_file():
        byte_level = (base / "tokenizer.json").is_file()
        raise UserError(
            f"{base} holds no tokenizer.model"
            + (": its tokenizer.json alone, a byte-level BPE perhaps, cannot be extended" if byte_level else ""),
            "name the folder of a model with a SentencePiece BPE, such as Llama-2, Tower, TinyLlama or Mistral v1",
        )
    return path


def check_base(base: Path, proto) -> None:
    """Raise UserError if this script cannot extend the base, or if somebody has extended it already."""
    path = base_model_file(base)
    known = "use a Llama-2-like tokenizer: SentencePiece BPE, byte fallback, identity normalization"
    if proto.trainer_spec.model_type != BPE:
        raise UserError(f"{path} is no BPE model", known)
    if not proto.trainer_spec.byte_fallback:
        raise UserError(f"{path} has no byte fallback", known)
    if proto.normalizer_spec.precompiled_charsmap or proto.normalizer_spec.remove_extra_whitespaces:
        raise UserError(f"{path} normalizes text, which LlamaTokenizer does not do", known)
    pieces = [piece.piece for piece in proto.pieces]
    wanted = {*prompts.SPECIAL_TOKENS, *prompts.CHAT_TOKENS}
    added = [piece for piece in pieces if piece in wanted or any(ord(char) >= dsu.OFFSET for char in piece)]
    if (base / METADATA).is_file() or added:
        raise UserError(
            f"{base} already has " + (f"{added[0]!r}" if added else "speech units"), "start from the base as published"
        )
    if (base / "tokenizer.json").is_file():
        try:
            saved = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{base}/tokenizer.json: not JSON ({error})", "copy it anew") from None
        beyond = [token["content"] for token in saved.get("added_tokens", []) if token["id"] >= len(pieces)]
        if beyond:
            raise UserError(
                f"{base}/tokenizer.json adds {beyond[0]!r} beyond tokenizer.model, where the units would go",
                "start from the base model as published, before it was tuned",
            )


def read_units_bpe(folder: Path) -> tuple[dict, list[str]]:
    """Read the unit BPE: units_bpe.json, and the merges in order, as private-use text.

    Raises:
        UserError: The folder is not finished, or its model does not hold exactly the units that it claims.
    """
    remedy = "run train_bpe_tokenizer/train_bpe.py"
    path = folder / "units_bpe.json"
    check_exists(folder, remedy)
    check_exists(path, remedy)
    check_exists(folder / "units_bpe.model", remedy)
    facts = json.loads(path.read_text(encoding="utf-8"))
    num_units = facts["num_units"]
    proto = read_proto(folder / "units_bpe.model")
    pieces = [piece.piece for piece in proto.pieces if piece.type == NORMAL]
    alphabet = set(dsu.to_text(range(num_units)))
    if {piece for piece in pieces if len(piece) == 1} != alphabet or not alphabet.issuperset("".join(pieces)):
        raise UserError(f"{folder}/units_bpe.model does not hold the {num_units} units of units_bpe.json", remedy)
    return facts, [piece for piece in pieces if len(piece) > 1]


# --- Building -------------------------------------------------------------------------------------
def extend_proto(proto, new_pieces: Sequence[str]):
    """Append pieces to a copy of the base's proto: specials as control pieces, units and merges as normal ones.

    Scores go on below the base's last: slow and fast tokenizers agree only if ids and scores have the same order.
    """
    merged = type(proto)()
    merged.CopyFrom(proto)
    # Llama-2 has runs of spaces at -1e9, where a float32 cannot count down by one.
    score = min(piece.score for piece in proto.pieces if piece.score > -(2**23))
    specials = {*prompts.SPECIAL_TOKENS, *prompts.CHAT_TOKENS}
    for number, piece in enumerate(new_pieces, 1):
        kind = CONTROL if piece in specials else NORMAL
        merged.pieces.add(piece=piece, score=0 if kind == CONTROL else score - number, type=kind)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    return merged


def bpe_merges(proto) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE for the tokenizers library, best first.

    SentencePiece joins whatever two neighbours make the best-scored piece, so each split of a piece is a merge.
    transformers takes ids for scores, which is wrong for Llama-2's runs of spaces. Among merges of one score
    SentencePiece takes the leftmost, as a longer left part does.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((-score, -cut, piece[:cut], piece[cut:]))
    merges.sort(key=lambda merge: merge[:2])  # stable: the base's order breaks ties
    return [(left, right) for _, _, left, right in merges]


def save_fast(proto, folder: Path):
    """Write the Hugging Face files of a SentencePiece BPE; returns the tokenizer as loaded from them."""
    from transformers import AddedToken, AutoTokenizer, LlamaTokenizer

    spec = proto.trainer_spec
    controls = [piece.piece for piece in proto.pieces if piece.type == CONTROL]
    named = {"unk_token": spec.unk_piece, "bos_token": spec.bos_piece, "eos_token": spec.eos_piece}
    fast = LlamaTokenizer(
        vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
        merges=bpe_merges(proto),
        **named,
        pad_token=prompts.PAD,
        extra_special_tokens=[
            AddedToken(token, normalized=False, special=True)
            for token in controls
            if token not in {*named.values(), prompts.PAD}
        ],
        add_prefix_space=proto.normalizer_spec.add_dummy_prefix,
        add_bos_token=True,  # the Llama family was pretrained with it, and transformers 5 no longer adds it by itself
        legacy=False,  # no stray space after a special token
        chat_template=prompts.CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


# --- The proof ------------------------------------------------------------------------------------
def probe_texts(base, num_units: int, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Texts to compare tokenizers on: plain text (with every base piece in it), unit lines, mixtures of both."""
    surfaces = [base.decode([index]) for index in range(base.get_piece_size())]
    plain = [
        *SENTENCES,
        *(prompts.mt_0_shot("en", "de", sentence) for sentence in SENTENCES),
        *(f"x{surface}\n{surface}" for surface in surfaces if surface),
        "two  spaces,   three,\ttabs\t\tand\n\nlines ",
    ]
    generator = random.Random(seed)
    lines = [dsu.to_text(range(num_units))] + [
        dsu.to_text(generator.choices(range(num_units), k=generator.randint(1, 200))) for _ in range(200)
    ]
    mixed = []
    for index, line in enumerate(lines):
        sentence = SENTENCES[index % len(SENTENCES)]
        mixed += [prompts.speech_document(line, sentence), prompts.asr(line), f"{sentence}{line}{sentence} {line}\n"]
    return plain, lines, mixed


def _same(texts: Sequence[str], got, wanted, what: str) -> None:
    for text, ids, expected in zip(texts, got, wanted, strict=True):
        if list(ids) != list(expected):
            raise UserError(
                f"{what} differ on {text[:80]!r}: {list(ids)[:20]} and {list(expected)[:20]}",
                "this base tokenizer cannot be extended by this script; please report it with the base's name",
            )


def prove(base_proto, merged_proto, fast, num_units: int, first_unit: int) -> int:
    """Compare the merged tokenizer with the base, and its two forms with each other; returns the number of texts.

    Raises:
        UserError: They differ; names the text.
    """
    from sentencepiece import SentencePieceProcessor

    base = SentencePieceProcessor(model_proto=base_proto.SerializeToString())
    slow = SentencePieceProcessor(model_proto=merged_proto.SerializeToString())
    vocabulary = fast.get_vocab()
    pieces = [piece.piece for piece in merged_proto.pieces]
    before = [piece.piece for piece in base_proto.pieces]
    _same(["the vocabulary"], [pieces[: len(before)]], [before], "base and merged pieces")
    _same(["the vocabulary"], [sorted(vocabulary, key=vocabulary.get)], [pieces], "Hugging Face and SentencePiece ids")

    plain, lines, mixed = probe_texts(base, num_units)
    _same(plain, slow.encode(plain), base.encode(plain), "merged and base tokenizer")
    for texts in (plain, lines, mixed):
        ids = fast(texts, add_special_tokens=False)["input_ids"]
        _same(texts, ids, slow.encode(texts), "Hugging Face and SentencePiece ids")
        wanted = [[fast.bos_token_id, *text_ids] for text_ids in ids]
        _same(texts, fast(texts)["input_ids"], wanted, "ids with and without BOS")
    for texts in (lines, mixed):
        ids = slow.encode(texts)
        _same(texts, fast.batch_decode(ids), texts, "decoded and encoded text")
        _same(texts, slow.decode(ids), texts, "decoded and encoded text")

    start = slow.encode("x")  # a unit at the beginning of a text would have the word-start piece before it
    after = [f"x{dsu.to_text([unit])}" for unit in range(num_units)]
    _same(after, slow.encode(after), [[*start, first_unit + unit] for unit in range(num_units)], "a unit's ids")
    return len(plain) + len(lines) + len(mixed)


# --- The stage ------------------------------------------------------------------------------------
def merge_tokenizer(base: Path, units_bpe: Path, output_dir: Path, overwrite: bool = False) -> None:
    """Merge a unit BPE into a base tokenizer.

    Args:
        base: Folder with the base's tokenizer.model; a model beside it is not read.
        units_bpe: Folder written by train_bpe.py.
        output_dir: New folder.
        overwrite: Replace the output of a run with other arguments.
    """
    model_file = base_model_file(base)
    arguments = {"base": model_file, "units_bpe": units_bpe, "overwrite": overwrite}
    with stage(output_dir, arguments, inputs=["base", "units_bpe"]) as job:
        if job.done:
            return
        base_proto = read_proto(model_file)
        check_base(base, base_proto)
        facts, merges = read_units_bpe(units_bpe)
        num_units = facts["num_units"]
        specials = (*prompts.SPECIAL_TOKENS, *prompts.CHAT_TOKENS)
        new = [*prompts.SPECIAL_TOKENS, *dsu.to_text(range(num_units)), *merges, *prompts.CHAT_TOKENS]
        merged = extend_proto(base_proto, new)
        first_unit = len(base_proto.pieces) + len(prompts.SPECIAL_TOKENS)
        ids = {piece.piece: index for index, piece in enumerate(merged.pieces)}

        with job.publish() as folder:
            fast = save_fast(merged, folder)
            texts = prove(base_proto, merged, fast, num_units, first_unit)
            (folder / "tokenizer.model").write_bytes(merged.SerializeToString(deterministic=True))
            metadata = {
                "num_units": num_units,
                "offset": dsu.OFFSET,
                "first_unit_id": first_unit,
                "merges": len(merges),
                "special_tokens": {token: ids[token] for token in specials},
                "base_vocab_size": len(base_proto.pieces),
                "vocab_size": len(merged.pieces),
                "base_sha256": hash_file(model_file),
                "corpora_sha256": facts["corpora_sha256"],
                "units_bpe_sha256": hash_file(units_bpe / "units_bpe.model"),
            }
            (folder / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        job.counts.update({**{k: metadata[k] for k in ("num_units", "merges", "vocab_size")}, "texts_compared": texts})
        print(
            f"{len(base_proto.pieces):,} base pieces + {len(specials)} special tokens + {num_units:,} units + "
            f"{len(merges):,} merges = {len(merged.pieces):,}; compared on {texts:,} texts: {output_dir}"
        )


if __name__ == "__main__":
    run(merge_tokenizer)
