"""Test sentences in texts: a plain search to compare with; FLORES and WMT23 from outside the repo; invented ones."""

import gzip
import json
import pickle
import random
import re
import unicodedata
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import make_sentences
from towerspeech.contamination import Hit, Sentence, TestSentences, read_test_sets
from towerspeech.errors import UserError
from towerspeech.records import write_jsonl

LONG = "Yesterday the old captain of the grey harbour ship told his three nephews a story about seven lost lanterns."
LATE = "Nobody in the valley remembers when the copper bridge fell."  # ten words
KOREAN = "어제 늙은 선장은 세 조카에게 잃어버린 등불 일곱 개에 관한 이야기를 들려주었다."
CHINESE = "昨天,老船长给他的三个侄子讲了一个关于七盏丢失的灯笼的故事,还画了一张旧港口的地图。"
CHINESE_LATE = "山谷里没有人记得那座铜桥是何时倒塌的。"  # 18 characters
FILLER = "The weather stayed calm, and the market opened at nine as on every other day"


def index(*texts: str) -> TestSentences:
    return TestSentences([Sentence("set", f"file:{number}", text) for number, text in enumerate(texts, 1)])


def how(sentences: TestSentences, text: str) -> str | None:
    (hit,) = sentences.find([text])
    return hit and hit.how


# --- A plain search, to compare with --------------------------------------------------------------
def plain(text: str) -> str:
    parts = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return unicodedata.normalize("NFC", "".join(char for char in parts if char.isalnum()))


def plain_weight(text: str) -> int:
    weights = {"CJK": 3, "HIRAGANA": 3, "KATAKANA": 3, "HANGUL": 2, "DIGIT": 0}
    return sum(weights.get(unicodedata.name(char, "").split(" ")[0], 1) for char in text)


def plain_parts(text: str) -> list[str]:
    """What is between line breaks and punctuation other than commas."""
    parts = [""]
    for char in unicodedata.normalize("NFC", text):
        category = unicodedata.category(char)
        if not plain(char) and char not in ",،、，﹐､" and (category[0] in "PS" or category in ("Cc", "Zl", "Zp")):
            parts.append("")
        else:
            parts[-1] += char
    return [plain(part) for part in parts]


def plain_patterns(text: str) -> tuple[set[str], str]:
    """The 13-grams of a sentence (else the whole), and where they count: anywhere, between breaks, as a whole text."""
    words = []  # with half their lengths
    for word in re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\s\u3040-\u30ff\u4e00-\u9fff]+", text):
        if plain(word):
            words.append((plain(word), 1 if "\u3040" <= word <= "\u9fff" else 2))
    found = set()
    for first in range(len(words)):
        for last in range(first + 1, len(words) + 1):
            if sum(half for _, half in words[first:last]) >= 26:
                found.add("".join(word for word, _ in words[first:last]))
                break
    found = {gram for gram in found if plain_weight(gram) >= 28}
    if found:
        return found, "anywhere"
    weight, halves = plain_weight(plain(text)), sum(half for _, half in words)
    if weight >= 28 and halves >= 10:
        return {plain(text)}, "anywhere"
    return {plain(text)}, "between breaks" if weight >= 12 and halves >= 4 else "whole text"


def is_plain_hit(patterns: list[tuple[set[str], str]], text: str) -> bool:
    whole, parts = plain(text), plain_parts(text)
    runs = {"".join(parts[first:last]) for first in range(len(parts)) for last in range(first + 1, len(parts) + 1)}
    for grams, where in patterns:
        if where == "anywhere" and any(gram in whole for gram in grams):
            return True
        if where == "between breaks" and grams & runs or where == "whole text" and grams & ({whole} - {""}):
            return True
    return False


def fragments(generator: random.Random, sentences: list[str]) -> str:
    """Parts of sentences in a row, some whole, in any case, with other spacing and punctuation."""
    parts = []
    for _ in range(generator.randint(1, 4)):
        sentence = generator.choice(sentences)
        if generator.random() < 0.9:
            a, b = sorted(generator.randrange(len(sentence) + 1) for _ in "ab")
            sentence = sentence[a:b] if generator.random() < 0.5 else sentence[a:]
        parts.append(generator.choice((str, str.upper, str.lower, str.title))(sentence))
    return generator.choice((" ", "", "\n", " – ", "«", " x ", ", ", "。")).join(parts)


def check_against_plain_search(sentences: list[str], texts: list[str]) -> None:
    patterns = [plain_patterns(sentence) for sentence in sentences]
    wanted = [is_plain_hit(patterns, text) for text in texts]
    assert [hit is not None for hit in index(*sentences).find(texts)] == wanted
    assert len(texts) / 10 < sum(wanted) < len(texts) * 9 / 10  # of both kinds


def test_random_texts_are_hits_where_a_plain_search_finds_one():
    generator = random.Random(0)
    invented = [
        LONG,
        LATE,
        KOREAN,
        CHINESE,
        CHINESE_LATE,
        "Thank you.",
        "谢谢你。",
        "老地方见!",
        "The perfect size.",
        "Так и есть, мой друг?",
        "다음에 또 만나요.",
        "12, 13, 14!",
        "--",
        "Straße ½ ﬁn.",
    ]
    words = re.split(" ", "und der die 7 von einer Straße Maß ½ la niñez à l’été ёж мой 2024 мир 서울 사람 中 国")
    for _ in range(60):
        invented.append(" ".join(generator.choice(words) for _ in range(generator.randint(1, 22))))
    check_against_plain_search(invented, [fragments(generator, invented) for _ in range(1500)])


def test_random_texts_of_real_sentences_are_hits_where_a_plain_search_finds_one(test_data):
    generator = random.Random(1)
    lines = [line for _, line in real_lines(test_data)]
    sentences = generator.sample(lines, 150)
    check_against_plain_search(sentences, [fragments(generator, sentences) for _ in range(500)])


# --- Real test sets -------------------------------------------------------------------------------
def real_lines(root: Path) -> list[tuple[str, str]]:
    files = [*sorted(root.glob("flores200/devtest/*.devtest")), *sorted(root.glob("wmt23/generaltest2023.*"))]
    return [(path.name, line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def real(test_data) -> TestSentences:
    names = {"flores200": [f"{test_data}/flores200/devtest"], "wmt23": [f"{test_data}/wmt23/generaltest2023.*"]}
    return TestSentences(read_test_sets(names))


def disguise(generator: random.Random, text: str) -> str:
    """Other case, quotes, punctuation and spacing; accents and Korean syllables in parts; wide characters."""
    text = generator.choice((str, str.upper, str.lower, str.title))(text)
    text = generator.choice((text, unicodedata.normalize("NFD", text)))
    text = re.sub(r"[ ]+", lambda _: generator.choice((" ", "  ", "\n", "\u00a0", "\u3000", " – ", "")), text)
    text = re.sub(r"[\"'„“”«»’‘]", lambda _: generator.choice("\"'„“”«»’‘"), text)
    text = re.sub(r"[.,;:!?。,、]", lambda _: generator.choice(("", "…", "!", ". ", "\u200b", "_")), text)
    wide = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
    return f"„{text if generator.random() < 0.9 else text.translate(wide)}“"


def test_200_planted_sentences_are_found(test_data, real):
    generator = random.Random(0)
    lines = real_lines(test_data)
    planted = [(name, line) for name, line in generator.sample(lines, 210)]
    planted = [(name, line) for name, line in planted if plain_patterns(line)[1] != "whole text"][:200]
    assert len(planted) == 200 and len({name for name, _ in planted}) > 15
    texts = [
        f"{FILLER} {generator.randrange(99)}{disguise(generator, line)}\n{FILLER}, {generator.randrange(99)}."
        for _, line in planted
    ]
    hits = real.find(texts)
    assert [line for (_, line), hit in zip(planted, hits, strict=True) if hit is None] == []
    for (name, line), hit in zip(planted, hits, strict=True):
        if hit.how != "13-gram":
            path, _, number = hit.where.rpartition(":")
            found = Path(path).read_text(encoding="utf-8").split("\n")[int(number) - 1]
            assert plain(found) in plain(line) and (plain(found) == plain(line) or name != Path(path).name)
    assert sum(hit.how == "sentence" for hit in hits) > 150
    assert sum(hit.how == "short sentence" for hit in hits) > 5


def test_few_real_sentences_are_too_short_to_be_found_inside_a_text(test_data):
    places = [plain_patterns(line)[1] for _, line in random.Random(0).sample(real_lines(test_data), 1500)]
    assert 0.001 < places.count("whole text") / len(places) < 0.01
    assert 0.02 < places.count("between breaks") / len(places) < 0.12


def test_sentences_of_one_set_are_clean_of_the_other(test_data):
    """News, reviews and chats of 2023 beside Wikinews of years before."""
    flores = TestSentences(read_test_sets({"flores200": [f"{test_data}/flores200"]}))
    lines = [line for name, line in real_lines(test_data) if name.startswith("generaltest2023")]
    assert len(lines) > 15_000
    assert sum(hit is not None for hit in flores.find(lines)) <= 1


# --- What is a hit, and what is not ---------------------------------------------------------------
def test_a_sentence_is_found_whatever_its_case_spacing_and_punctuation():
    sentences = index(
        LATE, KOREAN, CHINESE_LATE, "Die große Straße führt am Café vorbei, und ½ Meile weiter zum Fluß."
    )
    for text, number in (
        (f"{FILLER}: NOBODY in-the Valley remembers… when the (copper) bridge fell?! {FILLER}", 1),
        (f"{FILLER}{unicodedata.normalize('NFD', KOREAN)}", 2),
        (f"{FILLER}{KOREAN.replace(' ', '')}{FILLER}", 2),
        (f"好的。{' '.join(CHINESE_LATE)}好的。", 3),
        ("DIE GROSSE STRASSE FÜHRT AM CAFE VORBEI UND 1/2 MEILE WEITER ZUM FLUSS", 4),
    ):
        assert sentences.find([text]) == [Hit("set", f"file:{number}", "sentence")], text


def test_13_words_are_a_hit_and_12_are_not():
    sentences, words = index(LONG, CHINESE), LONG.split()
    for first in range(len(words) - 12):
        assert how(sentences, f"{FILLER} {' '.join(words[first : first + 13])} {FILLER}") == "13-gram"
    for first in range(len(words) - 11):
        assert how(sentences, f"{FILLER} {' '.join(words[first : first + 12])} {FILLER}") is None
    characters = re.sub("[,。]", "", CHINESE)
    for first in range(len(characters) - 25):
        assert how(sentences, f"好{characters[first : first + 26]}好") == "13-gram"
    for first in range(len(characters) - 24):
        assert how(sentences, f"好{characters[first : first + 25]}好") is None


def test_a_changed_word_is_a_hit_only_beside_13_others():
    words = LONG.split()
    for changed in range(len(words)):
        text = " ".join([*words[:changed], "else", *words[changed + 1 :]])
        assert how(index(LONG), text) == ("13-gram" if max(changed, len(words) - changed - 1) >= 13 else None)
    assert how(index(LATE), LATE.replace("copper", "wooden")) is None


@pytest.mark.parametrize(
    "short",
    [
        "Thank you.",
        "Geschwindigkeitsbegrenzung!",
        "abcdef ghijk",
        "https://example.org/a-very-long-address/of-some-page/that-many-name.html",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26",
        "谢谢你。",
        "고맙습니다.",
        "또 만나요.",
    ],
)
def test_a_short_sentence_is_a_hit_only_as_the_whole_text(short):
    sentences = index(LONG, short)
    assert sentences.find([f"  «{short.upper()}»\n"]) == [Hit("set", "file:2", "whole text")]
    inside = (
        f"{short} {FILLER}",
        f"{FILLER} {short}",
        f"{short} a",
        f"{short} {short}",
        f"{FILLER}.\n«{short}»\n{FILLER}",
    )
    assert sentences.find(inside) == [None] * 5


SHORT = [
    "The perfect size.",
    "abcdef ghijkl",
    "„Wer, bitte sehr, war das?“",
    "Это был наш ёжик!",
    "다음에 또 만나요.",
    "老地方见",
]
SHORT += ["中华人民共和国政府", "The United States of America", "One, 2, 3, 4, 5, 6, 7, 8, 9: here we go now"]


@pytest.mark.parametrize("short", SHORT)
def test_a_short_sentence_is_a_hit_between_two_breaks(short):
    sentences, bare = index(LONG, short), short.strip("„“.?!")
    for before, behind in (
        *("\n\n", "\u2028\r", "\t\t", "()", "„“", "''", "。！", "?…", "–-", "__", "|♪"),
        *((".  ", "  ."), (": ", ' "'), ("\n - ", "\n - ")),
    ):
        for text in (
            f"{FILLER}{before}{bare}{behind}{FILLER}",
            f"{bare.upper()}{behind}好 {FILLER}",
            f"好{before}{bare}",
        ):
            assert sentences.find([text]) == [Hit("set", "file:2", "short sentence")], text
    for before, behind in (
        " .",
        ". ",
        ", ",
        " ,",
        "、.",
        ".，",
        "﹐.",
        "x.",
        ".x",
        "好.",
        ".好",
        "\u200b.",
        ".\u00a0",
    ):
        assert how(sentences, f"{FILLER}{before}{bare}{behind}{FILLER}") is None, (before, behind)
    assert how(sentences, f"{FILLER}.{bare[:-1]}.{FILLER}") is None
    assert how(sentences, f"{FILLER}.{bare[:-1]}x.{FILLER}") is None


@pytest.mark.parametrize("short", SHORT)
def test_the_breaks_of_a_short_sentence_are_those_of_its_text(short):
    """One that has none beside it hides no other; breaks and expanding characters elsewhere do not shift it."""
    sentences, bare = index(short), short.strip("„“.?!")
    many = "½ ß ﬁ - e\u0301 \u1112\u1161\u11ab?! … " * 40
    assert how(sentences, f"{bare} and {bare}, {bare} {FILLER} ({bare})") == "short sentence"
    assert how(sentences, f"{many}{bare}. {many}") == how(sentences, f"{many} x. {bare}. x") == "short sentence"
    assert how(sentences, f"{many}x {bare}. {many}") is how(sentences, f"{many}.{bare} ½. x") is None
    assert how(sentences, short) == "whole text"
    assert how(index(LONG, bare), f"{bare}. {LONG}") == "sentence"
    hit = Hit("set", "file:1", "short sentence")
    assert sentences.find([f"a. {bare}", "b", f"a {bare}", "b", f"{bare}. b", f"{bare} b"]) == [
        hit,
        None,
        None,
        None,
        hit,
        None,
    ]
    assert sentences.find([f"{many}.{bare[: len(bare) // 2]}", f"{bare[len(bare) // 2 :]}. b"]) == [None, None]


def test_sentences_of_nothing_are_in_no_text():
    for sentences in (index(), index("", " ", "...", "!?")):
        assert sentences.find(["", " ", "...", FILLER, LONG]) == [None] * 5
        assert sentences.find([]) == []


def test_a_sentence_is_not_put_together_from_two_texts():
    half = len(LATE) // 2
    texts = [LATE[:half], LATE[half:], "Thank", "you", CHINESE_LATE[:9], CHINESE_LATE[9:]]
    assert index(LATE, "Thank you", CHINESE_LATE).find(texts) == [None] * 6


def test_a_13_gram_is_not_put_together_from_two_sentences():
    half = LONG.split()[:9], LONG.split()[9:]
    assert how(index(*map(" ".join, half)), LONG) == "sentence"  # each is one by itself
    assert how(index("a " + " ".join(half[0]), " ".join(half[1]) + " z"), LONG) is None


def test_texts_of_any_number_and_length_each_have_their_own_hit():
    generator = random.Random(0)
    clean = make_sentences(3000)
    sentences = [LONG, LATE, KOREAN, CHINESE, CHINESE_LATE]
    texts, wanted = [], []
    for _ in range(400):
        parts = generator.sample(clean, generator.choice((0, 1, 5, 3000)) if generator.random() < 0.2 else 2)
        number = generator.randrange(3 * len(sentences))
        if number < len(sentences):
            parts.insert(generator.randint(0, len(parts)), sentences[number])
        wanted.append(Hit("set", f"file:{number + 1}", "sentence") if number < len(sentences) else None)
        texts.append(" ".join(parts))
    assert sum(map(len, texts)) > 1_000_000
    found = index(*sentences)
    assert found.find(texts) == wanted
    assert pickle.loads(pickle.dumps(found)).find(texts) == wanted


def test_many_sentences_with_the_same_beginning_and_end():
    """Their common parts anchor none of them, as long as they have others."""
    sentences = [f"Ladies and gentlemen, thank you for {i} very much and good night to you all." for i in range(300)]
    names = [f"Ladies and gentlemen, thank you for {chr(97 + i % 26)}{i} very much and good night" for i in range(300)]
    found = index(*sentences, *names)
    assert [hit.where for hit in found.find(sentences + names)] == [f"file:{i + 1}" for i in range(600)]


# --- Reading --------------------------------------------------------------------------------------
def texts_read(*names: str | Path) -> list[str]:
    return [sentence.text for sentence in read_test_sets({"set": list(names)})]


def test_plain_text_is_a_sentence_a_line_whatever_its_ending(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "deu_Latn.devtest").write_bytes(b"\xef\xbb\xbfeins\r\n\n  \nzwei\r\n")
    (tmp_path / "generaltest2023.de-en.src.de").write_text("drei\u2028vier\nzwei\n")
    (tmp_path / "sub/prompts").write_text("fünf")
    (tmp_path / "sub/lines.txt.gz").write_bytes(gzip.compress(b"sechs\n"))
    (tmp_path / "sub/lines.de.zst").write_bytes(pa.compress(b"sieben\n", codec="zstd", asbytes=True))
    (tmp_path / ".hidden").write_text("hidden\n")
    (tmp_path / "README.md").write_text("a note\n")
    assert read_test_sets({"a": [tmp_path / "deu_Latn.devtest"], "b": [f"{tmp_path}/*.src.*", tmp_path]}) == [
        Sentence("a", f"{tmp_path}/deu_Latn.devtest:1", "eins"),
        Sentence("a", f"{tmp_path}/deu_Latn.devtest:4", "zwei"),
        Sentence("b", f"{tmp_path}/generaltest2023.de-en.src.de:1", "drei\u2028vier"),
        Sentence("b", f"{tmp_path}/sub/lines.de.zst:1", "sieben"),
        Sentence("b", f"{tmp_path}/sub/lines.txt.gz:1", "sechs"),
        Sentence("b", f"{tmp_path}/sub/prompts:1", "fünf"),
    ]


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"id": "1", "audio": "a.wav", "text": "one", "duration_s": 1.0, "sentence_id": "one of a reader"}, ["one"]),
        ({"id": "1", "src_lang": "en", "tgt_lang": "de", "source": "one", "target": "eins"}, ["one", "eins"]),
        ({"src": "one", "ref": "eins", "mt": "a system's"}, ["one", "eins"]),
        ({"instruction": "Translate: one", "source": "one", "output": "eins"}, ["one", "eins"]),
        ({"source": "one", "references": ["eins", "ein"], "reference": None}, ["one", "eins", "ein"]),
        ({"translation": {"de": "eins", "en": "one", "fr": None}}, ["eins", "one"]),
        ({"sentence": "one", "translation": "eins"}, ["one", "eins"]),
        ({"sentence_deu_Latn": "eins", "sentence_eng_Latn": "one", "URL": "x"}, ["eins", "one"]),
        ({"de": "eins", "en": "one", "score": 1}, ["eins", "one"]),
        ({"tgt_text": "eins", "src_text": "one", "transcript": "two"}, ["eins", "one", "two"]),
        ({"raw_transcription": "One.", "transcription": "one", "normed_text": "1"}, ["One.", "one", "1"]),
    ],
)
def test_rows_give_their_texts(tmp_path, row, texts):
    write_jsonl(tmp_path / "a.jsonl", [row, row])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([row]))
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.parquet", "b.json", "saved"):
        assert texts_read(tmp_path / name) == texts


def test_a_place_names_file_line_and_field(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "zero"}, {"source": "one", "references": ["eins", "ein"]}])
    (tmp_path / "a.tsv").write_text('id\tde\tsentence\n1\t"zwei\ttwo\n')
    where = {s.text: s.where for s in read_test_sets({"set": [f"{tmp_path}/a.*"]})}
    assert where == {
        "zero": f"{tmp_path}/a.jsonl:1, text",
        "one": f"{tmp_path}/a.jsonl:2, source",
        "eins": f"{tmp_path}/a.jsonl:2, references 1",
        "ein": f"{tmp_path}/a.jsonl:2, references 2",
        '"zwei': f"{tmp_path}/a.tsv:2, de",
        "two": f"{tmp_path}/a.tsv:2, sentence",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"id": "1", "instruction": "b"}\n',
            r"a\.jsonl:2: of id, instruction, none holds a te",
        ),
        ("a.jsonl", '{"text": null}\n', r"a\.jsonl:1: of text, none holds a text"),
        ("a.jsonl", '{"text": 3}\n', r"a\.jsonl:1: its text is a int, but a text is wanted: 3"),
        ("a.jsonl", '{"references": ["a", 3]}\n', r"a\.jsonl:1: its references 2 is a int"),
        ("a.jsonl", '{"text": "a"\n', r"a\.jsonl:1: not JSON"),
        ("a.src", '{"text": "a"}\n', r"a\.src:1: JSON, but the file's name does not end in \.jsonl"),
        ("a.tsv", "1\ta\n2\tb\n", r"a\.tsv:1: the first line names no column of text"),
        ("a.tsv", "id\ttext\n1\ta\n2\n", r"a\.tsv:3: 1 columns, but id, text are wanted"),
        ("a.wav", b"RIFF\xff\xff", r"a\.wav:1: not UTF-8"),
        ("a.txt", " \n\n", r"test set 'set' has no sentences: \S*a\.txt\n.*name its files"),
        ("a.txt", "", r"a\.txt is empty"),
        ("sub/.hidden", "a\n", r"test set 'set' has no sentences: \S*sub\n"),
        ("sub/a.parquet", "a\n", r"a\.parquet is no Parquet"),
        (None, "", r"none\*\.txt"),
    ],
)
def test_what_is_no_test_set_is_named(tmp_path, name, content, message):
    path = tmp_path / (name or "a")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    asked = tmp_path / "none*.txt" if name is None else path if path.parent == tmp_path else path.parent
    with pytest.raises(UserError, match=message):
        read_test_sets({"good": [__file__], "set": [str(asked)]})


def test_a_test_set_without_files_has_no_sentences():
    with pytest.raises(UserError, match="test set 'set' has no sentences"):
        read_test_sets({"set": []})
