"""Turn transcribed speech units and parallel text into chat examples for instruction tuning.

Usage:
    python instruction_tuning/build_sft_data.py --units runs/units --parallel wmt.jsonl \\
        --num_asr 100000 --num_mt 100000 --few_shot_share 0.2 --output_dir runs/sft_data

Reads units Parquet (speech_units/label_audio.py) and parallel text in the forms that towerspeech/texts.py tells (JSONL
with src_lang, tgt_lang, source, target, and others). Writes ``<output_dir>/sft.jsonl``, one example a line, shuffled:
    {"id": ..., "task": "asr" | "mt_0_shot" | "mt_5_shot",
     "messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
The counts are exact: nothing is repeated, and asking for more than there is is refused.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from towerspeech import prompts
from towerspeech import units as dsu
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.outside_text import check_outside_text
from towerspeech.records import check_texts, write_jsonl
from towerspeech.sampling import reservoir
from towerspeech.stage import stage
from towerspeech.texts import expand, iter_parallel
from towerspeech.units_parquet import read_units

NUM_SHOTS = 5  # the original's few-shot prompts


def example(name: str, task: str, prompt: str, answer: str) -> dict:
    """One row of sft.jsonl."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"id": name, "task": task, "messages": messages}


def transcribed(folders: list[Path], unit_offset: int, counts: dict) -> Iterator[dict]:
    """Stream ASR examples; rows without a transcript or without units are counted and left out.

    Raises:
        UserError: A row's speech is not English (the prompt asks for English), a unit has no character, or a
            transcript spells units.
    """
    from tqdm import tqdm

    most = dsu.OFFSET + dsu.MAX_NUM_UNITS - unit_offset
    for folder in folders:
        for row in tqdm(read_units(folder, most), desc=f"{folder}", unit=" utterances"):
            text = (row["text"] or "").strip()
            if not text or not row["units"]:
                reason = "utterances_without_transcript" if not text else "utterances_without_units"
                counts[reason] = counts.get(reason, 0) + 1
                continue
            if row["language"] != "en":
                raise UserError(
                    f"{folder}: utterance {row['id']} is in {row['language']!r}, but the ASR prompt is for English",
                    "leave other languages' speech out of --units",
                )
            check_outside_text(text, f"{folder}: utterance {row['id']}")
            yield example(f"asr_{row['id']}", "asr", prompts.asr(dsu.to_text(row["units"], unit_offset)), text)


def read_pairs(path: Path) -> list[dict]:
    """Read the parallel text that a name means, in which no side may be blank."""
    pairs = []
    for where, row in iter_parallel(path):
        check_texts(row, ("source", "target"), where, blank=False)
        pairs.append(row)
    return pairs


def translations(rows: list[dict], size: int, few_shot_share: float, rng: random.Random) -> list[dict]:
    """Draw ``size`` MT examples, round(share * size) of them after five others of the same direction.

    Shown examples never have the example's own source, nor the same source twice.

    Raises:
        UserError: A direction has too few different sentences to show five others.
    """
    by_source = defaultdict(dict)  # direction -> source -> target
    for row in rows:
        by_source[row["src_lang"], row["tgt_lang"]].setdefault(row["source"], row["target"])
    pools = {direction: list(pairs.items()) for direction, pairs in by_source.items()}
    examples = []
    num_few_shot = round(few_shot_share * size)
    for number, row in enumerate(rng.sample(rows, size)):
        src, tgt, source = row["src_lang"], row["tgt_lang"], row["source"]
        shots = NUM_SHOTS if number < num_few_shot else 0
        prompt = prompts.mt_0_shot(src, tgt, source)
        if shots:
            pool = pools[src, tgt]
            if len(pool) <= shots:
                raise UserError(
                    f"{src}-{tgt} has {len(pool)} different sources; a {shots}-shot prompt needs {shots + 1}",
                    "add parallel text of this direction, or set --few_shot_share 0",
                )
            shown = [pair for pair in rng.sample(pool, shots + 1) if pair[0] != source][:shots]
            prompt = prompts.mt_few_shot(src, tgt, source, shown)
        name = f"mt_{src}-{tgt}_{row['id']}"
        examples.append(example(name, f"mt_{shots}_shot", prompt, row["target"].strip()))
    return examples


def build_sft_data(
    output_dir: Path,
    units: list[Path] | None = None,
    parallel: list[Path] | None = None,
    num_asr: int = 0,
    num_mt: int = 0,
    few_shot_share: float = 0.2,
    unit_offset: int = dsu.OFFSET,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write chat examples for ASR and MT.

    Args:
        output_dir: Folder for sft.jsonl.
        units: Folder(s) of units Parquet with English transcripts.
        parallel: Parallel text that says its languages, in the forms of towerspeech/texts.py: file(s), folders,
            patterns.
        num_asr: Number of ASR examples, drawn from all of ``units``.
        num_mt: Number of MT examples, drawn from all of ``parallel``.
        few_shot_share: Share of the MT examples that show five others first, 0 to 1.
        unit_offset: Code point of unit 0, as in the tokenizer's speech_units.json.
        seed: Seed of draws and order.
        overwrite: Replace the output of other arguments.
    """
    arguments = dict(locals())
    if min(num_asr, num_mt) < 0 or num_asr + num_mt == 0:
        raise UserError(f"num_asr {num_asr} and num_mt {num_mt} make no data set", "give at least one above 0")
    if not 0 <= few_shot_share <= 1:
        raise UserError(f"few_shot_share {few_shot_share} is not a share", "give a number from 0 to 1")
    if not dsu.OFFSET <= unit_offset < 0xFFFFE:
        raise UserError(f"unit_offset {unit_offset} is not in plane 15's private use area", "see speech_units.json")
    for name, number, paths in (("units", num_asr, units), ("parallel", num_mt, parallel)):
        if bool(number) != bool(paths):
            raise UserError(
                f"--{name} is {'missing' if number else 'given'}, but {number} of its examples are wanted",
                f"give both --{name} and its number, or neither",
            )
    arguments["parallel"] = [path for name in parallel or [] for path in expand(name, "check --parallel")] or None
    with stage(__file__, output_dir, arguments, inputs=["units", "parallel"]) as work:
        if work.done:
            return
        rng = random.Random(seed)
        asr, num_transcribed = reservoir(transcribed(units or [], unit_offset, work.counts), num_asr, rng)
        pairs = [row for path in parallel or [] for row in read_pairs(path)]
        for name, wanted, available in (("asr", num_asr, num_transcribed), ("mt", num_mt, len(pairs))):
            if wanted > available:
                raise UserError(
                    f"--num_{name} is {wanted:,}, but there are {available:,} such examples",
                    f"lower --num_{name}, or add data (for more epochs: sft.num_train_epochs of train.py)",
                )
        rows = asr + translations(pairs, num_mt, few_shot_share, rng)
        rng.shuffle(rows)
        write_jsonl(output_dir / "sft.jsonl", rows)
        work.counts.update({"asr_available": num_transcribed, "mt_available": len(pairs), "examples": len(rows)})
        work.counts.update(Counter(row["task"] for row in rows))
        for name, count in work.counts.items():
            print(f"{name}: {count:,}")
        print(f"wrote {output_dir / 'sft.jsonl'}")


if __name__ == "__main__":
    run(build_sft_data)
