"""The ten languages."""

import pytest

from towerspeech.languages import LANGUAGES, language, parse_pair
from towerspeech.stage import UserError


def test_the_ten_languages_and_their_codes():
    assert set(LANGUAGES) == set(["en", "es", "fr", "it", "pt", "ru", "zh", "de", "nl", "ko"])
    assert language("zh") == ("zh", "Chinese", "zho_Hans", "zh")
    assert len({entry.flores for entry in LANGUAGES.values()}) == 10


def test_sacrebleu_has_their_tokenizers():
    from sacrebleu.metrics import BLEU

    for entry in LANGUAGES.values():
        assert BLEU(tokenize=entry.bleu_tokenizer).corpus_score(["a b c d"], [["a b c d"]]).score == pytest.approx(100)


def test_pairs():
    assert parse_pair("de-en") == ("de", "en")
    for pair in ("de", "de-en-fr", "de-de", "", "de_en"):
        with pytest.raises(UserError, match="is not a language pair"):
            parse_pair(pair)
    with pytest.raises(UserError, match="unknown language 'xx'\n.*name one of: en, es"):
        parse_pair("en-xx")
