"""The ten languages."""

import pytest

from towerspeech.errors import UserError
from towerspeech.languages import LANGUAGES, language, parse_pair


def test_the_ten_languages_and_their_codes():
    assert set(LANGUAGES) == set(["en", "es", "fr", "it", "pt", "ru", "zh", "de", "nl", "ko"])
    assert language("zh") == ("zh", "Chinese", "zho_Hans", "zh")
    assert len({entry.flores for entry in LANGUAGES.values()}) == 10


def test_names_and_codes():
    """As SpireLM's prompts name them, and FLORES-200 its files."""
    assert [(code, entry.code, entry.name, entry.flores) for code, entry in LANGUAGES.items()] == [
        ("en", "en", "English", "eng_Latn"),
        ("es", "es", "Spanish", "spa_Latn"),
        ("fr", "fr", "French", "fra_Latn"),
        ("it", "it", "Italian", "ita_Latn"),
        ("pt", "pt", "Portuguese", "por_Latn"),
        ("ru", "ru", "Russian", "rus_Cyrl"),
        ("zh", "zh", "Chinese", "zho_Hans"),
        ("de", "de", "German", "deu_Latn"),
        ("nl", "nl", "Dutch", "nld_Latn"),
        ("ko", "ko", "Korean", "kor_Hang"),
    ]


def test_their_tokenizers_are_those_that_sacrebleu_takes_for_the_language():
    from sacrebleu.metrics import BLEU

    for code, entry in LANGUAGES.items():
        own, ours = BLEU(trg_lang=code).tokenizer, BLEU(tokenize=entry.bleu_tokenizer).tokenizer
        assert ours.signature() == own.signature(), code


def test_pairs():
    assert parse_pair("de-en") == ("de", "en")
    for pair in ("de", "de-en-fr", "de-de", "", "de_en"):
        with pytest.raises(UserError, match="is not a language pair"):
            parse_pair(pair)
    with pytest.raises(UserError, match="unknown language 'xx'\n.*name one of: en, es"):
        parse_pair("en-xx")
