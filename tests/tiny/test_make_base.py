"""make_base: the tokenizer equals SentencePiece's own, and the folder loads as any Llama's."""

import json

import pytest
import sentencepiece

from tiny import grammar, make_base
from towerspeech import prompts
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.records import read_jsonl


@pytest.fixture(scope="module")
def mono(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "mono.jsonl"
    draw = grammar.sentences(["en", "de"], seed=0)
    rows = [{"id": f"{i}", "language": c, "text": t} for i in range(400) for c, t in next(draw).items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(mono, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base.make_base(mono, folder, vocab_size=500, hidden_size=64, num_layers=1, intermediate_size=96)
    return folder


LINES = [
    "der große hund",
    "two  spaces ",  # a leading space would differ: only SentencePiece puts its own before it
    "Übersetzung 2023: 東京 😀\tend",
    prompts.mt_0_shot("de", "en", "der mann kauft einen apfel"),
    prompts.mt_few_shot("en", "de", "the dog", [("the cat", "die katze")]),
    prompts.asr("x"),
    "",
    "\n",
]


@pytest.mark.parametrize("line", LINES)
def test_ids_are_bos_and_sentencepieces_own(base, line):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    ids = reference.encode(line)
    assert tokenizer(line).input_ids == [1, *ids]
    assert tokenizer(line, add_special_tokens=False).input_ids == ids
    assert tokenizer.decode(ids) == reference.decode(ids)


def test_all_of_the_text_and_the_prompts_are_bos_and_sentencepieces_own(base, mono):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    lines = [row["text"] for row in read_jsonl(mono)] + make_base.prompt_lines(["de", "en"])
    assert tokenizer(lines).input_ids == [[1, *ids] for ids in reference.encode(lines)]


def test_specials_are_llamas(base):
    from transformers import AutoTokenizer

    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    assert (reference.unk_id(), reference.bos_id(), reference.eos_id(), reference.pad_id()) == (0, 1, 2, -1)
    assert reference.id_to_piece(3) == "<0x00>" and reference.get_piece_size() == 500
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (1, 2, None)


def test_prompts_are_not_spelled_in_bytes(base):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    pieces = reference.encode(prompts.mt_0_shot("de", "en", "der hund"), out_type=str)
    assert {piece for piece in pieces if piece.startswith("<0x")} == {"<0x0A>"}
    assert "▁English" in pieces and "▁German" in pieces


def test_model_loads_and_is_padded(base):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.get_input_embeddings().weight.shape == (512, 64)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.dtype == torch.float32
    assert model(torch.tensor([[1, 300, 2]])).logits.shape == (1, 3, 512)


def test_same_bytes_and_done_again(base, mono, tmp_path, capsys):
    arguments = {"vocab_size": 500, "hidden_size": 64, "num_layers": 1, "intermediate_size": 96}
    make_base.make_base(mono, tmp_path, **arguments)
    for name in ("tokenizer.model", "tokenizer.json", "model.safetensors", "config.json"):
        assert hash_file(tmp_path / name) == hash_file(base / name)
    make_base.make_base(mono, tmp_path, **arguments)
    assert "already done" in capsys.readouterr().out


def test_bad_input(mono, tmp_path):
    with pytest.raises(UserError, match="SentencePiece makes no 5000 pieces"):
        make_base.make_base(mono, tmp_path / "a", vocab_size=5000)
    with pytest.raises(UserError, match="head_dim"):
        make_base.make_base(mono, tmp_path / "b", hidden_size=100)
    (tmp_path / "bad.jsonl").write_text('{"language": "en", "text": "a"}\n{"language": "en"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:2: field 'text' is missing"):
        make_base.make_base(tmp_path / "bad.jsonl", tmp_path / "c")
    assert not (tmp_path / "a" / "tokenizer.model").exists()


def test_a_seed_decides_the_weights(base, mono, tmp_path):
    from safetensors.torch import load_file

    arguments = {"vocab_size": 500, "hidden_size": 64, "num_layers": 1, "intermediate_size": 96}
    make_base.make_base(mono, tmp_path, **arguments, seed=1)
    assert hash_file(tmp_path / "tokenizer.model") == hash_file(base / "tokenizer.model")
    one, other = (load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (base, tmp_path))
    assert one.shape == other.shape and not (one == other).all(dim=1).any()


def test_the_config_is_what_was_asked_for(mono, tmp_path):
    settings = {"hidden_size": 96, "num_layers": 3, "intermediate_size": 160, "head_dim": 32}
    make_base.make_base(mono, tmp_path, vocab_size=512, max_position_embeddings=333, **settings)
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {
        "vocab_size": 512,  # a multiple of 64 already
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "intermediate_size": 160,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "max_position_embeddings": 333,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {name: config[name] for name in wanted} == wanted
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 333


def test_numbers_are_spelled_in_digits():
    model = make_base.train_tokenizer(["in 2023 and 2024 it was 2023 again"] * 50, 290)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert reference.encode("2023", out_type=str) == ["▁", "2", "0", "2", "3"]
