"""Record the checksums of prompt files whose text may not be in the repo, for build_instructions.py to verify.

Usage: python instructions/record_checksums.py --prompts instructions/0_shot/flores_*.jsonl \\
           instructions/0_shot/wmt23_*.jsonl --output instructions/checksums.json

Reads prompt files as build_instructions.py writes them. Writes JSON: for each file, by its folder and name, the
SHA-256 of the whole and a short checksum a prompt. Done once, from the release that the original TowerSpeech's prompts
were made from; anew only where the prompts themselves are to change.
"""

from pathlib import Path

from instructions.checksums import RECORDED, checksums
from towerspeech.command import run
from towerspeech.files import write_json
from towerspeech.records import read_jsonl


def record_checksums(prompts: list[Path], output: Path = RECORDED) -> None:
    """Write the checksums of prompt files.

    Args:
        prompts: Prompt files, each in its 0_shot or 5_shot folder.
        output: JSON to write; what it held before is replaced.
    """
    sums = {f"{path.resolve().parent.name}/{path.name}": checksums(read_jsonl(path)) for path in sorted(prompts)}
    write_json(output, sums)
    print(f"{output}: {len(sums)} files")


if __name__ == "__main__":
    run(record_checksums)
