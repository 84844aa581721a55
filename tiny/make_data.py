"""Make the pocket language's data: text in every language of tiny/languages, and English speech.

Usage: python tiny/make_data.py --output_dir runs/tiny/data

Reads: nothing (the grammar is tiny/grammar.py with tiny/languages/*.yaml).

Writes, in output_dir (English first in every pair; no sentence of tuning or test is in the training text, in any
language):
  mono.jsonl                   {"id", "language", "text"}: training sentences
  parallel.jsonl               {"id", "src_lang", "tgt_lang", "source", "target"}: the same, to and from English
  flores/dev/*.dev             the tuning split in FLORES-200's layout, one sentence a line
  flores/devtest/*.devtest     the test split
  audio/<split>/<id>.wav       English speech, 16 kHz, mono, 16 bit
  audio/<split>/{wav.scp,text} which is where, and what it says, as Kaldi has them

The speech is eSpeak NG's (pip install -r tiny/requirements.txt), one of several voices, rates and pitches a sentence.
"""

import ctypes
import itertools
import multiprocessing.connection
import os
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tiny import grammar
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import publish
from towerspeech.languages import language
from towerspeech.records import write_jsonl
from towerspeech.stage import stage

SAMPLE_RATE = 16000  # Hz
VOICES = ("en-us", "en-us+f2", "en-gb-x-rp", "en-us+m3", "en", "en-us+f4", "en-gb-scotland", "en-us+m7")
RATES = (180, 200, 220)  # words a minute
PITCHES = (35, 50, 65)  # eSpeak's scale, 0 to 99
WAV_HEADER_BYTES = 44
CHUNK = 50  # sentences that are spoken one after the other
# Values of speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS, CHARS_UTF8, RATE, PITCH = 2, 1, 1, 3


# --- Speech ---------------------------------------------------------------------------------------
@cache
def espeak() -> tuple[ctypes.CDLL, int]:
    """Load and start eSpeak NG: the library, and its sample rate in Hz.

    Raises:
        UserError: espeakng-loader is not installed, or its library does not start.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(
            "espeakng-loader is not installed: it makes the pocket language's speech",
            "pip install -r tiny/requirements.txt",
        ) from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        raise UserError("eSpeak NG does not start", "pip install --force-reinstall -r tiny/requirements.txt")
    return library, rate


def speak(text: str, voice: str, rate: int, pitch: int) -> bytes:
    """Synthesise 16-bit mono samples at eSpeak's own sample rate."""
    library, _ = espeak()
    text_bytes = text.encode() + b"\0"
    spoken: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, _events) -> int:
        if count > 0:
            spoken.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on

    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise RuntimeError(f"eSpeak NG has no voice {voice!r}")
    library.espeak_SetParameter(RATE, rate, 0)
    library.espeak_SetParameter(PITCH, pitch, 0)
    library.espeak_Synth(text_bytes, len(text_bytes), 0, 0, 0, CHARS_UTF8, None, None)
    if not spoken:
        raise RuntimeError(f"eSpeak NG said nothing for {text!r} with voice {voice!r}")
    return b"".join(spoken)


def write_wav(path: Path, samples: bytes) -> None:
    """Resample what eSpeak said to 16 kHz and publish it."""
    import numpy as np
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    at_16_khz = resample_poly(np.frombuffer(samples, dtype=np.int16).astype(np.float64), SAMPLE_RATE, espeak()[1])
    with publish(path) as temporary:
        wavfile.write(temporary, SAMPLE_RATE, np.clip(np.rint(at_16_khz), -32768, 32767).astype("<i2"))


def speak_chunk(chunk: list[tuple]) -> None:
    """Write those wavs of a chunk (path, text, voice, rate, pitch) that are not there yet.

    eSpeak keeps state between utterances: the same words sound slightly different the second time. So a chunk is
    always spoken whole and in order, by a process that has not spoken: the same bytes, whichever worker does it and
    however often it is begun anew.
    """
    espeak()[0].espeak_ng_SetRandSeed(ctypes.c_long(0))  # breath noise; else seeded with the time
    for path, *sound in chunk:
        samples = speak(*sound)
        if not os.path.exists(path):
            write_wav(Path(path), samples)


def speech_chunks(folder: Path, rows: list[dict], voices: int, seed: int) -> list[list[tuple]]:
    """Cut a split into chunks; a sentence's voice depends on its id and the seed alone."""
    spoken = []
    for row in rows:
        rng = random.Random(f"voice {seed} {row['id']}")
        sound = (rng.choice(VOICES[:voices]), rng.choice(RATES), rng.choice(PITCHES))
        spoken.append((str(folder / row["audio"]), row["text"], *sound))
    return [spoken[start : start + CHUNK] for start in range(0, len(spoken), CHUNK)]


def speak_all(chunks: list[list[tuple]], num_workers: int) -> None:
    """Speak the chunks, each in a process of its own."""
    from tqdm import tqdm

    # Not forked from this process: a worker would keep the folder's lock after its parent was killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny.make_data", "scipy.io.wavfile", "scipy.signal"])
    left = [chunk for chunk in chunks if not all(os.path.exists(path) for path, *_ in chunk)]
    speaking = {}
    with tqdm(total=sum(map(len, left)), desc="speech", unit="wav") as progress:
        while left or speaking:
            while left and len(speaking) < num_workers:
                chunk = left.pop(0)
                process = context.Process(target=speak_chunk, args=(chunk,), daemon=True)
                process.start()
                speaking[process.sentinel] = process, chunk
            for sentinel in multiprocessing.connection.wait(speaking):
                process, chunk = speaking.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise RuntimeError(f"speaking the chunk of {chunk[0][0]} failed; its error stands above")
                progress.update(len(chunk))


# --- Text -----------------------------------------------------------------------------------------
def make_splits(
    codes: list[str], sizes: dict[str, int], seed: int, templates: list[str] | None = None, most: int | None = None
) -> dict[str, list[dict[str, str]]]:
    """Draw the sentences of each split, tuning and test first, so that more training text never changes them.

    Raises:
        UserError: The grammar has fewer sentences than are asked for.
    """
    drawn = grammar.sentences(codes, seed, templates, most)
    splits = {name: list(itertools.islice(drawn, size)) for name, size in sizes.items()}
    wanted, given = sum(sizes.values()), sum(map(len, splits.values()))
    if given < wanted:
        raise UserError(
            f"{wanted:,} sentences are asked for, the grammar gives {given:,}",
            "lower --num_train, or allow more --templates or --max_concepts",
        )
    return splits


def mono_rows(sentences: list[dict[str, str]]) -> Iterator[dict]:
    """Every sentence in every language."""
    for number, said in enumerate(sentences):
        for code, text in said.items():
            yield {"id": f"mono-{code}-{number:06d}", "language": code, "text": text}


def parallel_rows(sentences: list[dict[str, str]]) -> Iterator[dict]:
    """Every sentence to and from English."""
    for number, said in enumerate(sentences):
        for other in [code for code in said if code != "en"]:
            for src, tgt in (("en", other), (other, "en")):
                yield {
                    "id": f"parallel-{src}-{tgt}-{number:06d}",
                    "src_lang": src,
                    "tgt_lang": tgt,
                    "source": said[src],
                    "target": said[tgt],
                }


def write_text(work, splits: dict[str, list[dict[str, str]]]) -> None:
    """Write mono.jsonl, parallel.jsonl and flores/ of ``make_splits``' sentences."""
    work.counts["mono"] = write_jsonl(work.output_dir / "mono.jsonl", mono_rows(splits["train"]))
    work.counts["parallel"] = write_jsonl(work.output_dir / "parallel.jsonl", parallel_rows(splits["train"]))
    for split, name in (("tuning", "dev"), ("test", "devtest")):
        for code in splits[split][0]:
            with work.publish(f"flores/{name}/{language(code).flores}.{name}") as path:
                path.write_text("".join(said[code] + "\n" for said in splits[split]), encoding="utf-8")


def write_speech(work, splits: dict[str, list[dict[str, str]]], voices: int, seed: int, num_workers: int) -> None:
    """Write audio/ of ``make_splits``' English sentences."""
    audio, chunks, manifests = work.output_dir / "audio", [], {}
    for split in ("train", "tuning", "test"):
        names = [f"{split}-{number:06d}" for number in range(len(splits[split]))]
        manifests[split] = [
            {"id": name, "audio": f"{split}/{name}.wav", "language": "en", "text": said["en"]}
            for name, said in zip(names, splits[split], strict=True)
        ]
        chunks += speech_chunks(audio, manifests[split], voices, seed)
    speak_all(chunks, num_workers)
    for split, rows in manifests.items():
        work.counts[f"audio_{split}"] = len(rows)
        for name, said in (("wav.scp", lambda row: f"{row['id']}.wav"), ("text", lambda row: row["text"])):
            with publish(audio / split / name) as path:
                path.write_text("".join(f"{row['id']} {said(row)}\n" for row in rows), encoding="utf-8")
    num_samples = sum((path.stat().st_size - WAV_HEADER_BYTES) // 2 for path in audio.glob("*/*.wav"))
    work.counts["audio_hours"] = round(num_samples / SAMPLE_RATE / 3600, 3)


def make_data(
    output_dir: Path,
    num_train: int = 3000,
    num_tuning: int = 200,
    num_test: int = 200,
    voices: int = 3,
    templates: list[str] | None = None,
    max_concepts: int | None = None,
    seed: int = 0,
    num_workers: int = 2,
    overwrite: bool = False,
) -> None:
    """Make the pocket language's text and speech.

    Args:
        output_dir: Folder to write.
        num_train: Training sentences.
        num_tuning: Held-out sentences to choose settings with.
        num_test: Held-out sentences to report on.
        voices: Number of voices, 1 to 8.
        templates: Templates of the grammar to use; default: all.
        max_concepts: Use the first so many concepts of each slot; default: all.
        seed: Decides the sentences and who says them.
        num_workers: Processes that speak.
        overwrite: Replace the folder's content if it was made with other arguments.
    """
    arguments = dict(locals())
    least = {"num_train": 1, "num_tuning": 1, "num_test": 1, "max_concepts": 2, "num_workers": 1}
    for name, value in least.items():
        if arguments[name] is not None and arguments[name] < value:
            raise UserError(f"--{name} is {arguments[name]}", f"give at least {value}")
    if not 1 <= voices <= len(VOICES):
        raise UserError(f"--voices is {voices}", f"give 1 to {len(VOICES)}")
    unknown = set(templates or []) - set(grammar.TEMPLATES)
    if unknown:
        raise UserError(f"no template is called {min(unknown)!r}", f"name some of: {', '.join(grammar.TEMPLATES)}")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy: threads only get in workers' way
        os.environ.setdefault(variable, "1")
    with stage(__file__, output_dir, arguments, ignore=["num_workers"]) as work:
        if work.done:
            return
        espeak()  # missing: said before any work
        codes = grammar.languages()
        sizes = {"tuning": num_tuning, "test": num_test, "train": num_train}
        splits = make_splits(codes, sizes, seed, templates, max_concepts)
        write_text(work, splits)
        write_speech(work, splits, voices, seed, num_workers)
        print(
            f"{num_train:,} training sentences in {', '.join(codes)}; "
            f"{num_train + num_tuning + num_test:,} spoken, {work.counts['audio_hours']:.2f} h"
        )
    print(output_dir)


if __name__ == "__main__":
    run(make_data)
