"""Write units Parquet as text for other programs: units.km, and JSONL with what else is known of the utterances.

Usage: python speech_units/export_units.py --units runs/units/train --output_dir runs/exported/train

Reads: the folder (or one file) that label_audio.py or import_units.py wrote.
Writes, in output_dir, an utterance a line and in the same order: units.km (ids separated by spaces, as fairseq's
dump_km_label.py writes them), and utterances.jsonl (id, audio, language, text, duration_s). Both together say all that
the Parquet does: import_units.py --units units.km --manifest utterances.jsonl makes the same of them.
"""

from pathlib import Path

from towerspeech.command import run
from towerspeech.manifests import TEXTS
from towerspeech.records import check_texts, dumps
from towerspeech.stage import stage
from towerspeech.units_parquet import read_units


def export_units(units: Path, output_dir: Path, overwrite: bool = False) -> None:
    """Write units Parquet as .km and JSONL.

    Args:
        units: Units folder, or one Parquet file.
        output_dir: Folder to write.
        overwrite: Replace the folder's content if it was made from other input.
    """
    arguments = dict(locals())
    from tqdm import tqdm

    with stage(__file__, output_dir, arguments, inputs=["units"]) as work:
        if work.done:
            return
        num_rows = num_units = 0
        with (
            work.publish() as folder,
            open(folder / "units.km", "w", encoding="ascii") as km,
            open(folder / "utterances.jsonl", "w", encoding="utf-8") as utterances,
        ):
            for row in tqdm(read_units(units), desc=f"{units}", unit="utt"):
                num_rows, num_units = num_rows + 1, num_units + len(row["units"])
                check_texts(row, TEXTS, f"{units}, row {num_rows} (id {row['id']})")
                km.write(" ".join(map(str, row["units"])) + "\n")
                utterances.write(dumps({name: row[name] for name in (*TEXTS, "duration_s")}) + "\n")
        work.counts.update(utterances=num_rows, units=num_units)
        print(f"{num_rows:,} utterances, {num_units:,} units")
    print(output_dir)


if __name__ == "__main__":
    run(export_units)
