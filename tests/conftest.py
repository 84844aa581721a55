"""Fixtures that several folders' tests share: a tiny base model, the same with units, data from outside the repo."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="SIGKILLs of a generation, at random moments (seeded)")


ROOT = Path(__file__).resolve().parents[1]
NUM_UNITS = 50  # of model_dir
NUM_MERGES = 30
BASE_VOCAB_SIZE = 400  # pieces of base_model_dir's tokenizer


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """Made-up English and German sentences."""
    english = (
        ("the old captain", "my sister", "a small dog", "the tall teacher", "our neighbour", "every child"),
        ("sees", "buys", "paints", "carries", "finds", "likes"),
        ("the red boat", "two green apples", "a quiet garden", "the long river", "an open window", "seven books"),
        ("today", "in the morning", "near the station", "after the rain", "with great care", "again"),
    )
    german = (
        (
            "der alte Kapitän",
            "meine Schwester",
            "ein kleiner Hund",
            "die große Lehrerin",
            "unser Nachbar",
            "jedes Kind",
        ),
        ("sieht", "kauft", "malt", "trägt", "findet", "mag"),
        (
            "das rote Boot",
            "zwei grüne Äpfel",
            "einen stillen Garten",
            "den langen Fluss",
            "ein Fenster",
            "sieben Bücher",
        ),
        ("heute", "am Morgen", "beim Bahnhof", "nach dem Regen", "mit großer Sorgfalt", "schon wieder"),
    )
    generator = random.Random(seed)
    return [
        " ".join(generator.choice(slot) for slot in generator.choice((english, german))) + "." for _ in range(count)
    ]


def make_utterances(count: int, num_units: int = NUM_UNITS, seed: int = 0) -> list[list[int]]:
    """Unit sequences without repeats, in which some units often follow one another, so that BPE finds merges."""
    generator = random.Random(seed)
    utterances = []
    for _ in range(count):
        units = [generator.randrange(num_units)]
        for _ in range(generator.randint(5, 60)):
            follows = (units[-1] * 7 + 3) % num_units
            unit = follows if generator.random() < 0.6 else generator.randrange(num_units)
            if unit != units[-1]:
                units.append(unit)
        utterances.append(units)
    return utterances


@pytest.fixture(scope="session")
def make_units() -> Callable[..., Path]:
    """A function (folder, rows or number of utterances, num_shards) that writes a units Parquet folder.

    Rows may give any of the columns; the others are filled in.
    """
    from towerspeech.units_parquet import shard_name, write_units

    def make(folder: Path, rows: list[dict] | int = 40, num_shards: int = 1, num_units: int = NUM_UNITS) -> Path:
        if isinstance(rows, int):
            texts = make_sentences(rows, seed=1)
            utterances = make_utterances(rows, num_units)
            rows = [{"units": u, "text": t} for u, t in zip(utterances, texts, strict=True)]
        folder.mkdir(parents=True, exist_ok=True)
        filled = [
            {
                "id": f"utt{index:04d}",
                "audio": f"utt{index:04d}.wav",
                "language": "en",
                "duration_s": len(row["units"]) / 35,
                "text": "a sentence.",
                **row,
            }
            for index, row in enumerate(rows)
        ]
        for shard in range(num_shards):
            write_units(folder / f"{shard_name(shard, num_shards)}.parquet", filled[shard::num_shards])
        return folder

    return make


def save_base_tokenizer(folder: Path) -> None:
    """Train a SentencePiece BPE with byte fallback, as Llama-2's, and save it with its Hugging Face files."""
    import io

    from sentencepiece import SentencePieceTrainer
    from transformers import LlamaTokenizer

    from towerspeech import prompts
    from towerspeech.languages import LANGUAGES

    sentences = make_sentences(400)
    texts = sentences + [prompts.mt_0_shot("en", "de", text) for text in sentences[:40]]
    texts += [
        prompts.parallel_document("de", a, "en", b) for a, b in zip(sentences[:40], sentences[40:80], strict=True)
    ]
    texts += [f"Speech: English: {language.name}" for language in LANGUAGES.values()]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.split("\n")]),
        model_writer=model,
        model_type="bpe",
        vocab_size=BASE_VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False).save_pretrained(folder)


def save_base_model(
    folder: Path, tied: bool = True, dtype: str = "float32", max_shard_size: str = "1GB", context: int = 512
) -> None:
    """Save a random two-layer Llama with the base tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    save_base_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BASE_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's CPU attention takes no smaller one
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # so that greedy outputs differ from prompt to prompt
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)


@pytest.fixture(scope="session")
def base_model_dir(tmp_path_factory) -> Path:
    """A random two-layer Llama (hidden 64, tied, float32) with a 400-piece SentencePiece tokenizer: one folder."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save_base_model(folder)
    return folder


@pytest.fixture(scope="session")
def units_bpe_dir(tmp_path_factory, make_units) -> Path:
    """A BPE of 50 units and 30 merges, by train_bpe.py."""
    from train_bpe_tokenizer.train_bpe import train_bpe

    folder = tmp_path_factory.mktemp("units_bpe")
    corpus = make_units(folder / "units", 300)
    train_bpe([corpus], NUM_UNITS, folder / "bpe", vocab_size=NUM_UNITS + NUM_MERGES)
    return folder / "bpe"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, base_model_dir, units_bpe_dir) -> Path:
    """base_model_dir's tokenizer with 50 units and 30 merges, by merge_tokenizer.py."""
    from train_bpe_tokenizer.merge_tokenizer import merge_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "merged"
    merge_tokenizer(base_model_dir, units_bpe_dir, folder)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, base_model_dir, tokenizer_dir) -> Path:
    """base_model_dir extended for tokenizer_dir, by extend_model.py: model, tokenizer, speech_units.json."""
    from train_bpe_tokenizer.extend_model import extend_model

    folder = tmp_path_factory.mktemp("extended") / "model"
    extend_model(base_model_dir, tokenizer_dir, folder)
    return folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of test data from outside the repo, named by TOWERSPEECH_TEST_DATA."""
    name = os.environ.get("TOWERSPEECH_TEST_DATA")
    if not name:
        pytest.skip("TOWERSPEECH_TEST_DATA is not set: no FLORES, WMT23 and original outputs to compare with")
    if not Path(name).is_dir():
        pytest.fail(f"TOWERSPEECH_TEST_DATA={name} is no folder")
    return Path(name)


def checkout(folder: Path) -> Path:
    """A git checkout of the code as it is here."""
    from sbatch.frozen import code_files

    for path in code_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    (folder / "sbatch/site.env").unlink(missing_ok=True)
    if (ROOT / ".venv").is_dir():
        (folder / ".venv").symlink_to(ROOT / ".venv")
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return folder


@pytest.fixture(scope="session")
def dry_runs(tmp_path_factory) -> dict[str, dict[str, list[str]]]:
    """System -> stage -> what submit_pipeline.sh prints for it: its sbatch command, then what its job runs.

    In a copy: here a user may have run some of it, which a dry run would call done.
    """
    root = checkout(tmp_path_factory.mktemp("dry_runs") / "checkout")

    def dry_run(path: Path) -> dict[str, list[str]]:
        command = ["bash", root / "sbatch/submit_pipeline.sh", path, "--dry_run"]
        told = subprocess.run(command, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        parts = [list(filter(None, part.splitlines())) for part in told.stdout.split("# ")[1:]]
        return {name: lines for name, *lines in parts}

    paths = sorted(root.glob("systems/*.yaml"))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([path.stem for path in paths], pool.map(dry_run, paths), strict=True))
