"""A unit BPE trained and units encoded as others do, for bench_tokenizer.py to compare with."""

import time
from pathlib import Path

from towerspeech.tokenizer import EOD, read_metadata
from train_bpe_tokenizer.merging import UNIT_BPE


def with_sentencepiece(source: Path, vocab_size: int, output_dir: Path) -> None:
    """A plain call on a file of private-use text, an utterance a line; the options are train_bpe.py's."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(output_dir / "model"),
        vocab_size=1 + vocab_size,
        max_sentence_length=1_000_000,
        minloglevel=2,
        **UNIT_BPE,
    )


def with_tokenizers(source: Path, vocab_size: int, output_dir: Path) -> None:
    """The tokenizers library's trainer on the same file.

    No pre-tokenizer: a line is one word. An iterator, since files come with their newlines.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    with open(source, encoding="utf-8") as file:
        trainer = BpeTrainer(vocab_size=vocab_size, max_token_length=16, show_progress=False)
        tokenizer.train_from_iterator((line.removesuffix("\n") for line in file), trainer)
    tokenizer.save(str(output_dir / "tokenizer.json"))


def line_by_line(source: Path, tokenizer: Path, target: Path) -> float:
    """Write a units folder's speech documents to a file, each encoded by one call of the fast tokenizer, then <EOD>.

    Returns:
        The seconds of the calls, without reading and writing.
    """
    import numpy as np
    from transformers import AutoTokenizer

    from towerspeech import prompts, units
    from towerspeech.indexed import token_dtype
    from towerspeech.units_parquet import read_units

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    facts = read_metadata(tokenizer)
    eod_id, seconds = loaded.convert_tokens_to_ids(EOD), 0.0
    with open(target, "wb") as file:
        for row in read_units(source):
            document = prompts.speech_document(units.to_text(row["units"], facts["offset"]), row["text"])
            began = time.perf_counter()
            ids = loaded(document, add_special_tokens=False)["input_ids"]
            seconds += time.perf_counter() - began
            np.array([*ids, eod_id], token_dtype(len(loaded))).tofile(file)
    return seconds
