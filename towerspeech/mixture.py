"""The sources of a mixture, and what is recorded of them: build_mixture.py writes it, the chain compares it."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from towerspeech.errors import UserError
from towerspeech.languages import find_language
from towerspeech.texts import expand, is_hub, parse_direction
from towerspeech.units_parquet import check_one_kmeans

# The speech documents there are; towerspeech/prompts.py has their text.
TEMPLATES = ("transcript", "units", "text_to_speech")
BOUND = re.compile(r"(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)", re.IGNORECASE)
MEND = "mend the config"
VALIDATION = "validation"  # the folder of a mixture that has its held-out documents


@dataclass
class Source:
    """One source of the mixture.

    Attributes:
        name: Names its files.
        kind: ``speech`` (units Parquet with transcripts), ``text`` or ``parallel`` (in the forms of
            towerspeech/texts.py).
        paths: Units folders; or files, folders and patterns of text.
        budget: Tokens to train on, counted after tokenization; or give its group.
        group: The group whose budget it shares.
        max_epochs: How often the source may be repeated to fill its budget.
        text_field: The field that holds the text, where a file has fields.
        paragraphs: Whether a document of plain text ends at a blank line; else it is a line.
        direction: Of parallel text, such as de-en: needed where the data do not say it; pairs that say another one are
            left out.
        language: Of text, such as de. A source whose letters are of another script is refused.
        keep: Bounds of fields that the data carry, such as ``cometkiwi: ">= 0.75"``; documents beyond them are left
            out.
        min_characters: Shorter documents are left out; of pairs both sides count together.
        max_characters: Longer documents are left out.
        duplicates: Whether documents that are there twice are kept, or left out but for the first if they are
            ``exact`` (the same but for case and white space; the default of text) or also ``near`` (most of their
            5-grams are the same). Speech is kept.
        templates: Of speech, how often each form of document is made, as weights: ``transcript`` (the units, then the
            text), ``units`` alone, ``text_to_speech`` (the text, then the units).
        languages: Of speech, those that it may be in.
    """

    name: str
    kind: Literal["speech", "text", "parallel"]
    paths: list[str]
    budget: int = 0
    max_epochs: float = 1.0
    group: str | None = None
    text_field: str = "text"
    paragraphs: bool = False
    direction: str | None = None
    language: str | None = None
    keep: dict[str, str] = field(default_factory=dict)
    min_characters: int = 1
    max_characters: int | None = None
    duplicates: Literal["keep", "exact", "near"] | None = None
    templates: dict[str, float] = field(default_factory=lambda: {"transcript": 1.0})
    languages: list[str] = field(default_factory=lambda: ["en"])

    def files(self) -> list[str]:
        """The files and folders that its paths mean; not the data sets of the hub, which lie elsewhere."""
        remedy = f"check paths of source {self.name!r}"
        return [str(path) for name in self.paths if not is_hub(name) for path in expand(name, remedy)]


@dataclass
class Group:
    """Sources that share a budget.

    Attributes:
        budget: Tokens of all its sources together.
        split: ``equal``, or the weight of each source by its name.
    """

    budget: int
    split: Literal["equal"] | dict[str, float] = "equal"


OF_KIND = {  # the settings that have a meaning for some kinds of sources alone
    "text_field": ("text",),
    "paragraphs": ("text",),
    "language": ("text",),
    "direction": ("parallel",),
    "keep": ("text", "parallel"),
    "min_characters": ("text", "parallel"),
    "max_characters": ("text", "parallel"),
    "duplicates": ("text", "parallel"),
    "templates": ("speech",),
    "languages": ("speech",),
}


def settings(source: Source) -> dict:
    """What a source says beside name, kind, paths and budget; nothing of what it leaves as it is."""
    plain = Source("", source.kind, [])
    apart = ("name", "kind", "paths", "budget", "max_epochs", "group")
    told = {each.name: getattr(source, each.name) for each in fields(source) if each.name not in apart}
    told = {name: value for name, value in told.items() if value != getattr(plain, name)}
    hub = [name for name in source.paths if is_hub(name)]  # whose content is not compared
    return {**told, "hub": hub} if hub else told


def with_budgets(sources: list[Source], groups: dict[str, Group] | None) -> list[Source]:
    """The sources, each with its own budget; a group's adds up to the token.

    Raises:
        UserError: A source has both a budget and a group, or neither; a group is not there, has no sources, or its
            split does not name them.
    """
    groups = groups or {}
    shares: dict[str, int] = {}
    for name, group in groups.items():
        members = [source.name for source in sources if source.group == name]
        weights = dict.fromkeys(members, 1.0) if group.split == "equal" else group.split
        if not members or {*weights} != {*members} or min(weights.values()) <= 0 or group.budget < len(members):
            problem = f"group {name!r} has a budget of {group.budget:,} for {members}, split: {group.split}"
            raise UserError(problem, "name the group in its sources, give each a weight above 0, and a budget")
        shares |= _split(group.budget, weights)
        if none := [member for member in members if shares[member] < 1]:
            raise UserError(f"group {name!r}: its split leaves no token to {none}", "give it more weight or budget")
    for source in sources:
        if source.group is not None and source.group not in groups:
            raise UserError(f"source {source.name!r} is of group {source.group!r}, which is not there", MEND)
        if (source.budget > 0) == (source.group is not None):
            raise UserError(f"source {source.name!r} needs a positive budget, or a group with one", MEND)
    return [replace(source, budget=shares[source.name]) if source.group else source for source in sources]


def _split(budget: int, weights: dict[str, float]) -> dict[str, int]:
    """Whole tokens by weight; those left over go where most was cut off."""
    exact = {name: budget * weight / math.fsum(weights.values()) for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    left = sorted(exact, key=lambda name: shares[name] - exact[name])[: budget - sum(shares.values())]
    return {name: share + (name in left) for name, share in shares.items()}


def bounds(source: Source) -> dict[str, Callable[[float], bool]]:
    """A test for each field that ``keep`` names; UserError if it is no bound."""
    tests: dict[str, Callable[[float], bool]] = {}
    for name, said in source.keep.items():
        if not (found := BOUND.fullmatch(said.strip())):
            remedy = 'write ">= 0.75" or "<= 516"'
            raise UserError(f"source {source.name!r}: keep {name}: {said!r} is no bound", remedy)
        sign, number = found[1], float(found[2])
        compare = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__, "<": float.__lt__}[sign]
        tests[name] = lambda value, compare=compare, number=number: compare(value, number)
    return tests


def check_sources(sources: list[Source]) -> None:
    """Raise UserError unless the sources have names that can name files, data, and settings that mean something."""
    names = [source.name for source in sources]
    if not names or len({name.casefold() for name in names}) < len(names):  # some file systems tell no case
        raise UserError(f"sources need distinct names, got {names}", MEND)
    for source in sources:
        # It stands in Megatron's data_path, too; .unfinished.json is the stage's own.
        if not re.fullmatch(r"(?!unfinished$)\w[\w.+-]*", source.name, re.ASCII | re.IGNORECASE):
            raise UserError(f"a source is named {source.name!r}", "use letters, digits, and . _ + - after the first")
        for name in settings(source):
            if source.kind not in OF_KIND.get(name, (source.kind,)):
                raise UserError(f"source {source.name!r} is of kind {source.kind}, which has no {name}", MEND)
        if not source.paths or source.max_epochs <= 0:
            raise UserError(f"source {source.name!r} needs paths, and max_epochs above 0", MEND)
        if source.kind == "speech" and any(map(is_hub, source.paths)):
            raise UserError(f"source {source.name!r}: units of speech are folders, not of the hub", MEND)
        source.files()
        bounds(source)
        if source.direction:
            parse_direction(source.direction)
        for language in [source.language or "en", *source.languages]:
            if find_language(language) is None:
                raise UserError(f"source {source.name!r}: {language!r} is none of the ten languages", MEND)
        weights = source.templates
        if {*weights} - {*TEMPLATES} or min(weights.values(), default=-1) < 0 or not sum(weights.values()):
            raise UserError(f"source {source.name!r}: templates are {weights}", f"give weights to {TEMPLATES}")
        if source.max_characters is not None and source.max_characters < source.min_characters:
            raise UserError(f"source {source.name!r} keeps no document: longest is below shortest", MEND)
    check_one_kmeans(_paths(source for source in sources if source.kind == "speech"))


def _paths(sources: Iterable[Source]) -> list[Path]:
    return [Path(path) for source in sources for path in source.files()]


def recorded_files(sources: list[Source], files: dict[str, list[str]]) -> dict:
    """What a mixture's run_info says of its files (compared by content) and of how each source is read."""
    told = [[source.name, source.kind, len(files[source.name])] for source in sources]
    return {
        "paths": [path for source in sources for path in files[source.name]],
        "sources": [
            [*known, settings(source)] if settings(source) else known
            for known, source in zip(told, sources, strict=True)
        ],
    }


def recorded_budgets(sources: list[Source]) -> dict:
    """What a mixture's run_info says of budgets, which decide how many of its tokens are drawn."""
    return {source.name: [source.budget, source.max_epochs] for source in sources}


def recorded_test_sets(files: dict[str, list[str]]) -> dict:
    """What a mixture's run_info says of test sets whose sentences are kept out: names, and files (by content)."""
    return {
        "test_sets": [path for paths in files.values() for path in paths],
        "test_set_names": [[name, len(paths)] for name, paths in files.items()],
    }
