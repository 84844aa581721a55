"""Two controls that a model which hears must beat: shuffled units, and the nearest training utterance's transcript.

Usage: python tiny/make_controls.py --train runs/tiny/units/train --test runs/tiny/units/test \\
           --shuffled_dir runs/tiny/units/test_shuffled --nearest_dir runs/tiny/generations/asr/control_nearest

Reads two units folders. Writes a units folder in which each test utterance's units stand in random order (what a model
still gets right there it did not hear), and generations that repeat the transcript of the training utterance whose
units are most alike (what a search without any model gets right).
"""

from pathlib import Path

from towerspeech import records, units
from towerspeech.command import run
from towerspeech.stage import stage
from towerspeech.units_parquet import read_units, shard_name, write_units


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """The rows with their units in random order; repeats that meet are collapsed, as everywhere."""
    import numpy as np

    random = np.random.default_rng(seed)
    return [{**row, "units": units.collapse(random.permutation(row["units"]).tolist())} for row in rows]


def nearest(test: list[dict], train: list[dict]) -> list[int]:
    """For each test row the number of the most similar training row: cosine of tf-idf over unit 1- to 3-grams."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False, sublinear_tf=True)
    known = vectorizer.fit_transform([units.to_text(row["units"]) for row in train])
    asked = vectorizer.transform([units.to_text(row["units"]) for row in test])
    return (asked @ known.T).toarray().argmax(axis=1).tolist()


def make_controls(
    train: Path, test: Path, shuffled_dir: Path, nearest_dir: Path, seed: int = 0, overwrite: bool = False
) -> None:
    """Make both controls.

    Args:
        train: Units folder that the model was trained on.
        test: Units folder to control.
        shuffled_dir: New units folder.
        nearest_dir: New folder of generations, as of a checkpoint.
        seed: Seed of the shuffling.
        overwrite: Replace the output of a run with other arguments.
    """
    rows = list(read_units(test))
    arguments = {"test": test, "seed": seed, "overwrite": overwrite}
    with stage(__file__, shuffled_dir, arguments, inputs=["test"]) as work:
        if not work.done:
            with work.publish(f"{shard_name(0, 1)}.parquet") as path:
                write_units(path, shuffled(rows, seed))
            print(f"{len(rows):,} utterances with shuffled units: {shuffled_dir}")
    arguments = {"train": train, "test": test, "overwrite": overwrite}
    with stage(__file__, nearest_dir, arguments, inputs=["train", "test"]) as work:
        if not work.done:
            known = list(read_units(train))
            facts = {"task": "asr", "dataset": test.name, "shots": 0, "src_lang": "en", "tgt_lang": "en"}
            results = (
                {
                    "id": row["id"],
                    **facts,
                    "source": row["audio"],
                    "reference": row["text"],
                    "text": known[number]["text"],
                    "finish_reason": "stop",
                    "num_tokens": 0,
                }
                for row, number in zip(rows, nearest(rows, known), strict=True)
            )
            records.write_jsonl(nearest_dir / "asr" / f"{test.name}.jsonl", results)
            print(f"{len(rows):,} nearest training transcripts: {nearest_dir}")


if __name__ == "__main__":
    run(make_controls)
