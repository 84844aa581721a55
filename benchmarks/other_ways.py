"""Prompts decoded as others do, for bench_evaluation.py to compare with.

Each way takes prompts by their files' names, as ``read_prompts`` gives them, and returns the text and the number of
tokens of each, and the seconds of the decoding alone, without start and loading.
"""

import time
from pathlib import Path

from towerspeech import decoding
from towerspeech.tokenizer import stop_token_ids


def with_vllm(model: Path, tasks: dict, max_new_tokens: int) -> tuple[dict, float]:
    """A plain engine as the original TowerSpeech's scripts make it, and one call of LLM.generate a file; text goes in.

    Eager, as ours is on a CPU: compiling adds minutes to a start.
    """
    import os

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), dtype="float32", enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=max_new_tokens, stop=["\n"])
    params.stop_token_ids = stop_token_ids(llm.get_tokenizer())
    outputs, seconds = {}, 0.0
    for name, rows in tasks.items():
        began = time.perf_counter()
        results = llm.generate([row["instruction"] for row in rows], params)
        seconds += time.perf_counter() - began
        outputs[name] = [(result.outputs[0].text, len(result.outputs[0].token_ids)) for result in results]
    return outputs, seconds


def with_transformers(model_dir: Path, tasks: dict, max_new_tokens: int, batch_size: int) -> tuple[dict, float]:
    """Batches sorted by length, padded on the left; greedy search in float32, stopping where vLLM does.

    A newline ends a generation as an id: each token that holds one. (``stop_strings`` does the same, but took most of
    the time.)
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    stop_ids = stop_token_ids(tokenizer)
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    newlines = [i for i, piece in enumerate(pieces) if "\n" in piece]
    outputs, seconds = {}, 0.0
    for name, rows in tasks.items():
        began = time.perf_counter()
        chat = "messages" in rows[0]  # then an id alone ends it
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_ids if chat else sorted({*stop_ids, *newlines}),
            pad_token_id=tokenizer.pad_token_id,
        )
        ids = [decoding.token_ids(tokenizer, row) for row in rows]
        order = sorted(range(len(rows)), key=lambda i, ids=ids: len(ids[i]))
        outputs[name] = [("", 0)] * len(rows)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**padded, generation_config=config)
            for i, new in zip(batch, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
                outputs[name][i] = cut(tokenizer, new, stop_ids, chat)
        seconds += time.perf_counter() - began
    return outputs, seconds


def cut(tokenizer, new: list[int], stop_ids: list[int], chat: bool) -> tuple[str, int]:
    """The text up to the stop, and the tokens up to it, the stop's own included."""
    length = next((i + 1 for i, token in enumerate(new) if token in stop_ids), len(new))
    text = tokenizer.decode(new[:length], skip_special_tokens=True)
    if "\n" in text and not chat:
        length = next(i for i in range(1, length + 1) if "\n" in tokenizer.decode(new[:i], skip_special_tokens=True))
        text = text.split("\n")[0]
    return text, length
