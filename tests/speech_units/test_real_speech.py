"""The whole stage on recorded speech, which is fetched: nothing of it is in this repo.

Debian's asterisk-core-sounds-en-wav: 25 minutes of prompts of one speaker, at 8 kHz, with their texts (CC BY-SA 3.0).
pocketsphinx's sources: five sentences of LibriVox, which a recogniser has aligned with their phones.
"""

import ctypes
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import AutoTokenizer

from data_mixture.build_mixture import Source, build_mixture
from speech_units.fit_kmeans import fit_kmeans
from speech_units.kmeans_report import kmeans_report
from speech_units.label_audio import label_audio
from speech_units.make_manifest import make_manifest
from tests.speech_units.test_speech_units import small_encoder
from towerspeech import prompts
from towerspeech.errors import UserError
from towerspeech.indexed import IndexedTokens
from towerspeech.records import read_jsonl
from towerspeech.units import to_text
from towerspeech.units_parquet import read_units
from train_bpe_tokenizer.merge_tokenizer import merge_tokenizer
from train_bpe_tokenizer.train_bpe import train_bpe

NUM_UNITS = 100
LOUD = 0.01  # speech begins and ends at samples above it
PHONES_IPA, SEPARATOR = 2, "_"  # eSpeak's phoneme mode

pytestmark = pytest.mark.slow


def fetch(folder: Path, *command: str) -> None:
    if os.environ.get("CI"):
        why = "in CI"
    elif not shutil.which(command[0]) or (command[0] == "apt-get" and os.geteuid()):
        why = f"without {command[0]}, as root"
    else:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if not ran.returncode:
            return
        why = f"{' '.join(command[:3])} ended with {ran.stderr[-200:]!r}"
    pytest.skip(f"{why}: recorded speech is not fetched")


def phones_of(text: str) -> list[str]:
    """The phones that eSpeak NG would say, in IPA without marks of stress and length."""
    from tiny.make_data import espeak

    library, _ = espeak()
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    library.espeak_SetVoiceByName(b"en-us")
    left, said = ctypes.c_char_p(text.encode()), []
    while left.value:  # a clause at a time
        part = library.espeak_TextToPhonemes(ctypes.byref(left), 1, ord(SEPARATOR) << 8 | PHONES_IPA)
        said += part.decode().replace(" ", SEPARATOR).split(SEPARATOR)
    return [phone for phone in (one.strip("ˈˌːˑ'") for one in said) if phone]


def spread(text: str, samples: np.ndarray, rate: int) -> list[list]:
    """An utterance's phones, one after another, all of one length, from where it gets loud to where it is last loud.

    As crude as can be: a vowel may last far longer than a stop, and pauses inside count as phones.
    """
    loud = np.flatnonzero(np.abs(samples) > LOUD)
    names = phones_of(text)
    edges = np.linspace(loud[0], loud[-1], len(names) + 1) / rate
    return [[name, *edges[n : n + 2].round(4).tolist()] for n, name in enumerate(names)]


def kaldi(folder: Path, rows: list[tuple[str, Path, str]]) -> Path:
    folder.mkdir()
    rows = sorted(rows)
    (folder / "wav.scp").write_text("".join(f"{name} {path}\n" for name, path, _ in rows))
    (folder / "text").write_text("".join(f"{name} {text}\n" for name, _, text in rows))
    return folder


@pytest.fixture(scope="module")
def asterisk(tmp_path_factory) -> Path:
    """wav.scp and text of the prompts: a fifth in dev, the others in train."""
    root = tmp_path_factory.mktemp("asterisk")
    packages = ("asterisk-core-sounds-en-wav", "asterisk-core-sounds-en-g722", "asterisk-core-sounds-en")
    fetch(root, "apt-get", "download", "-o", "APT::Sandbox::User=root", *packages)
    for package in root.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, root / "all"], check=True)
    folder = next(root.glob("all/usr/share/asterisk/sounds/*"))
    texts = gzip.decompress((root / "all/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").read_bytes())
    rows = []
    for line in texts.decode().splitlines():
        name, colon, text = line.partition(": ")
        path = folder / f"{name}.wav"
        if colon and path.exists() and any(letter.isalpha() for letter in text) and text[0] not in "[(":
            rows.append((name.replace("/", "-"), path, " ".join(text.split())))
    assert len(rows) > 500
    kaldi(root / "dev", rows[::5])
    kaldi(root / "train", [row for number, row in enumerate(rows) if number % 5])
    return root


@pytest.fixture(scope="module")
def librivox(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("librivox")
    words = ("download", "--no-deps", "--no-binary", ":all:", "pocketsphinx==5.1.1")
    fetch(root, sys.executable, "-m", "pip", *words)
    subprocess.run(["tar", "xzf", next(root.glob("*.tar.gz"))], cwd=root, check=True)
    return next(root.glob("*/test/data/librivox"))


@pytest.fixture(scope="module")
def units(asterisk, tmp_path_factory) -> Path:
    """Manifests, k-means on MFCC and on a HuBERT that has learned nothing, and the units of MFCC."""
    root = tmp_path_factory.mktemp("units")
    for part in ("train", "dev"):
        make_manifest(root / part, kaldi=asterisk / part, root=asterisk, max_bad_share=0.02)
    encoder = small_encoder(root / "hubert", "hubert", True, hidden_size=256, intermediate_size=512)
    for name, features in (("mfcc", {"features": "mfcc"}), ("hubert", {"encoder": str(encoder), "layer": 3})):
        fit_kmeans([root / "train/manifest.jsonl"], [asterisk], root / f"k_{name}", num_units=NUM_UNITS, **features)
    label_audio(root / "train/manifest.jsonl", asterisk, root / "k_mfcc", root / "units", num_shards=2)
    return root


def test_prompts_become_units_bpe_and_a_mixture(units, base_model_dir):
    rows = list(read_units(units / "units"))
    seconds = sum(row["duration_s"] for row in rows)
    assert len(rows) > 400 and 900 < seconds < 1500
    assert 20 < sum(len(row["units"]) for row in rows) / seconds < 45  # a second
    assert len({unit for row in rows for unit in row["units"]}) == NUM_UNITS
    train_bpe([units / "units"], NUM_UNITS, units / "bpe", vocab_size=NUM_UNITS + 200)
    merge_tokenizer(base_model_dir, units / "bpe", units / "tokenizer")
    source = Source("speech", "speech", [str(units / "units")], 5_000)
    build_mixture(units / "tokenizer", units / "mixture", [source], reserve=1e6, validation_tokens=0)
    tokenizer = AutoTokenizer.from_pretrained(units / "tokenizer")
    found = IndexedTokens(next(units.glob("mixture/*.idx")).with_suffix(""))
    texts = {prompts.speech_document(to_text(row["units"]), row["text"]) for row in rows}
    documents = [found.tokens[first : first + size] for first, size in zip(found.offsets, found.sizes, strict=True)]
    assert {tokenizer.decode(document[:-1]) for document in documents} == texts  # the last token is <EOD>


def report(units: Path, audio_root: Path, manifest: Path, name: str, phones: Path, output: str) -> dict:
    kmeans_report(manifest, audio_root, units / f"k_{name}", units / output, phones=phones)
    return json.loads((units / output / "report.json").read_text())


def test_the_report_tells_which_encoder_hears(units, asterisk):
    """Phones are crudely placed (``spread``), and yet MFCC's units know more of them than untrained HuBERT's."""
    rows = read_jsonl(units / "dev/manifest.jsonl")
    with open(units / "phones.jsonl", "w") as file:
        for row in rows:
            samples, rate = soundfile.read(asterisk / row["audio"])
            file.write(json.dumps({"id": row["id"], "phones": spread(row["text"], samples, rate)}) + "\n")
    found = {
        name: report(units, asterisk, units / "dev/manifest.jsonl", name, units / "phones.jsonl", f"report_{name}")
        for name in ("mfcc", "hubert")
    }
    print(found)
    assert found["mfcc"]["phones"] > 30 and found["mfcc"]["frames_with_phone"] > 10_000
    assert found["mfcc"]["pnmi"] > 1.15 * found["hubert"]["pnmi"]
    assert found["mfcc"]["phone_purity"] > found["hubert"]["phone_purity"]


def test_aligned_phones_confirm_it(units, librivox):
    """Sentences of another speaker, and phones where a recogniser heard them."""
    sentences = [path.with_suffix("").with_suffix("") for path in sorted(librivox.glob("*.phone.json"))]
    rows = [(path.name, path.with_suffix(".wav"), path.with_suffix(".txt").read_text().strip()) for path in sentences]
    make_manifest(units / "librivox", kaldi=kaldi(units / "librivox_kaldi", rows), root=librivox)
    with open(units / "aligned.jsonl", "w") as aligned, open(units / "spread.jsonl", "w") as crude:
        for name, path, text in rows:
            words = json.loads(path.with_suffix("").with_suffix(".phone.json").read_text())["w"]
            phones = [[p["t"], p["b"], round(p["b"] + p["d"], 4)] for word in words for p in word["w"]]
            aligned.write(json.dumps({"id": name, "phones": phones}) + "\n")
            crude.write(json.dumps({"id": name, "phones": spread(text, *soundfile.read(path))}) + "\n")
    found = {
        (name, how): report(
            units, librivox, units / "librivox/manifest.jsonl", name, units / f"{how}.jsonl", f"{how}_{name}"
        )
        for name in ("mfcc", "hubert")
        for how in ("aligned", "spread")
    }
    print(found)
    pnmi = {key: figures["pnmi"] for key, figures in found.items()}
    assert pnmi["mfcc", "aligned"] > 1.15 * pnmi["hubert", "aligned"]
    # 100 units tell much of 44 phones in 1,200 frames by chance: spread phones say nothing of the encoder here.
    assert pnmi["mfcc", "aligned"] > 1.3 * pnmi["mfcc", "spread"]


def test_raw_g722_is_refused_by_name(units, asterisk, tmp_path):
    """The other package holds G.722 without a header, which libsndfile does not read."""
    paths = sorted(asterisk.rglob("*.g722"))
    assert len(paths) > 500
    rows = [{"id": p.stem + str(n), "audio": str(p.relative_to(asterisk))} for n, p in enumerate(paths)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row | {"language": "en", "text": ""}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"g722 is not readable audio .*\n.*more than --max_bad_share"):
        label_audio(manifest, asterisk, units / "k_mfcc", tmp_path / "o")
