"""Decode prompt files with vLLM: translation and any other text task.

Usage: python generate/generate.py --checkpoints models/towerspeech_6b/checkpoint-* \\
           --prompts instructions/0_shot/*.jsonl instructions/5_shot/*.jsonl --output_dir generations/towerspeech_6b/mt

Reads model folders and prompt files written by instructions/build_instructions.py (or the original's JSON lists);
writes <output_dir>/<checkpoint>/<0_shot|5_shot>/<task>.jsonl with the raw outputs. Results are kept as they come, so
that a run that was killed decodes the missing prompts alone.
"""

from pathlib import Path

from towerspeech.command import run
from towerspeech.decoding import Decoding, decode
from towerspeech.languages import parse_pair
from towerspeech.records import read_prompts


def generate(
    checkpoints: list[Path],
    prompts: list[Path],
    output_dir: Path,
    dataset: str | None = None,
    pair: str | None = None,
    shots: int | None = None,
    max_new_tokens: int = 1024,
    overwrite: bool = False,
    **options,
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
        overwrite: Replace the output of a run with other arguments.
        options: Further options of Decoding.
    """
    facts = {"dataset": dataset, "shots": shots}
    if pair:
        src_lang, tgt_lang = parse_pair(pair)
        facts |= {"task": "mt", "src_lang": src_lang, "tgt_lang": tgt_lang}
    tasks = read_prompts(prompts, facts)
    asked = {"prompts": prompts, "dataset": dataset, "pair": pair, "shots": shots, "overwrite": overwrite}
    decode(checkpoints, lambda _: tasks, output_dir, Decoding(max_new_tokens, **options), asked, inputs=["prompts"])


if __name__ == "__main__":
    run(generate)
