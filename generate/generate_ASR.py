"""Transcribe speech units with vLLM.

Usage: python generate/generate_ASR.py --checkpoints models/towerspeech_6b/checkpoint-* \\
           --units units/librispeech_clean units/fleurs --output_dir generations/towerspeech_6b/asr

Reads model folders and units folders written by speech_units/label_audio.py; writes
<output_dir>/<checkpoint>/asr/<units folder's name>.jsonl with the raw outputs. Results are kept as they come, so that
a run that was killed decodes the missing utterances alone. (Ready prompt files are for generate.py.)
"""

from pathlib import Path
from typing import Literal

from towerspeech.command import UserError, run
from towerspeech.decoding import Decoding, decode
from towerspeech.speech_prompts import speech_rows
from towerspeech.tokenizer import read_metadata


def generate_ASR(
    checkpoints: list[Path],
    output_dir: Path,
    units: list[Path],
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
        style: Style of the prompts: original (a text to complete) or chat (for SFT models).
        max_new_tokens: Limit of a transcript, in tokens.
        overwrite: Replace the output of a run with other arguments.
        options: Further options of Decoding.
    """

    def load(checkpoint: Path) -> dict[str, list[dict]]:
        dsu = read_metadata(checkpoint)  # the offset is the tokenizer's own
        names = {folder.resolve().name: folder for folder in units}
        if len(names) < len(units):
            raise UserError("two units folders have the same name", "rename one of them")
        return {
            f"asr/{name}.jsonl": speech_rows(folder, name, style, dsu["offset"], dsu["num_units"])
            for name, folder in names.items()
        }

    asked = {"units": units, "style": style, "overwrite": overwrite}
    decode(checkpoints, load, output_dir, Decoding(max_new_tokens, **options), asked, inputs=["units"])


if __name__ == "__main__":
    run(generate_ASR)
