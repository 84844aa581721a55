"""The arguments for the linked Megatron trainer, against megatron-core's own blend of GPT datasets over our files."""

import contextlib
import io
import json
import shlex

import numpy as np
import pytest

from continued_pretraining.megatron_arguments import megatron_arguments
from data_mixture.build_mixture import Source, build_mixture
from towerspeech.errors import UserError
from towerspeech.indexed import IndexedTokens
from towerspeech.records import write_jsonl

LENGTH, BATCH = 32, 4


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, model_dir, make_units):
    root = tmp_path_factory.mktemp("a mixture")
    speech = make_units(root / "units", 200)
    rows = [{"src_lang": "de", "tgt_lang": "en", "source": f"hund {i}", "target": f"dog {i}"} for i in range(60)]
    write_jsonl(root / "parallel.jsonl", rows)
    sources = [
        Source("speech", "speech", [str(speech)], 2560, 10),
        Source("parallel", "parallel", [str(root / "parallel.jsonl")], 1280, 10),
    ]
    build_mixture(model_dir, root / "mix", sources)
    return root / "mix"


def told(*arguments, **settings) -> dict[str, list[str]]:
    """The printed arguments, as a shell hands them on."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        megatron_arguments(*arguments, **settings)
    flags: dict[str, list[str]] = {}
    for word in shlex.split(printed.getvalue().replace("\\\n", " ")):
        if word.startswith("--"):
            flags[word] = []
        else:
            flags[next(reversed(flags))].append(word)
    return flags


def test_megatron_core_blends_what_is_told(mixture, model_dir):
    """It takes the prefixes as they are, draws the budgets' shares, and a sample holds our tokens in their order."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 487, 401, -1, {"class": "ours"}

    manifest = json.loads((mixture / "manifest.json").read_text())
    assert (manifest["vocab_size"], manifest["eod_id"]) == (Tokenizer.vocab_size, Tokenizer.eod)
    flags = told(mixture, model_dir, sequence_length=LENGTH, global_batch_size=BATCH)
    steps = int(flags["--train_iters"][0])
    assert steps == (2560 + 1280) // (LENGTH * BATCH) and flags["--split"] == ["100,0,0"]
    words = flags["--data_path"]
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=int(flags["--seq_length"][0]),
        blend=(words[1::2], [float(word) for word in words[::2]]),
        split=flags["--split"][0],
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    samples = steps * int(flags["--global_batch_size"][0])
    train, *others = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    assert len(train) == samples and others == [None, None]
    drawn = np.bincount(train.dataset_index, minlength=2) * LENGTH
    assert drawn.tolist() == [source["budget"] for source in manifest["sources"]]

    documents = []
    for source in manifest["sources"]:
        tokens = IndexedTokens(mixture / source["name"])
        starts = tokens.offsets.tolist()
        documents.append(
            {tuple(tokens.tokens[a : a + size].tolist()) for a, size in zip(starts, tokens.sizes, strict=True)}
        )
    for number in range(samples):
        sample = train[number]
        text = [*sample["tokens"].tolist(), sample["labels"][-1].item()]
        assert len(text) == LENGTH + 1
        ends = [i for i, token in enumerate(text) if token == Tokenizer.eod]
        of_source = documents[train.dataset_index[number]]
        for before, end in zip(ends, ends[1:], strict=False):  # whole documents, between two ends
            assert tuple(text[before + 1 : end + 1]) in of_source


def test_paths_and_sizes(mixture, model_dir):
    flags = told(mixture, model_dir, tensor_parallel=4, sequence_length=1000, global_batch_size=2)
    prefixes = [str(mixture / name) for name in ("speech", "parallel")]
    assert flags["--data_path"] == ["2560", prefixes[0], "1280", prefixes[1]]  # the folder's name has a blank
    assert flags["--vocab_file"] == [str(model_dir / "tokenizer.model")]
    assert flags["--train_iters"] == ["2"] and flags["--tensor_model_parallel_size"] == ["4"]  # 3,840 of 2 x 1,000


def test_what_does_not_fit_is_refused(mixture, model_dir, base_model_dir, tmp_path):
    with pytest.raises(UserError, match=r"512 embedding rows, the trainer makes 1,024 of 487 .*\n.*multiple_of 1024"):
        megatron_arguments(mixture, model_dir, tensor_parallel=8)
    with pytest.raises(UserError, match="another tokenizer"):
        megatron_arguments(mixture, base_model_dir)
    with pytest.raises(UserError, match="manifest.json does not exist\n.*build_mixture"):
        megatron_arguments(tmp_path, model_dir)
    with pytest.raises(UserError, match="--tensor_parallel is 0"):
        megatron_arguments(mixture, model_dir, tensor_parallel=0)
