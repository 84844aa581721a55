"""Train a unit BPE and encode units as others do, for bench_tokenizer.py to compare with.

Usage: python benchmarks/other_tokenizers.py --way sentencepiece --source corpus.txt --output_dir out
       python benchmarks/other_tokenizers.py --way lines --source units/ --tokenizer tokenizer/ --output_dir out

  sentencepiece  a plain SentencePieceTrainer call on a file of private-use text, an utterance a line
  tokenizers     the tokenizers library's BPE trainer on the same file
  lines          speech documents of a units folder, each encoded by one call of the fast tokenizer; <EOD> follows

Writes model.model, tokenizer.json, or tokens.bin and seconds.json: how long the calls alone took.
"""

import time
from pathlib import Path
from typing import Literal

from towerspeech.command import run
from towerspeech.files import check_exists, write_json
from towerspeech.tokenizer import EOD, read_metadata
from train_bpe_tokenizer.merging import UNIT_BPE

VOCAB_SIZE = 8000


def with_sentencepiece(source: Path, output_dir: Path) -> None:
    """SentencePiece reads the file itself; the options are train_bpe.py's."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(output_dir / "model"),
        vocab_size=1 + VOCAB_SIZE,
        max_sentence_length=1_000_000,
        **UNIT_BPE,
    )


def with_tokenizers(source: Path, output_dir: Path) -> None:
    """No pre-tokenizer: a line is one word. An iterator, since files come with their newlines."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    with open(source, encoding="utf-8") as file:
        trainer = BpeTrainer(vocab_size=VOCAB_SIZE, max_token_length=16, show_progress=False)
        tokenizer.train_from_iterator((line.removesuffix("\n") for line in file), trainer)
    tokenizer.save(str(output_dir / "tokenizer.json"))


def line_by_line(source: Path, tokenizer: Path, output_dir: Path) -> None:
    """Reading and writing are not in the seconds."""
    import numpy as np
    from transformers import AutoTokenizer

    from towerspeech import prompts, units
    from towerspeech.indexed import token_dtype
    from towerspeech.units_parquet import read_units

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    facts = read_metadata(tokenizer)
    eod_id, seconds = loaded.convert_tokens_to_ids(EOD), 0.0
    with open(output_dir / "tokens.bin", "wb") as file:
        for row in read_units(source):
            document = prompts.speech_document(units.to_text(row["units"], facts["offset"]), row["text"])
            began = time.perf_counter()
            ids = loaded(document, add_special_tokens=False)["input_ids"]
            seconds += time.perf_counter() - began
            np.array([*ids, eod_id], token_dtype(len(loaded))).tofile(file)
    write_json(output_dir / "seconds.json", {"seconds": seconds})


def other_tokenizer(
    way: Literal["sentencepiece", "tokenizers", "lines"],
    source: Path,
    output_dir: Path,
    tokenizer: Path | None = None,
) -> None:
    """Do one thing in one way.

    Args:
        way: How.
        source: Text file, or for ``lines`` a units folder.
        output_dir: Scratch folder.
        tokenizer: Folder of a tokenizer with units, for ``lines``.
    """
    check_exists(source, "check --source")
    output_dir.mkdir(parents=True, exist_ok=True)
    if way == "sentencepiece":
        with_sentencepiece(source, output_dir)
    elif way == "tokenizers":
        with_tokenizers(source, output_dir)
    else:
        line_by_line(source, tokenizer, output_dir)


if __name__ == "__main__":
    run(other_tokenizer)
