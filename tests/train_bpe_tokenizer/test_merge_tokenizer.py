"""merge_tokenizer.py: ids, against SentencePiece and the base tokenizer."""

import hashlib
import io
import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.errors import UserError
from towerspeech.tokenizer import CHAT_TEMPLATE, CHAT_TOKENS, SPECIAL_TOKENS, read_metadata
from train_bpe_tokenizer.merge_tokenizer import SENTENCES, check_same, merge_tokenizer

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)
UNIT_LINES = st.lists(st.integers(0, 49), max_size=60).map(dsu.to_text)
# A text that begins with a space, and special tokens spelt out, are the known differences.
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="aehn \t\n.üß中▁=", max_size=40),
    st.sampled_from(SENTENCES),
).filter(
    lambda text: (
        not text.startswith((" ", "▁"))
        and not any(token in text for token in (*SPECIAL_TOKENS, *CHAT_TOKENS, "<unk>", "<s>", "</s>"))
    )
)


@pytest.fixture(scope="module")
def fast(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)


@pytest.fixture(scope="module")
def slow(tokenizer_dir):
    return SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))


@pytest.fixture(scope="module")
def base(base_model_dir):
    return SentencePieceProcessor(model_file=str(base_model_dir / "tokenizer.model"))


@pytest.fixture(scope="module")
def unit_bpe(units_bpe_dir):
    return SentencePieceProcessor(model_file=str(units_bpe_dir / "units_bpe.model"))


def encode(fast, text):
    return fast(text, add_special_tokens=False)["input_ids"]


def test_layout(tokenizer_dir, fast, slow):
    """Specials, units in order, merges in the order in which they were learned, ChatML tokens: SpireLM's layout."""
    facts = json.loads((tokenizer_dir / "speech_units.json").read_text())
    vocabulary = fast.get_vocab()
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [400, 401, 402, 403, 404]
    assert [vocabulary[unit] for unit in dsu.to_text(range(50))] == list(range(405, 455))
    assert [vocabulary["<|im_end|>"], vocabulary["<|im_start|>"]] == [485, 486]
    assert (len(fast), slow.get_piece_size(), facts["vocab_size"]) == (487, 487, 487)
    assert (facts["num_units"], facts["offset"], facts["first_unit_id"], facts["merges"]) == (50, 0xF0000, 405, 30)
    assert facts["special_tokens"] == {t: vocabulary[t] for t in (*SPECIAL_TOKENS, *CHAT_TOKENS)}
    assert read_metadata(tokenizer_dir) == facts
    assert (facts["base_vocab_size"], facts["byte_pieces"]) == (400, 0)


def test_metadata_name_what_it_was_made_of(tokenizer_dir, base_model_dir, units_bpe_dir):
    facts = json.loads((tokenizer_dir / "speech_units.json").read_text())
    for name, path in (("base", base_model_dir / "tokenizer.model"), ("units_bpe", units_bpe_dir / "units_bpe.model")):
        assert facts[f"{name}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    corpora = json.loads((units_bpe_dir / "units_bpe.json").read_text())["corpora_sha256"]
    assert facts["corpora_sha256"] == corpora and len(corpora) == 1


def test_special_tokens(tokenizer_dir, fast, slow):
    assert (fast.bos_token, fast.eos_token, fast.pad_token, fast.pad_token_id) == ("<s>", "</s>", "<PAD>", 403)
    assert set(fast.all_special_ids) == {0, 1, 2, *range(400, 405), 485, 486}
    assert all(slow.is_control(index) for index in [*range(400, 405), 485, 486])
    assert not any(slow.is_control(index) for index in range(405, 485))
    text = f"<|im_start|>{dsu.to_text([3])}<|im_end|><EOD>"
    assert fast(text)["input_ids"] == [1, 486, 408, 485, 401]
    assert fast.decode([1, 486, 408, 485, 401], skip_special_tokens=True) == dsu.to_text([3])
    # No space after a special token, for those who read tokenizer.json by itself, too
    raw = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    for tokens in (fast.tokenize("a<|im_end|>a a"), raw.encode("a<|im_end|>a a", add_special_tokens=False).tokens):
        assert tokens == ["▁a", "<|im_end|>", "a", "▁a"]


def test_word_start_and_newline(fast):
    """The traps of FACTS: a lone word-start piece after `Speech: `, none after `Speech:`; a newline is a byte."""
    start, newline = fast.convert_tokens_to_ids("▁"), fast.convert_tokens_to_ids("<0x0A>")
    unit = dsu.to_text([7])
    assert encode(fast, f"Speech: {unit}")[-2:] == [start, 412]
    assert encode(fast, f"Speech:{unit}")[-2:] == [*encode(fast, "Speech:")[-1:], 412] and start != 412
    assert encode(fast, f"{unit}\n{unit}")[-3:] == [412, newline, 412]
    assert fast("x")["input_ids"] == [1, *encode(fast, "x")]


@FUZZ
@given(text=TEXTS)
def test_text_is_tokenized_as_by_the_base(fast, slow, base, text):
    wanted = base.encode(text)
    assert slow.encode(text) == wanted
    assert encode(fast, text) == wanted


@FUZZ
@given(line=UNIT_LINES)
def test_units_are_tokenized_as_by_the_unit_bpe(fast, slow, unit_bpe, line):
    ids = slow.encode(line)
    assert encode(fast, line) == ids
    assert [slow.id_to_piece(index) for index in ids[1:]] == unit_bpe.encode(line, out_type=str)
    assert fast.decode(ids) == slow.decode(ids) == line


@FUZZ
@given(parts=st.lists(st.one_of(TEXTS, UNIT_LINES), max_size=6))
def test_mixtures(fast, slow, parts):
    text = "x" + "".join(parts)
    ids = slow.encode(text)
    assert encode(fast, text) == ids
    assert fast.decode(ids) == slow.decode(ids) == text.replace("▁", " ")  # SentencePiece's way of writing a space
    pieces = [slow.id_to_piece(index) for index in ids]
    assert not any(len({ord(char) >= dsu.OFFSET for char in piece}) > 1 for piece in pieces)  # no piece over a border


def test_leading_space_is_as_in_the_base(fast, base_model_dir):
    """Hugging Face puts no second space before a leading one, SentencePiece does: the base's own difference."""
    own = AutoTokenizer.from_pretrained(base_model_dir, local_files_only=True)
    for text in (" a", " the dog", "▁a"):
        assert encode(fast, text) == encode(own, text)


def test_chat_template_marks_the_assistant(fast):
    messages = [
        {"role": "user", "content": prompts.asr(dsu.to_text([1, 2]))},
        {"role": "assistant", "content": "the dog"},
    ]
    text = fast.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>assistant\nthe dog<|im_end|>\n")
    got = fast.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    taught = [index for index, mask in zip(got["input_ids"], got["assistant_masks"], strict=True) if mask]
    assert taught[-1] == 485 and fast.decode(taught) == "the dog<|im_end|>"
    asked = fast.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert text.startswith(asked) and asked.endswith("<|im_start|>assistant\n")


def test_proto_keeps_the_base(tokenizer_dir, base_model_dir):
    merged, base = (sentencepiece_model_pb2.ModelProto() for _ in range(2))
    merged.ParseFromString((tokenizer_dir / "tokenizer.model").read_bytes())
    base.ParseFromString((base_model_dir / "tokenizer.model").read_bytes())
    assert list(merged.pieces[:400]) == list(base.pieces)
    assert merged.normalizer_spec == base.normalizer_spec
    scores = [piece.score for piece in merged.pieces[405:485]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 80
    assert scores[0] < min(piece.score for piece in base.pieces)
    assert {piece.score for piece in [*merged.pieces[400:405], *merged.pieces[485:]]} == {0}


def test_scores_stay_apart_after_a_piece_of_very_low_score(tmp_path, base_model_dir, units_bpe_dir):
    """Llama-2's runs of spaces are scored -1e9, where float32 has steps of 64; each unit or merge needs its own."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((base_model_dir / "tokenizer.model").read_bytes())
    for length in range(2, 17):
        if "▁" * length not in {piece.piece for piece in proto.pieces}:
            proto.pieces.add(piece="▁" * length, score=-1e9, type=1)
    size = len(proto.pieces)
    assert size > 410
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer.model").write_bytes(proto.SerializeToString())
    merge_tokenizer(tmp_path / "base", units_bpe_dir, tmp_path / "merged")
    fast = AutoTokenizer.from_pretrained(tmp_path / "merged", local_files_only=True)
    base = SentencePieceProcessor(model_file=str(tmp_path / "base/tokenizer.model"))
    for length in range(2, 50):  # of one score SentencePiece takes the leftmost
        assert encode(fast, f"x{' ' * length}the dog") == base.encode(f"x{' ' * length}the dog")
    proto.ParseFromString((tmp_path / "merged/tokenizer.model").read_bytes())
    scores = [piece.score for piece in proto.pieces[size + 5 : size + 85]]
    assert [piece.piece for piece in proto.pieces[size + 5 : size + 55]] == [chr(0xF0000 + unit) for unit in range(50)]
    assert [struct.unpack("f", struct.pack("f", score))[0] for score in scores] == scores  # as the file has them
    assert all(before > after for before, after in zip(scores, scores[1:], strict=False))
    assert -1e9 < scores[0] < min(piece.score for piece in proto.pieces[:400])


def test_same_bytes_and_done_again(tmp_path, tokenizer_dir, base_model_dir, units_bpe_dir, capsys):
    merge_tokenizer(base_model_dir, units_bpe_dir, tmp_path / "again")
    for path in tokenizer_dir.iterdir():
        if path.name != "run_info.json" and path.is_file():
            same = (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
            assert same or path.name == ".folder.lock", path.name
    assert str(tmp_path) not in (tmp_path / "again/tokenizer_config.json").read_text()
    capsys.readouterr()
    merge_tokenizer(base_model_dir, units_bpe_dir, tmp_path / "again")
    assert "already done" in capsys.readouterr().out


def test_fewer_tokens_as_asked(tmp_path, base_model_dir, units_bpe_dir):
    base = tmp_path / "base"
    shutil.copytree(base_model_dir, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "</s>", "chat_template": "hello"}))
    for name, specials, chat in (("a", [], False), ("b", ["<EOD>", "<PAD>"], True), ("c", ["<EOD>"], True)):
        merge_tokenizer(base, units_bpe_dir, tmp_path / name, special_tokens=specials, chat=chat)
        fast = AutoTokenizer.from_pretrained(tmp_path / name, local_files_only=True)
        facts, first = read_metadata(tmp_path / name), 400 + len(specials)
        chat_ids = {"<|im_end|>": first + 80, "<|im_start|>": first + 81} if chat else {}
        assert facts["special_tokens"] == {token: 400 + i for i, token in enumerate(specials)} | chat_ids
        assert facts["first_unit_id"] == first and encode(fast, dsu.to_text([0]))[-1] == first
        assert len(fast) == facts["vocab_size"] == first + 80 + len(chat_ids)
        assert fast.pad_token == ("<PAD>" if "<PAD>" in specials else "</s>")
        assert fast.chat_template == (CHAT_TEMPLATE if chat else "hello")


@pytest.mark.parametrize(("pad", "kept"), [("[PAD]", None), ({"content": "[PAD]"}, None), ({"content": "<s>"}, "<s>")])
def test_padding_token_that_is_no_piece(tmp_path, base_model_dir, units_bpe_dir, pad, kept):
    """It would get an id beyond the pieces, where the model has no row."""
    base = tmp_path / "base"
    shutil.copytree(base_model_dir, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": pad}))
    merge_tokenizer(base, units_bpe_dir, tmp_path / "out", special_tokens=[])
    fast = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (fast.pad_token, len(fast)) == (kept, 482)


@pytest.mark.parametrize("tokens", [["<PAD>", "<EOD>"], ["<X>"], ["<EOD>", "<EOD>"]])
def test_special_tokens_that_are_not_ours(tmp_path, base_model_dir, units_bpe_dir, tokens):
    with pytest.raises(UserError, match="are not some of ours, in our order"):
        merge_tokenizer(base_model_dir, units_bpe_dir, tmp_path / "out", special_tokens=tokens)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mistral_v1(tmp_path, units_bpe_dir):
    """A real 32,000-piece tokenizer, whose runs of spaces are scored -1e9."""
    mistral_common = pytest.importorskip("mistral_common")
    model = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    (tmp_path / "base").mkdir()
    shutil.copyfile(model, tmp_path / "base/tokenizer.model")
    merge_tokenizer(tmp_path / "base", units_bpe_dir, tmp_path / "merged")
    fast = AutoTokenizer.from_pretrained(tmp_path / "merged", local_files_only=True)
    base = SentencePieceProcessor(model_file=str(model))
    for text in [*SENTENCES, "two  spaces", "x          y\n\n    z", "tab\t\tend  "]:
        assert encode(fast, text) == base.encode(text)
    assert encode(fast, f"hi{dsu.to_text([0, 49])}")[-2:] == [32005, 32054]
    assert len(fast) == 32000 + 5 + 50 + 30 + 2


# --- Bad input ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "got", "wanted", "told"),
    [
        ("x", "x\u00e9", "xe\u0301", r"on 'x', from character 1 on: '\xe9' and 'e\u0301'"),
        ("a" * 30 + "b", "a" * 30 + "c", "a" * 30 + "b", f"on '{'a' * 20 + 'b'}', from character 30 on: 'c' and 'b'"),
        ("\U000f0005x", "", "\U000f0005x", r"on '\U000f0005x', from character 0 on: '' and '\U000f0005x'"),
        ("the vocabulary", ["a", "b", "c"], ["a", "b", "d"], "on 'the vocabulary', from token 2 on: 'c' and 'd'"),
        ("the vocabulary", ["a", "b"], ["a"], "on 'the vocabulary', from token 1 on: 'b' and nothing"),
    ],
)
def test_differences_are_told(fast, text, got, wanted, told):
    """Of texts, and of tokens; what looks the same is told apart."""
    check_same(fast, ["same", text], ["same", wanted], ["same", wanted], "they")
    with pytest.raises(UserError) as error:
        check_same(fast, ["same", text], ["same", got], ["same", wanted], "they")
    assert f"they differ {told}" in str(error.value)


def test_ids_that_differ_are_told_with_their_tokens(fast):
    old, dog = fast.convert_tokens_to_ids(["▁old", "▁d"])
    ids = encode(fast, "the old dog")
    assert ids[1:3] == [old, dog]
    with pytest.raises(UserError) as error:
        check_same(fast, ["the old dog"], [ids], [[ids[0], dog, *ids[2:]]], "ids")
    o, d = f"'\\u2581old' ({old})", f"'\\u2581d' ({dog})"
    assert str(error.value).startswith(f"ids differ on 'the old dog', from token 1 on: {o} {d} 'o' (")
    assert f" and {d} {d} 'o' (" in str(error.value)
    text = "a quiet garden and the long river near the station"
    with pytest.raises(UserError, match="ids differ on 'ng river near the station', from token \\d+ on: 'at' "):
        check_same(fast, [text], [encode(fast, text)], [encode(fast, f"{text[:-4]}xion")], "ids")


def train_base(folder, **options):
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the old dog sees the red boat"] * 3),
        model_writer=model,
        vocab_size=290,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**defaults, "remove_extra_whitespaces": False, **options},
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"user_defined_symbols": ["human"]},  # which Hugging Face has no merges for: a proof that fails
            r"the base tokenizer differ on 'All human.*', from token 5 on: 'h' \(\d+\) .* and 'human' \(3\)",
        ),
        ({"model_type": "unigram"}, "is no BPE model"),
        ({"byte_fallback": False}, "has no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text"),
        ({"remove_extra_whitespaces": True}, "normalizes text"),
        ({"user_defined_symbols": ["<PAD>"]}, "already has '<PAD>'"),
    ],
)
def test_bases_that_cannot_be_extended(tmp_path, units_bpe_dir, options, message):
    base = train_base(tmp_path / "base", **options)
    with pytest.raises(UserError, match=message):
        merge_tokenizer(base, units_bpe_dir, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]


def test_bad_folders(tmp_path, base_model_dir, units_bpe_dir, tokenizer_dir):
    def refused(message, base=base_model_dir, units_bpe=units_bpe_dir):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        with pytest.raises(UserError, match=message):
            merge_tokenizer(base, units_bpe, tmp_path / "out")

    refused("no does not exist", base=tmp_path / "no")
    refused("no does not exist", units_bpe=tmp_path / "no")
    refused("already has", base=tokenizer_dir)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("holds no tokenizer.model and no tokenizer.json", base=empty)
    refused("units_bpe.json does not exist", units_bpe=empty)
    for content in ("version https://git-lfs.github.com/spec/v1\n", "IQ== 0\nIg== 1\n", ""):
        (empty / "tokenizer.model").write_text(content)
        refused("tokenizer.model is no SentencePiece model\n.*tokenizer.json beside it", base=empty)
    (empty / "tokenizer.json").write_text("{}")  # which goes before what is no SentencePiece model
    refused("tokenizer.json does not load", base=empty)

    added = tmp_path / "added"
    shutil.copytree(base_model_dir, added)
    saved = json.loads((added / "tokenizer.json").read_text())
    saved["added_tokens"].append({"id": 400, "content": "<|user|>"})
    (added / "tokenizer.json").write_text(json.dumps(saved))
    refused(r"adds '<\|user\|>' beyond tokenizer.model", base=added)

    other = tmp_path / "other"
    shutil.copytree(units_bpe_dir, other)
    facts = json.loads((other / "units_bpe.json").read_text())
    (other / "units_bpe.json").write_text(json.dumps({**facts, "num_units": 60}))
    refused("does not hold the 60 units", units_bpe=other)
