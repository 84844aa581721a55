"""Where test sets come from: the hub's form, sacreBLEU's downloader, TowerEval's folders."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

from instructions import build_instructions as command
from instructions import read_test_sets as script
from towerspeech import records
from towerspeech.errors import UserError

REPO = Path(__file__).resolve().parents[2]
DATA = os.environ.get("TOWERSPEECH_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="TOWERSPEECH_TEST_DATA is not set")


def build_instructions(*flags, **named_flags) -> None:
    command.build_instructions(command.Request(*flags, **named_flags))


# --- FLORES in the hub's form ---------------------------------------------------------------------
def write_hub(root: Path, column: str, codes: list[str], splits=("dev", "devtest"), **ids) -> Path:
    """A dataset folder as openlanguagedata/flores_plus is: a configuration a language, listed in README.md."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    listed = []
    for code in codes:
        listed.append(f"- config_name: {code}\n  data_files:\n")
        for split in splits:
            (root / split).mkdir(parents=True, exist_ok=True)
            numbers = ids.get(code, list(range(12)))
            columns = {"id": numbers, "topic": ["x"] * 12, column: [f"{code} {split} {i}" for i in range(12)]}
            pq.write_table(pa.table(columns), root / split / f"{code}.parquet")
            listed.append(f"  - split: {split}\n    path: {split}/{code}.parquet\n")
    (root / "README.md").write_text(f"---\nconfigs:\n{''.join(listed)}---\n# FLORES\n")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")


@pytest.mark.parametrize(("column", "chinese"), [("text", "cmn_Hans"), ("sentence", "zho_Hans")])
def test_flores_in_the_hubs_form_equals_the_official_layout(tmp_path, column, chinese):
    """Both column names, and both codes of Chinese: FLORES+'s and FLORES-200's."""
    codes = {"de": "deu_Latn", "en": "eng_Latn", "zh": chinese}
    hub = write_hub(tmp_path / "hub", column, list(codes.values()))
    for split in ("dev", "devtest"):
        (tmp_path / "official" / split).mkdir(parents=True)
        for code, name in (("deu_Latn", "deu_Latn"), ("eng_Latn", "eng_Latn"), ("zho_Hans", chinese)):
            lines = "".join(f"{name} {split} {i}\n" for i in range(12))
            (tmp_path / "official" / split / f"{code}.{split}").write_text(lines)
    for name, root in (("a", hub), ("b", tmp_path / "official")):
        for shots in (0, 5):
            build_instructions(tmp_path / name, "flores200", root, shots=shots)
    for folder in ("0_shot", "5_shot"):
        names = sorted(path.name for path in (tmp_path / "b" / folder).glob("*[a-z].jsonl"))
        assert names == [f"flores_{pair}.jsonl" for pair in ("de-en", "en-de", "en-zh", "zh-en")]
        for file in names:
            assert (tmp_path / "a" / folder / file).read_bytes() == (tmp_path / "b" / folder / file).read_bytes()


def test_a_hub_dataset_is_known_by_its_content(tmp_path, capsys):
    codes = ["deu_Latn", "eng_Latn"]
    root, out = write_hub(tmp_path / "hub", "text", codes), tmp_path / "out"
    build_instructions(out, "flores200", root, pairs="de-en")
    build_instructions(out, "flores200", root, pairs="de-en")
    assert "already done" in capsys.readouterr().out
    script.hub.cache_clear()
    write_hub(root, "sentence", codes)
    build_instructions(out, "flores200", root, pairs="de-en")
    assert "already done" in capsys.readouterr().out  # the same text
    info = json.loads((out / "0_shot/flores_de-en.run_info.json").read_text())
    assert len(info["arguments"]["data_sha256"]) == 64 and info["inputs"]["data"] == []
    other = write_hub(tmp_path / "other", "text", codes, splits=["devtest"])
    for path in other.glob("devtest/*.parquet"):
        path.unlink()
    write_hub(other, "text", ["fra_Latn", "eng_Latn"], splits=["devtest"])
    build_instructions(tmp_path / "new", "flores200", other, pairs="fr-en")
    with pytest.raises(UserError, match=r"no examples for fr-en: .* has no split dev of fra_Latn, but devtest\n"):
        build_instructions(tmp_path / "new", "flores200", other, pairs="fr-en", shots=5)
    with pytest.raises(UserError, match="has no configuration deu_Latn"):
        build_instructions(tmp_path / "new", "flores200", other, pairs="de-en")
    cut = {"example_split": "devtest", "test_lines": "1-3", "shots": 5}
    with pytest.raises(UserError, match="fra_Latn devtest:3 is a test sentence"):
        build_instructions(tmp_path / "new", "flores200", other, pairs="fr-en", **cut, example_lines="3-9")
    build_instructions(tmp_path / "new", "flores200", other, pairs="fr-en", **cut, example_lines="4-9")


def test_bad_hub_datasets(tmp_path):
    root = write_hub(tmp_path / "a", "text", ["deu_Latn", "eng_Latn"], deu_Latn=list(range(1, 13)))
    with pytest.raises(UserError, match="deu_Latn and eng_Latn differ in ids"):
        build_instructions(tmp_path / "out", "flores200", root, pairs="de-en")
    root = write_hub(tmp_path / "b", "words", ["deu_Latn", "eng_Latn"])
    with pytest.raises(UserError, match="columns id, topic, words"):
        build_instructions(tmp_path / "out", "flores200", root, pairs="de-en")
    with pytest.raises(
        UserError, match="openlanguagedata/flores_plus: the hub did not give it .*\n.*no such folder here"
    ):
        build_instructions(tmp_path / "out", "flores200", Path("openlanguagedata/flores_plus"))  # offline in tests
    assert not (tmp_path / "out").exists()


# --- WMT23 through sacreBLEU ----------------------------------------------------------------------
def write_sacrebleu_cache(cache: Path, texts: dict[str, tuple[list[str], list[str]]]) -> Path:
    """What sacreBLEU's download of wmt23 leaves: the archive, and WMT's XML files unpacked beside it.

    Each XML has a second reference, a system and a test suite, which are not to be taken.
    """
    raw = cache / "wmt23/raw"
    folder = raw / "wmt23-news-systems-v.0.1/xml"
    folder.mkdir(parents=True)
    for pair, (sources, references) in texts.items():
        src, tgt = pair.split("-")

        def block(tag: str, lines: list[str], **attributes) -> str:
            segments = "".join(f'<seg id="{i}">{escape(line)}</seg>\n' for i, line in enumerate(lines, 1))
            named = "".join(f" {key}={quoteattr(value)}" for key, value in attributes.items())
            return f"<{tag}{named}><p>\n{segments}</p></{tag}>\n"

        body = (
            block("src", sources, lang=src)
            + block("ref", references, lang=tgt, translator="refA")
            + block("ref", [f"B {line}" for line in references], lang=tgt, translator="refB")
            + block("hyp", [f"H {line}" for line in references], lang=tgt, system="online-A")
        )
        suite = block("src", ["suite"], lang=src) + block("ref", ["suite"], lang=tgt, translator="refA")
        (folder / f"wmttest2023.{pair}.all.xml").write_text(
            f'<?xml version="1.0" encoding="utf-8"?>\n<dataset id="wmttest2023.{pair}">\n'
            f'<doc id="d1" origlang="{src}" domain="news">\n{body}</doc>\n'
            f'<doc id="d2" origlang="{src}" testsuite="x">\n{suite}</doc>\n</dataset>\n',
            encoding="utf-8",
        )
    with tarfile.open(raw / "wmt23.v.0.1.tar.gz", "w:gz") as archive:
        archive.add(folder.parent, folder.parent.name)
    return cache


def run_script(*arguments, **environment) -> subprocess.CompletedProcess:
    """sacreBLEU looks for its folder when it is imported, so the script runs by itself."""
    words = [sys.executable, REPO / "instructions/build_instructions.py", *map(str, arguments)]
    offline = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **offline, **environment})


def test_wmt23_through_sacrebleu(tmp_path):
    texts = ["Erster  Satz & mehr.", "Zweiter Satz."], ["First sentence & more.", "Second sentence."]
    cache = write_sacrebleu_cache(tmp_path / "sacrebleu", {"de-en": texts, "en-de": texts[::-1]})
    build = ["--test_set", "wmt23", "--pairs", "de-en,en-de", "--output_dir", tmp_path / "out"]
    found = run_script(*build, SACREBLEU=str(cache))
    assert found.returncode == 0, found.stderr
    rows = records.read_jsonl(tmp_path / "out/0_shot/wmt23_de-en.jsonl")
    for field, key in (("src", "source"), ("ref:refA", "output")):
        command = [sys.executable, "-m", "sacrebleu", "-t", "wmt23", "-l", "de-en", "--echo", field]
        echo = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "SACREBLEU": str(cache)})
        assert [row[key] for row in rows] == echo.stdout.splitlines()
    assert rows[0]["source"] == "Erster Satz & mehr."  # sacreBLEU makes one space of two
    again = run_script(*build, SACREBLEU=str(cache))
    assert again.stdout.count("already done") == 2


@needs_data
def test_wmt23_through_sacrebleu_equals_the_plain_files(tmp_path):
    """All 6 pairs of the real data: byte for byte but for lines with runs of white space."""
    plain = Path(DATA) / "wmt23"
    texts = {
        pair: tuple(records.read_lines(file) for file in script.wmt23_files(plain, pair))
        for pair in script.WMT23_PAIRS
    }
    cache = write_sacrebleu_cache(tmp_path / "sacrebleu", texts)
    found = run_script("--test_set", "wmt23", "--output_dir", tmp_path / "a", SACREBLEU=str(cache))
    assert found.returncode == 0, found.stderr
    build_instructions(tmp_path / "b", "wmt23", plain)
    differing = {}
    for pair in script.WMT23_PAIRS:
        ours, theirs = ((tmp_path / x / f"0_shot/wmt23_{pair}.jsonl").read_text().split("\n") for x in "ba")
        assert len(ours) == len(theirs)
        changed = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
        differing[pair] = len(changed)
        for a, b in changed:
            a, b = json.loads(a), json.loads(b)
            for key in ("source", "output"):
                assert " ".join(a[key].split()) == b[key]
    assert differing == {"de-en": 0, "en-de": 0, "en-ru": 9, "en-zh": 1, "ru-en": 4, "zh-en": 52}


def test_sacrebleu_without_network_or_data_is_one_message(tmp_path):
    build = ["--test_set", "wmt23", "--pairs", "en-de", "--output_dir", tmp_path / "out"]
    found = run_script(*build, SACREBLEU=str(tmp_path / "empty"))
    assert found.returncode == 1 and found.stderr.startswith("error: sacreBLEU could not give wmt23 en-de: ")
    assert "--data_root" in found.stderr and "Traceback" not in found.stderr and not (tmp_path / "out").exists()
    found = run_script("--test_set", "flores200", "--output_dir", tmp_path / "out")
    assert found.returncode == 1 and "--test_set flores200 needs --data_root" in found.stderr


# --- TowerEval ------------------------------------------------------------------------------------
def write_towereval(root: Path, name: str, pair: str, test: list[dict], dev: list[dict] | None = None) -> None:
    folder = root / "mt" / f"{name}.{pair}"
    folder.mkdir(parents=True)
    records.write_jsonl(folder / "test.jsonl", test)
    if dev:
        records.write_jsonl(folder / "dev.jsonl", dev)


def pairs_of(split: str, lines: int = 9) -> list[dict]:
    return [{"src": f"source {split} {i}", "ref": f"reference {split} {i}"} for i in range(lines)]


def test_towereval(tmp_path):
    root = tmp_path / "raw_data"
    write_towereval(root, "flores", "en-de", pairs_of("test"), pairs_of("dev"))
    write_towereval(root, "wmt23", "en-de", pairs_of("wmt test"), pairs_of("wmt dev"))
    write_towereval(root, "wmt23", "en-uk", pairs_of("test"))  # none of the ten languages
    write_towereval(root, "tico19", "en-fr", pairs_of("tico"))
    build_instructions(tmp_path / "out", "towereval", root)
    names = sorted(path.name for path in (tmp_path / "out/0_shot").glob("*[a-z].jsonl"))
    assert names == ["flores_en-de.jsonl", "tico19_en-fr.jsonl", "wmt23_en-de.jsonl"]
    row = records.read_jsonl(tmp_path / "out/0_shot/flores_en-de.jsonl")[2]
    assert row == {
        "id": "flores_en-de:3",
        "instruction": "Translate the following English source text to German:\nEnglish: source test 2\nGerman:",
        "output": "reference test 2",
        **dict(task="mt", dataset="flores", shots=0, src_lang="en", tgt_lang="de", source="source test 2"),
    }
    build_instructions(tmp_path / "out", "towereval", root, pairs="en-de", shots=5)
    for name, gap, split in (("flores", "\n", "dev"), ("wmt23", "\n ", "wmt dev")):  # the original's separators
        for row in records.read_jsonl(tmp_path / f"out/5_shot/{name}_en-de.jsonl"):
            assert row["instruction"].count(f"{gap}English text: ") == 5
            assert row["instruction"].count(f"German text: reference {split} ") == 5
    build_instructions(tmp_path / "one", "towereval", root, dataset="wmt23")
    assert [path.name for path in (tmp_path / "one/0_shot").glob("*[a-z].jsonl")] == ["wmt23_en-de.jsonl"]
    arguments = {"dataset": "tico19", "shots": 5}
    with pytest.raises(
        UserError, match=r"no examples for en-fr: .*tico19\.en-fr/dev\.jsonl does not exist\n.*name a pool"
    ):
        build_instructions(tmp_path / "out", "towereval", root, **arguments)
    cut = {"example_split": "test", "example_lines": "4-9", "test_lines": "1-3"}
    build_instructions(tmp_path / "out", "towereval", root, **arguments, **cut)
    with pytest.raises(UserError, match=r"no such files: .*mt/tico19\.de-en/test\.jsonl\n"):
        build_instructions(tmp_path / "out", "towereval", root, pairs="de-en", dataset="tico19")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"src": "x"}, r"test\.jsonl:10: field 'ref' is missing"),
        ({"src": "x", "ref": ["y"]}, r"test\.jsonl:10: its ref is a list, but a text is wanted: \['y'\]"),
        ({"src": " ", "ref": "y"}, r"test\.jsonl:10: the line is empty"),
        ([], r"test\.jsonl:10: an object is wanted"),
    ],
)
def test_bad_towereval_rows(tmp_path, row, message):
    write_towereval(tmp_path / "raw", "flores", "en-de", [*pairs_of("test"), row])
    with pytest.raises(UserError, match=message):
        build_instructions(tmp_path / "out", "towereval", tmp_path / "raw")
    with pytest.raises(UserError, match="TowerEval's raw_data folder, which holds mt/"):
        build_instructions(tmp_path / "out", "towereval", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_towereval_dev_set_that_holds_a_test_sentence_is_refused(tmp_path):
    dev = [*pairs_of("dev"), {"src": "Source test, 4!", "ref": "x"}]
    write_towereval(tmp_path, "flores", "en-de", pairs_of("test"), dev)
    with pytest.raises(UserError, match=r"dev\.jsonl:10 is a test sentence \(.*test\.jsonl:5\)"):
        build_instructions(tmp_path / "out", "towereval", tmp_path, shots=5)
