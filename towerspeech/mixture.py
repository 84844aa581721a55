"""The sources of a mixture, and what is recorded of them: build_mixture.py writes it, the chain compares it."""

from dataclasses import dataclass
from typing import Literal

from towerspeech.texts import expand


@dataclass
class Source:
    """One source of the mixture.

    Attributes:
        name: Names its files.
        kind: ``speech`` (units Parquet with transcripts), ``text`` or ``parallel`` (in the forms of
            towerspeech/texts.py).
        paths: Units folders; or files, folders and patterns of text.
        budget: Tokens to train on, counted after tokenization.
        max_epochs: How often the source may be repeated to fill its budget.
        text_field: The field that holds the text, where a file has fields.
        paragraphs: Whether a document of plain text ends at a blank line; else it is a line.
        direction: Of parallel text, such as de-en: needed where the data do not say it; pairs that say another one are
            left out.
    """

    name: str
    kind: Literal["speech", "text", "parallel"]
    paths: list[str]
    budget: int
    max_epochs: float = 1.0
    text_field: str = "text"
    paragraphs: bool = False
    direction: str | None = None

    def files(self) -> list[str]:
        """The files and folders that its paths mean."""
        remedy = f"check paths of source {self.name!r}"
        return [str(path) for name in self.paths for path in expand(name, remedy)]


def recorded_files(sources: list[Source], files: dict[str, list[str]]) -> dict:
    """What a mixture's run_info says of its files (compared by content) and of how each source is read."""
    return {
        "paths": [path for source in sources for path in files[source.name]],
        "sources": [[source.name, source.kind, len(files[source.name]), *_reading(source)] for source in sources],
    }


def _reading(source: Source) -> list:
    """How a source's files are read; nothing if in the usual way, as mixtures of earlier versions were."""
    reading = [source.text_field, source.paragraphs, source.direction]
    return [] if reading == ["text", False, None] else reading


def recorded_budgets(sources: list[Source]) -> dict:
    """What a mixture's run_info says of budgets, of which its tokens do not depend."""
    return {source.name: [source.budget, source.max_epochs] for source in sources}
