"""Small corpora in their real layouts, of synthetic tones: each function writes one and says which rows are expected.

Every one has --split test (gigaspeech: TEST), some rows of another split, and English speech. Expected are the
manifest's rows by id, as --text clean has them and with audio relative to the folder given; translations as
(id, target language, source, target).
"""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000


def tone(path: Path, seconds: float, rate: int = RATE) -> float:
    """Write a tone in the format of the path's ending; how many seconds of it can be read again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.3 * np.sin(2 * np.pi * 220 * np.arange(round(seconds * rate)) / rate)
    kind = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
    soundfile.write(path, samples, rate, **kind)
    return len(soundfile.read(path)[0]) / rate


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def row(name: str, audio: str, text: str, duration_s: float, **others) -> dict:
    wanted = {"id": name, "audio": audio, "language": "en", "text": text, "duration_s": duration_s, **others}
    return {name: wanted}


def librispeech(root: Path) -> dict[str, dict]:
    rows = {}
    for speaker, chapter, texts in (("61", "70", ["HE SAID SO", "IT'S LATE"]), ("7", "8", ["A  B"])):
        folder = f"test/{speaker}/{chapter}"
        names = [f"{speaker}-{chapter}-{number:04d}" for number in range(len(texts))]
        write(root / folder / f"{speaker}-{chapter}.trans.txt", *map(" ".join, zip(names, texts, strict=True)))
        for number, (name, text) in enumerate(zip(names, texts, strict=True)):
            seconds = tone(root / folder / f"{name}.flac", 0.5 + number / 8)
            said = text.lower().replace("  ", " ")
            rows |= row(name, f"{folder}/{name}.flac", said, seconds, speaker=speaker)
    write(root / "dev/1/2/1-2.trans.txt", "1-2-0000 OTHER")
    tone(root / "dev/1/2/1-2-0000.flac", 0.5)
    return rows


def mls(root: Path, ending: str = ".flac") -> dict[str, dict]:
    rows, texts = {}, {"10_20_000001": "he said so", "10_20_000002": "it was late", "30_40_000000": "no"}
    for number, (name, text) in enumerate(texts.items()):
        speaker, book, _ = name.split("_")
        audio = f"test/audio/{speaker}/{book}/{name}{ending}"
        rows |= row(name, audio, text, tone(root / audio, 0.5 + number / 8), speaker=speaker)
    write(root / "test/transcripts.txt", *(f"{name}\t{text}" for name, text in texts.items()))
    write(root / "test/segments.txt", *(f"{name}\thttps://host/{name}.mp3\t1.0\t2.0" for name in texts))
    write(root / "metainfo.txt", "SPEAKER | GENDER", "10 | M | test | 1 | X | Y", "30 | F | test | 1 | X | Y")
    for split in ("dev", "train"):  # lhotse reads all three
        write(root / split / "transcripts.txt", "10_20_000009\tother")
        tone(root / f"{split}/audio/10/20/10_20_000009{ending}", 0.5)
    return rows


def gigaspeech(root: Path) -> dict[str, dict]:
    rows, audios = {}, []
    for aid, texts in (
        ("POD1", ["WELL <COMMA> YES <PERIOD>", "<MUSIC>", "WHO <QUESTIONMARK>"]),
        ("YOU2", ["GO <EXCLAMATIONPOINT>"]),
    ):
        path = f"audio/podcast/P1/{aid}.opus"
        tone(root / path, 4.0)
        segments = []
        for number, text in enumerate(texts):
            name, start, end = f"{aid}_S{number:07d}", 0.25 + number, 1.0 + number
            segments.append({"sid": name, "speaker": "N/A", "begin_time": start, "end_time": end, "text_tn": text})
            segments[-1]["subsets"] = ["{TEST}"]
            if text != "<MUSIC>":
                said = text.lower()
                for tag, mark in (("comma", ","), ("period", "."), ("questionmark", "?"), ("exclamationpoint", "!")):
                    said = said.replace(f" <{tag}>", mark)
                rows |= row(name, path, said, 0.75, start_s=start, end_s=end)
        segments.append({**segments[0], "sid": f"{aid}_XL", "subsets": ["{XL}"]})
        audios.append({"title": 'a {"audios": [ title', "path": path, "aid": aid, "segments": segments})
    (root / "GigaSpeech.json").write_text(json.dumps({"dataset": "GigaSpeech", "audios": audios, "end": 1}, indent=1))
    return rows


def spgispeech(root: Path) -> dict[str, dict]:
    rows, lines = {}, ["wav_filename|wav_filesize|transcript"]
    for number, text in enumerate(['Revenue was $5 million, up "sharply".', "Thank you."], 1):
        audio = f"test/07a785/{number}.wav"
        rows |= row(f"07a785_{number}", audio, text, tone(root / audio, 0.5 + number / 8))
        lines.append(f"07a785/{number}.wav|16000|{text}")
    write(root / "test.csv", *lines)
    write(root / "train.csv", lines[0], "b/1.wav|1|Other.")
    return rows


def voxpopuli(root: Path) -> dict[str, dict]:
    rows, session = {}, "20131007-0900-PLENARY-19"
    audio = f"raw_audios/original/2013/{session}_original.ogg"
    tone(root / audio, 4.0)
    lines = ["session_id|id_|original_text|normed_text|speaker_id|split|start_time|end_time"]
    for number, (original, normed) in enumerate([('"Madam President!', "madam president"), ("So.", "so")]):
        start, end = 0.5 + number, 1.25 + number
        lines.append(f"{session}|2013_{number}|{original}|{normed}|99|test|{start}|{end}")
        times = {"start_s": start, "end_s": end}
        rows |= row(f"{session}-2013_{number}", audio, normed, 0.75, speaker="99", **times)
    write(root / "asr_en.tsv.gz", *lines, f"{session}|2013_9|Other.|other|99|train|3.0|3.5")
    return rows


def fleurs(root: Path, packed: bool = True) -> tuple[dict[str, dict], set]:
    """Two readers of one sentence; German has both sentences, Chinese one."""
    rows, lines, folder = {}, [], root / "en_us"
    readings = (("1", "100", 'A "cat" sat.', "a cat sat"), ("1", "101", 'A "cat" sat.', "a cat sat"))
    for sentence, name, raw, plain in (*readings, ("2", "102", "Dogs ran.", "dogs ran")):
        place = {"audio": f"en_us/audio/test/{name}.wav"}
        seconds = tone(folder / f"audio/test/{name}.wav", int(name) / 200)
        if packed:
            place = {"audio": "en_us/audio/test.tar.gz", "member": f"test/{name}.wav"}
        rows |= row(name, text=plain, duration_s=seconds, sentence_id=sentence, **place)
        lines.append(f"{sentence}\t{name}.wav\t{raw}\t{plain}\tp h\t{round(seconds * RATE)}\tFEMALE")
    if packed:
        with tarfile.open(folder / "audio/test.tar.gz", "w:gz") as tar:
            tar.add(folder / "audio/test", "test")
        for file in (folder / "audio/test").iterdir():
            file.unlink()
        (folder / "audio/test").rmdir()
    write(folder / "test.tsv", *lines)
    write(
        root / "de_de/test.tsv",
        "1\t7.wav\tEine „Katze“ saß.\teine katze saß\tp\t1\tMALE",
        "2\t8.wav\tHunde.\thunde\tp\t1\tMALE",
    )
    write(root / "cmn_hans_cn/test.tsv", "2\t9.wav\t狗跑了。\t狗 跑 了\tp\t1\tMALE")
    cat, dogs = ('A "cat" sat.', "Eine „Katze“ saß."), ("Dogs ran.", "Hunde.")
    pairs = {("100", "de", *cat), ("101", "de", *cat), ("102", "de", *dogs), ("102", "zh", "Dogs ran.", "狗跑了。")}
    return rows, pairs


CLIPS = {  # sentence in the TSV, and clean
    "common_voice_en_1": ('"Hello there."', "Hello there."),
    "common_voice_en_2": ('He said "no', 'He said "no'),
    "common_voice_en_3": ("So it is.", "So it is."),
}


def common_voice(root: Path, folder: str = "en", **columns: str) -> dict[str, dict]:
    """As releases since the fourth have it; ``columns`` are others that newer ones have."""
    rows, lines = {}, ["\t".join(["client_id", "path", "sentence", "up_votes", "age", "gender", *columns])]
    for number, (name, (sentence, said)) in enumerate(CLIPS.items()):
        audio = f"{folder}/clips/{name}.mp3".removeprefix("/")
        seconds = tone(root / audio, 0.6 + number / 8, 48000)
        rows |= row(name, audio, said, round(seconds, 6), speaker=f"c{number}")
        lines.append("\t".join([f"c{number}", f"{name}.mp3", sentence, "2", "", "", *columns.values()]))
    write(root / folder / "test.tsv", *lines)
    write(root / folder / "validated.tsv", *lines)
    return rows


def covost2(root: Path) -> tuple[dict[str, dict], set]:
    """Beside Common Voice; German, Chinese, and Turkish, which is none of the ten languages."""
    rows = common_voice(root, "cv-corpus-4-2019-12-10/en")
    first, second, third = rows
    head = "path\ttranslation\tsplit"
    write(root / "covost_v2.en_de.tsv", head, f'{first}.mp3\t\\"Hallo.\\"\ttest', f"{second}.mp3\tNein.\ttest")
    write(root / "covost_v2.en_zh-CN.tsv", head, f"{first}.mp3\t你好。\ttest", f"{third}.mp3\t是。\ttrain")
    write(root / "covost_v2.en_tr.tsv", head, f"{third}.mp3\tEvet.\ttest")
    del rows[third]
    pairs = {(first, "de", "Hello there.", "Hallo."), (first, "zh", "Hello there.", "你好。")}
    return rows, pairs | {(second, "de", 'He said "no', "Nein.")}


def europarl_st(root: Path, ending: str = ".flac") -> tuple[dict[str, dict], set]:
    """Of two segments German has both, French one; Romanian is none of the ten languages."""
    rows, speech = {}, "en.20080925.26.4-036"
    audio = f"en/audios/{speech}{ending}"
    if ending == ".m4a":
        write(root / audio, "not for libsndfile")
    else:
        tone(root / audio, 4.0)
    texts = [("0.5", "1.25", "Thank you."), ("1.25", "2.5", "We vote.")]
    for start, end, text in texts:
        name = f"{speech}-{float(start) * 1000:.0f}-{float(end) * 1000:.0f}"
        times = {"start_s": float(start), "end_s": float(end)}
        rows |= row(name, audio, text, times["end_s"] - times["start_s"], **times)
    for target, said in (("de", ["Danke.", "Wir wählen."]), ("fr", ["Merci."]), ("ro", ["Da."])):
        folder = root / "en" / target / "test"
        here = texts[: len(said)]
        write(folder / "segments.lst", *(f"{speech} {start} {end}" for start, end, _ in here))
        write(folder / "segments.en", *(text for *_, text in here))
        write(folder / f"segments.{target}", *said)
    one, two = rows
    pairs = {(one, "de", "Thank you.", "Danke."), (two, "de", "We vote.", "Wir wählen.")}
    return rows, pairs | {(one, "fr", "Thank you.", "Merci.")}


def audio_bytes(seconds: float) -> bytes:
    """A WAV file of so much silence, in memory."""
    memory = io.BytesIO()
    soundfile.write(memory, np.zeros(round(seconds * RATE)), RATE, format="WAV")
    return memory.getvalue()


CORPORA = {
    "librispeech": librispeech,
    "mls": mls,
    "gigaspeech": gigaspeech,
    "spgispeech": spgispeech,
    "voxpopuli": voxpopuli,
    "fleurs": fleurs,
    "common_voice": common_voice,
    "covost2": covost2,
    "europarl_st": europarl_st,
}
