"""Make the pocket base: a Llama-2-like BPE tokenizer trained on text, and a small Llama with random weights.

Usage: python tiny/make_base.py --mono runs/tiny/data/mono.jsonl --output_dir runs/tiny/base_init

Reads: mono.jsonl of make_data.py ({"id", "language", "text"}).
Writes, in output_dir: tokenizer.model and the Hugging Face tokenizer files; config.json and model.safetensors (fp32),
which AutoTokenizer and AutoModelForCausalLM load. It is the place where the real pipeline has Tower-7B or Llama-2;
continued_pretraining/train.py trains it on text.
"""

import io
import itertools
from pathlib import Path

from towerspeech import prompts
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.languages import language
from towerspeech.records import read_jsonl
from towerspeech.stage import stage

VOCAB_MULTIPLE = 64  # rows of the embedding are padded to a multiple of this, as in Llama-2's training
PROMPT_SHARE = 10  # one prompt line for so many lines of text, so that prompts are not spelled in bytes


def prompt_lines(codes: list[str]) -> list[str]:
    """The fixed words of all prompts and documents that the pipeline writes, for each language."""
    texts = [prompts.speech_document("", ""), prompts.asr(""), "user\nassistant"]
    for src, tgt in itertools.permutations(codes, 2):
        texts.append(prompts.mt_0_shot(src, tgt, ""))
        texts.append(prompts.mt_few_shot(src, tgt, "", [("", "")]))
        texts.append(prompts.parallel_document(src, "", tgt, ""))
    lines = {line.strip() for text in texts for line in text.splitlines()}
    return sorted(lines - {""})


def train_tokenizer(text: list[str], vocab_size: int) -> bytes:
    """Train a SentencePiece BPE with the settings in the header of Llama-2's tokenizer.model.

    Raises:
        UserError: The text is too small for so many pieces.
    """
    import sentencepiece

    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            add_dummy_prefix=True,
            character_coverage=1.0,  # Llama-2: 0.99995, which a small corpus does not need
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=1 << 20,  # bytes; the default, 4192, drops longer lines
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"SentencePiece makes no {vocab_size} pieces of this text: {str(error).splitlines()[-1]}",
            "change --vocab_size (at least 259 + the number of different characters), or give more text",
        ) from None
    return written.getvalue()


def save_tokenizer(model: bytes, folder: Path, max_length: int) -> None:
    """Write tokenizer.model and the Hugging Face files; the saved tokenizer adds BOS."""
    from transformers import LlamaTokenizer

    (folder / "tokenizer.model").write_bytes(model)
    # Without these two, transformers 5 saves a tokenizer that adds no BOS.
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, add_bos_token=True, legacy=False, model_max_length=max_length, pad_token=None
    )
    tokenizer.save_pretrained(folder)


def make_base(
    mono: Path,
    output_dir: Path,
    vocab_size: int = 700,
    hidden_size: int = 128,
    num_layers: int = 4,
    intermediate_size: int = 320,
    head_dim: int = 64,
    max_position_embeddings: int = 512,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Make a tokenizer and a randomly initialised model.

    Args:
        mono: JSONL with "language" and "text".
        output_dir: Folder to write.
        vocab_size: Pieces of the tokenizer, 256 bytes and 3 specials included.
        hidden_size: Width of the model.
        num_layers: Its layers.
        intermediate_size: Width of its MLPs.
        head_dim: Size of an attention head; vLLM on CPU wants 32, 64, 80, 96, 112 or 128.
        max_position_embeddings: Longest sequence, in tokens.
        seed: Seed of the weights.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    if hidden_size % head_dim:
        raise UserError(f"--hidden_size {hidden_size} is no multiple of --head_dim {head_dim}", "change one of them")
    with stage(__file__, output_dir, arguments, inputs=["mono"]) as work:
        if work.done:
            return
        rows = read_jsonl(mono, required=["language", "text"])
        codes = sorted({language(row["language"]).code for row in rows})
        text = [row["text"] for row in rows]
        words = prompt_lines(codes)
        repeats = max(1, len(text) // (PROMPT_SHARE * len(words)))
        model_bytes = train_tokenizer(text + words * repeats, vocab_size)

        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=-(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            intermediate_size=intermediate_size,
            num_attention_heads=hidden_size // head_dim,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=True,
            dtype="float32",
        )
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with work.publish() as folder:
            model.save_pretrained(folder)
            save_tokenizer(model_bytes, folder, max_position_embeddings)
        work.counts.update(pieces=vocab_size, rows=config.vocab_size, parameters=model.num_parameters())
        print(f"{vocab_size:,} pieces, {config.vocab_size:,} embedding rows, {model.num_parameters():,} parameters")
    print(output_dir)


if __name__ == "__main__":
    run(make_base)
