"""Decode prompt files with vLLM: translation and any other text task.

Usage: python generate/generate.py --checkpoints models/towerspeech_6b/checkpoint-* \\
           --prompts instructions/0_shot/*.jsonl instructions/5_shot/*.jsonl --output_dir generations/towerspeech_6b/mt

Reads model folders and prompt files written by instructions/build_instructions.py (or the original's JSON lists);
writes <output_dir>/<checkpoint>/<0_shot|5_shot>/<task>.jsonl with the raw outputs. Results are kept as they come, so
that a run that was killed decodes the missing prompts alone.
"""

from pathlib import Path

from towerspeech.command import run


def generate(
    checkpoints: list[Path],
    prompts: list[Path],
    output_dir: Path,
    dataset: str | None = None,
    pair: str | None = None,
    shots: int | None = None,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str = "auto",
    max_model_len: int | None = None,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    overwrite: bool = False,
) -> None:
    """Decode prompts.

    Args:
        checkpoints: Model folders, decoded in turn; their names name the output folders.
        prompts: Prompt files.
        output_dir: Folder of the checkpoints' generations.
        dataset: Name of the test set, for prompts that do not say it themselves (the original's JSON lists) and whose
            file's name, such as 5_shot/flores_de-en.json, does not say it either.
        pair: Their languages, such as de-en.
        shots: How many examples they show.
        max_new_tokens: Limit of a generation, in tokens.
        temperature: 0 is greedy.
        top_p: Nucleus of sampling.
        seed: Of sampling.
        dtype: Of the computation; auto takes the checkpoint's.
        max_model_len: Limit of prompt and generation together, in tokens; default: the model's context.
        tensor_parallel_size: GPUs that a model is split over.
        data_parallel_size: Engines that share the prompts, each with GPUs (or CPU cores) of its own.
        gpu_memory_utilization: Share of a GPU's memory that vLLM takes.
        overwrite: Replace the output of a run with other arguments.
    """
    arguments = dict(locals())
    from towerspeech.decoding import Decoding, decode
    from towerspeech.languages import parse_pair
    from towerspeech.records import read_prompts

    decoding = Decoding(**{name: arguments[name] for name in Decoding.__annotations__})
    facts = {"dataset": dataset, "shots": shots}
    if pair:
        facts |= dict(zip(("src_lang", "tgt_lang"), parse_pair(pair), strict=True), task="mt")
    tasks = read_prompts(prompts, facts)
    decode(checkpoints, lambda _: tasks, output_dir, decoding, arguments, inputs=["prompts"])


if __name__ == "__main__":
    run(generate)
