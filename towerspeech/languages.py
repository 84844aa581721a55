"""TowerSpeech's ten languages, with the names and codes that prompts and test sets use."""

from typing import NamedTuple

from towerspeech.errors import UserError


class Language(NamedTuple):
    code: str  # ISO 639-1, as in task names (flores_de-en)
    name: str  # English name, as in prompts
    flores: str  # FLORES-200 file code
    bleu_tokenizer: str  # sacreBLEU's, when the language is the target


LANGUAGES = {
    language.code: language
    for language in (
        Language("en", "English", "eng_Latn", "13a"),
        Language("es", "Spanish", "spa_Latn", "13a"),
        Language("fr", "French", "fra_Latn", "13a"),
        Language("it", "Italian", "ita_Latn", "13a"),
        Language("pt", "Portuguese", "por_Latn", "13a"),
        Language("ru", "Russian", "rus_Cyrl", "13a"),
        Language("zh", "Chinese", "zho_Hans", "zh"),
        Language("de", "German", "deu_Latn", "13a"),
        Language("nl", "Dutch", "nld_Latn", "13a"),
        Language("ko", "Korean", "kor_Hang", "ko-mecab"),
    )
}


def language(code: str) -> Language:
    """Look a language up by its ISO 639-1 code, which must be one of the ten."""
    if code not in LANGUAGES:
        raise UserError(f"unknown language {code!r}", f"name one of: {', '.join(LANGUAGES)}")
    return LANGUAGES[code]


FLORES_PLUS_CODES = {"zho_Hans": "cmn_Hans"}  # where FLORES+ departs from FLORES-200
NAMES = {
    name.lower(): known.code
    for known in LANGUAGES.values()
    for name in (known.code, known.name, known.flores, FLORES_PLUS_CODES.get(known.flores, known.flores))
}


def find_language(name: str) -> str | None:
    """The code of a language by its code, name or FLORES code, in any case: ``de``, ``German``, ``deu_Latn``."""
    return NAMES.get(name.lower())


def parse_pair(pair: str) -> tuple[str, str]:
    """Split ``de-en`` into its two language codes, both checked."""
    codes = pair.split("-")
    if len(codes) != 2 or codes[0] == codes[1]:
        raise UserError(f"{pair!r} is not a language pair", "write it as source-target, such as de-en")
    return language(codes[0]).code, language(codes[1]).code
