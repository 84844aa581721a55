"""Transcribe speech units with vLLM.

Usage: python generate/generate_ASR.py --checkpoints models/towerspeech_6b/checkpoint-* \\
           --units units/librispeech_clean units/fleurs --output_dir generations/towerspeech_6b/asr

Reads model folders and units folders written by speech_units/label_audio.py, or ready prompt files; writes
<output_dir>/<checkpoint>/asr/<units folder's name>.jsonl with the raw outputs. Results are kept as they come, so that
a run that was killed decodes the missing utterances alone.
"""

from pathlib import Path
from typing import Literal

from towerspeech.command import run
from towerspeech.decoding import Decoding, decode
from towerspeech.errors import UserError
from towerspeech.records import read_prompts
from towerspeech.speech_prompts import speech_rows
from towerspeech.tokenizer import read_metadata


def generate_ASR(
    checkpoints: list[Path],
    output_dir: Path,
    units: list[Path] | None = None,
    prompts: list[Path] | None = None,
    style: Literal["original", "chat"] = "original",
    max_new_tokens: int = 128,
    overwrite: bool = False,
    **options,
) -> None:
    """Transcribe utterances.

    Args:
        checkpoints: Model folders, decoded in turn; their names name the output folders.
        output_dir: Folder of the checkpoints' generations.
        units: Units folders; their names name the data sets.
        prompts: Prompt files of instructions/build_instructions.py, instead of units.
        style: Of the prompts made from units: original (a text to complete) or chat (for SFT models).
        max_new_tokens: Limit of a transcript, in tokens.
        overwrite: Replace the output of a run with other arguments.
        options: Further options of Decoding.
    """
    if bool(units) == bool(prompts):
        raise UserError("speech is wanted once", "give either --units or --prompts")
    if prompts and style != "original":
        raise UserError("--style is of prompts made from units", "leave it out: prompt files have their own")

    def load(checkpoint: Path) -> dict[str, list[dict]]:
        if prompts:
            return read_prompts(prompts, {"task": "asr", "src_lang": "en", "tgt_lang": "en", "shots": 0})
        dsu = read_metadata(checkpoint)  # the offset is the tokenizer's own
        names = {f"asr/{folder.resolve().name}.jsonl": folder for folder in units}
        if len(names) < len(units):
            raise UserError("two units folders have the same name", "rename one of them")
        return {
            name: speech_rows(folder, Path(name).stem, style, dsu["offset"], dsu["num_units"])
            for name, folder in names.items()
        }

    decoding = Decoding(max_new_tokens, **options)
    asked = {"units": units, "prompts": prompts, "style": style, "overwrite": overwrite}
    decode(checkpoints, load, output_dir, decoding, asked, inputs=["units", "prompts"])


if __name__ == "__main__":
    run(generate_ASR)
