"""The pocket language: one set of templates and concepts, spoken in every language that has a file in languages/.

A sentence is a template (``TEMPLATES``: its slots and what may fill them) and a concept for each slot; both belong to
no language. ``languages/<code>.yaml`` is one language's column of words and templates:

    templates:
      compare: "{det.nom+animal} {animal} ist {adjective.more} als {det2.nom+animal2} {animal2}"
    categories:
      animal:
        fields: [base, class, pl]              # the forms that each word lists, as far as it is not regular
        paradigm: {pl: "~e"}                   # the regular forms, made from the base form "~"
        words: {dog: [hund, m], cat: [katze, f, katzen]}

``{animal}`` is the base form, ``{animal.pl}`` another one, and ``{det.nom+animal}`` agrees: it is the form ``nom_m``
where the animal's class is m. ``+`` may be repeated: ``acc+det+animal`` looks up ``acc_weak_m``. What the classes
mean (gender, a/an, person, final consonant, measure word) is each language's own affair, so a new language is a new
file. A form that is not there is an error; the tests render every word of every template.

Lower case, no punctuation: the pocket language is written as it is heard.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

# What a slot takes, "category" or "category:concept|concept" where not every word of a category fits; a slot that is
# not listed takes the category of its name. A slot whose name ends in 2 is a second one of its kind; but for
# determiners, it never takes the same concept as the first.
SLOTS = {
    "det": "determiner:the|my|our",
    "det2": "determiner:the|my|your",
    "odet": "determiner:the|a|my",
    "the": "determiner:the",
    "no": "determiner:no",
    "adjective": "adjective:small|big|old|new|red|blue|white|black|beautiful|cheap|heavy",
}


def slots(names: str, **others: str) -> dict[str, str]:
    """The slots of a template, in the order in which they are filled; ``others`` take other words here."""
    return {name: {**SLOTS, **others}.get(name, name.removesuffix("2")) for name in names.split()}


TEMPLATES: dict[str, dict[str, str]] = {
    "buy": slots("det person verb odet thing adjective"),
    "give": slots("day det person giving det2 person2 odet thing"),
    "modal": slots("det person modal verb odet thing day"),
    "past": slots("past det person verb number thing place"),
    "ask": slots("question det person verb odet thing", det="determiner:the|your|our", odet="determiner:the|my|your"),
    "because": slots("det person feeling verb odet thing"),
    "travel": slots("day pronoun travel the vehicle city"),
    "there_are": slots("number adjective animal place"),
    "compare": slots(
        "det animal adjective det2 animal2",
        adjective="adjective:small|big|old|young|fast|slow|strong|beautiful|cheap|heavy",
    ),
    "need": slots("pronoun having no adjective thing"),
    "lie": slots(
        "odet thing preposition odet2 adjective thing2",
        odet="determiner:the|my|our",
        odet2="determiner:the|your",
    ),
    "together": slots("det person doing det2 person2 place"),
    "weather": slots("weather det person activity"),
    "depart": slots("day the vehicle city leaving number"),
}
PLACEHOLDER = re.compile(r"\{(\w+)(?:\.(\w+))?((?:\+\w+)*)\}")


@cache
def load(code: str) -> dict:
    """Read a language's templates and words: {"templates": {name: text}, "words": {category: {concept: forms}}}."""
    import yaml

    text = (Path(__file__).parent / "languages" / f"{code}.yaml").read_text(encoding="utf-8")
    column = yaml.safe_load(text)
    words = {}
    for category, table in column["categories"].items():
        fields, paradigm = table.get("fields", ["base"]), table.get("paradigm", {})
        words[category] = {}
        for concept, entry in table["words"].items():
            listed = [entry] if isinstance(entry, str) else entry
            forms = dict(zip(fields, listed, strict=False))  # a shorter list: the rest is regular
            regular = {form: pattern.replace("~", forms["base"]) for form, pattern in paradigm.items()}
            words[category][str(concept)] = {**regular, **forms}
    return {"templates": column["templates"], "words": words}


def languages() -> list[str]:
    """Codes of the languages that the pocket language is written in, English first."""
    codes = sorted(path.stem for path in (Path(__file__).parent / "languages").glob("*.yaml"))
    return sorted(codes, key=lambda code: code != "en")


def choices(slot_kind: str, most: int | None = None) -> list[str]:
    """The concepts that may fill a slot, from English's words; with ``most``, the first so many."""
    category, _, some = slot_kind.partition(":")
    return (some.split("|") if some else list(load("en")["words"][category]))[:most]


def render(code: str, template: str, concepts: dict[str, str]) -> str:
    """Say a template with a concept in each slot in one language."""
    column = load(code)
    forms = {
        slot: column["words"][kind.partition(":")[0]][concepts[slot]] for slot, kind in TEMPLATES[template].items()
    }

    def word(match: re.Match) -> str:
        slot, form, others = match[1], match[2] or "base", match[3].split("+")[1:]
        return forms[slot]["_".join([form, *[forms[other]["class"] for other in others]])]

    return " ".join(PLACEHOLDER.sub(word, column["templates"][template]).split())  # an empty form leaves no gap


def draw(template: str, rng: random.Random, most: int | None = None) -> dict[str, str]:
    """Choose a concept for each slot of a template."""
    concepts = {}
    for slot, kind in TEMPLATES[template].items():
        fitting = choices(kind, most)
        if slot.endswith("2") and not kind.startswith("determiner"):
            fitting = [concept for concept in fitting if concept != concepts[slot[:-1]]]
        concepts[slot] = rng.choice(fitting)
    return concepts


def sentences(
    codes: Sequence[str], seed: int, templates: Sequence[str] | None = None, most: int | None = None
) -> Iterator[dict[str, str]]:
    """Draw sentences for ever: {language: text}, the templates in turn, no text twice in any language.

    A smaller language is made of some ``templates``, and of the ``most`` first concepts of each slot.

    A template ends when six in ten of its fillings (those with the same concept twice counted too) have been said, so
    that the draw cannot stall. When all have ended, so do the sentences.
    """
    rng = random.Random(f"pocket {seed}")
    seen: set[tuple[str, str]] = set()  # language, text
    left = {}
    for name in templates or TEMPLATES:
        left[name] = math.prod(len(choices(kind, most)) for kind in TEMPLATES[name].values()) * 6 // 10
    while left:
        for name in list(left):
            while True:
                concepts = draw(name, rng, most)
                said = {code: render(code, name, concepts) for code in codes}
                if seen.isdisjoint(said.items()):
                    break
            seen.update(said.items())
            yield said
            left[name] -= 1
            if not left[name]:
                del left[name]
