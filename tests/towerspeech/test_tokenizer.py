"""What a tokenizer folder says about units and special tokens: ours, SpireLM's and the original's layouts."""

import json
import random

import pytest
from transformers import AutoTokenizer

from towerspeech import units
from towerspeech.errors import UserError
from towerspeech.speech_prompts import speech_rows
from towerspeech.tokenizer import CHAT_TOKENS, SPECIAL_TOKENS, read_metadata, tokenizer_hash, unit_tokens


def test_a_word_start_with_units_is_no_unit_token(base_model_dir, tmp_path):
    """It decodes to units alone."""
    pieces = [*map(chr, range(990000, 990005)), chr(990003) + chr(990001), "▁" + chr(990003)]
    folder = save_foreign(tmp_path / "tokenizer", base_model_dir, pieces, True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode([406]) == chr(990003)
    singles = {400 + unit: [unit] for unit in range(5)}
    assert unit_tokens(tokenizer, 5, 990000) == {**singles, 405: [3, 1]}
    assert unit_tokens(tokenizer, 3, 990000) == {400: [0], 401: [1], 402: [2]}


def test_metadata_and_tokenizer_hash(tmp_path):
    with pytest.raises(UserError, match=r"speech_units\.json is missing.*\n.*merge_tokenizer\.py"):
        read_metadata(tmp_path)
    (tmp_path / "speech_units.json").write_text(json.dumps({"num_units": 5}))
    assert read_metadata(tmp_path) == {"num_units": 5}
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        tokenizer_hash(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
    assert tokenizer_hash(tmp_path / "a") == tokenizer_hash(tmp_path / "b")


# --- Folders of others ----------------------------------------------------------------------------
def save_foreign(folder, base_model_dir, new_pieces, as_json: bool):
    """A SentencePiece tokenizer with new pieces, as tokenizer.model alone or with Hugging Face's files."""
    from train_bpe_tokenizer.merge_tokenizer import extend_proto, read_proto, save_fast

    folder.mkdir()
    proto = extend_proto(read_proto(base_model_dir / "tokenizer.model"), new_pieces)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    if as_json:
        save_fast(proto, folder, None, None)
    else:
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def spire_pieces():
    return [*SPECIAL_TOKENS, *units.to_text(range(50)), *CHAT_TOKENS], {
        "num_units": 50,
        "offset": 0xF0000,
        "merges": 0,
        "special_tokens": dict(zip(SPECIAL_TOKENS, range(400, 405), strict=True))
        | {"<|im_end|>": 455, "<|im_start|>": 456},
        "base_vocab_size": 400,
        "vocab_size": 457,
    }


def original_pieces():
    """A <pad> among the pieces, merges before and between the units, ids in no order."""
    merges = [units.to_text(merge, 990000) for merge in ([3, 24], [3, 24, 21], [49, 0], [7, 2])]
    pieces = [*merges, *units.to_text(range(50), 990000)]
    random.Random(0).shuffle(pieces)
    return ["<pad>", *pieces], {
        "num_units": 50,
        "offset": 990000,
        "merges": 4,
        "special_tokens": {},
        "base_vocab_size": 400,
        "vocab_size": 455,
    }


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("layout", [spire_pieces, original_pieces])
def test_layouts_of_others(tmp_path, base_model_dir, make_units, layout, as_json):
    """Prompts, made and encoded as generate_ASR.py does, have SentencePiece's ids."""
    from sentencepiece import SentencePieceProcessor

    from towerspeech import decoding

    pieces, wanted = layout()
    folder = save_foreign(tmp_path / "tokenizer", base_model_dir, pieces, as_json)
    dsu = read_metadata(folder)
    assert dsu == wanted

    corpus = make_units(tmp_path / "units", [{"units": [3, 24, 21, 0, 49, 7]}, {"units": list(range(50))}])
    rows = speech_rows(corpus, "test", "original", dsu["offset"], dsu["num_units"])
    tokenizer, ids = decoding.encode(folder, {"asr/test.jsonl": rows}, 512, dsu["vocab_size"])
    reference = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    texts = [row["instruction"] for row in rows]
    assert ids["asr/test.jsonl"] == [[1, *line] for line in reference.encode(texts)]
    known = {token: units.from_text(text, 50, dsu["offset"]) for token, text in unit_texts(reference, dsu)}
    assert unit_tokens(tokenizer, 50, dsu["offset"]) == known and len(known) == 50 + dsu["merges"]
    spoken = [unit for line in ids["asr/test.jsonl"] for token in line for unit in known.get(token, [])]
    assert spoken == [3, 24, 21, 0, 49, 7, *range(50)]


def unit_texts(reference, dsu):
    pieces = [reference.id_to_piece(index) for index in range(dsu["vocab_size"])]
    return [(index, piece) for index, piece in enumerate(pieces) if ord(piece[0]) >= dsu["offset"]]


@pytest.mark.parametrize(
    ("chars", "found"),
    [
        ([0xF0000, 0xF0001, 0xF0003], "3 characters of plane 15 from 983040 to 983043"),
        ([0xF0001, 0xF0002], "2 characters of plane 15 from 983041 to 983042"),
        ([989999, 990000], "2 characters of plane 15 from 989999 to 990000"),
    ],
)
def test_layouts_of_nobody(tmp_path, base_model_dir, chars, found):
    folder = save_foreign(tmp_path / "tokenizer", base_model_dir, [chr(char) for char in chars], True)
    with pytest.raises(UserError, match=found):
        read_metadata(folder)
    assert read_metadata(folder, required=False)["num_units"] == 0


def test_tokenizers_without_units(tmp_path, base_model_dir):
    with pytest.raises(UserError, match="this tokenizer knows no speech units"):
        read_metadata(base_model_dir)
    assert read_metadata(base_model_dir, required=False) == {"num_units": 0, "offset": units.OFFSET}
    assert read_metadata(tmp_path, required=False) == {"num_units": 0, "offset": units.OFFSET}
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="is no SentencePiece model"):
        read_metadata(tmp_path, required=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="'model' is missing"):
        read_metadata(tmp_path)
