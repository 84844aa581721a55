"""Write a speech corpus as the manifest that the other commands read: which utterance is where, and what is said.

Usage: python speech_units/make_manifest.py --corpus librispeech --root LibriSpeech --split train-clean-100 \
           --output_dir manifests/librispeech

Reads: a corpus as it lies on disk (--corpus), or one form that corpora come in: lhotse's cuts (--cuts), NeMo's
manifest (--nemo), fairseq's TSV (--fairseq), a Kaldi folder (--kaldi), Parquet with audio in it (--parquet). Of each
recording the header, for its length.
Writes, in output_dir: manifest.jsonl (towerspeech/manifests.py has its fields; audio is relative to --root),
dropped.jsonl ({id, audio, reason, where} of what was left out) and, for covost2, europarl_st and fleurs,
translations.jsonl ({id, src_lang, tgt_lang, source, target}).
"""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from speech_units.corpora import CORPORA, clean
from speech_units.manifest_forms import FORMS
from speech_units.utterances import (
    BACKWARDS,
    BY_TEXT_RULES,
    DUPLICATE,
    FOR_UNITS,
    MALFORMED,
    NO_TRANSCRIPT,
    TOO_LONG,
    Source,
    Utterance,
    with_lengths,
)
from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import hash_file
from towerspeech.languages import language as known_language
from towerspeech.manifests import check_row
from towerspeech.outside_text import PLANE_15
from towerspeech.records import dumps
from towerspeech.stage import Stage, stage

SLACK_S = 0.05  # a segment may end so much after its recording, whose length was rounded or measured otherwise
WITH_TRANSLATIONS = ("covost2", "europarl_st", "fleurs")
ALL_BAD = 10_000  # if so many rows come first of which none is usable, the others will not be either
FOOTER = 1 << 20  # bytes of a Parquet file's end that stand for it: where its columns are, and their statistics


def fingerprint(source: Source) -> str:
    """SHA-256 over the index files: their paths below the corpus's folder and their contents."""

    def content(path: Path) -> str:
        if path.suffix != ".parquet":
            return hash_file(path)
        with open(path, "rb") as file:  # it holds the audio too, which no manifest depends on
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FOOTER))
            return f"{size} {hashlib.sha256(file.read()).hexdigest()}"

    rows = [f"{os.path.relpath(path, source.base)} {content(path)}" for path in source.index]
    return hashlib.sha256("\n".join(rows).encode(errors="surrogateescape")).hexdigest()


def checked(utterances: Iterable[Utterance], corpus: str | None, is_clean: bool) -> Iterator[Utterance]:
    """What is wrong with utterances, as far as can be told without their audio; and their texts' final form."""
    ids = set()
    for utterance in utterances:
        texts = (utterance.id, utterance.audio, utterance.text, *utterance.fields.values())
        if not all(map(_is_text, texts)):
            utterance.id = f"{utterance.id}"
            utterance.problem = utterance.problem or MALFORMED
        if not utterance.problem:
            if is_clean:
                utterance.text = clean(corpus, utterance.text)
                utterance.source = clean(corpus, utterance.source)
                utterance.targets = {code: clean(corpus, text) for code, text in utterance.targets.items()}
            if utterance.id in ids:
                utterance.problem = DUPLICATE
            elif not utterance.text.strip():
                utterance.problem = NO_TRANSCRIPT
            elif PLANE_15.search(utterance.text):
                utterance.problem = FOR_UNITS
        ids.add(utterance.id)
        yield utterance


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON may spell half a character."""
    with contextlib.suppress(AttributeError, UnicodeEncodeError):
        value.encode()
        return True
    return False


def manifest_row(utterance: Utterance, audio: str, language: str) -> dict:
    """The manifest's row of an utterance whose recording's length is known.

    Sets the utterance's problem if its segment is none of its recording.
    """
    start, end, length = utterance.start_s or 0.0, utterance.end_s, utterance.length_s
    row = {"id": utterance.id, "audio": audio, **utterance.place, "language": language, "text": utterance.text}
    if end is not None and end <= start:
        utterance.problem = BACKWARDS
    elif start >= length or (end is not None and end > length + SLACK_S):
        utterance.problem = f"{TOO_LONG} ({length:.2f} s)"
    if start or (end is not None and end < length - SLACK_S):  # else it is the whole recording
        row["start_s"] = start
        if end is not None:
            row["end_s"] = end = round(min(end, length), 6)
    else:
        end = None
    row["duration_s"] = round((length if end is None else end) - start, 6)
    row |= utterance.fields
    if not utterance.problem:
        try:
            check_row(row, utterance.where)
        except UserError:  # NaN, or a name that looks like an archive's
            utterance.problem = MALFORMED
    return row


def translations(utterance: Utterance, language: str) -> Iterator[dict | None]:
    """Rows of parallel text for what an utterance says; None where a side is empty or would be units."""
    for code, target in sorted(utterance.targets.items()):
        pair = {"source": utterance.source or utterance.text, "target": target}
        if all(text.strip() and not PLANE_15.search(text) for text in pair.values()):
            yield {"id": utterance.id, "src_lang": language, "tgt_lang": code, **pair}
        else:
            yield None


class Tally:
    """How many utterances and hours were kept, and dropped by reason."""

    def __init__(self):
        self.kept, self.kept_s = 0, 0.0
        self.dropped, self.dropped_s, self.unknown = Counter(), Counter(), Counter()
        self.first: dict[str, str] = {}
        self.translations = Counter()

    def drop(self, utterance: Utterance) -> None:
        reason = utterance.problem.split(" (")[0]
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"{utterance.problem.removeprefix(reason)} {utterance.where}".strip())
        end = utterance.length_s if utterance.end_s is None else utterance.end_s
        if end:
            self.dropped_s[reason] += max(0.0, end - (utterance.start_s or 0.0))
        else:
            self.unknown[reason] += 1

    def bad(self) -> int:
        return sum(number for reason, number in self.dropped.items() if reason not in BY_TEXT_RULES)

    def counts(self) -> dict:
        dropped = {}
        for reason, number in sorted(self.dropped.items()):
            hours, unknown = _hours(self.dropped_s[reason]), self.unknown[reason]
            dropped[reason] = {"utterances": number, "hours": hours, "of_unknown_length": unknown}
        counts = {"utterances": self.kept, "hours": _hours(self.kept_s), "dropped": dropped}
        return counts | ({"translations": dict(sorted(self.translations.items()))} if self.translations else {})

    def check(self, base: Path, max_bad_share: float) -> None:
        """Raise UserError if nothing is left, or too much is bad."""
        rows, bad = self.kept + self.dropped.total(), self.bad()
        if self.kept and bad <= max_bad_share * rows:
            return
        reasons = [
            f"{number:,} {reason} (first: {self.first[reason]})" for reason, number in self.dropped.most_common()
        ]
        if not self.kept:
            problem = f"{base}: of {rows:,} rows none can be used" if rows else f"{base}: it holds no such row"
            remedy = "check --root, under which the audio must lie" if bad else "check --split and the texts"
        else:
            problem = f"{base}: {bad:,} of {rows:,} rows are bad, more than {max_bad_share:.2%}"
            remedy = "mend the corpus, or give a higher --max_bad_share to leave them out"
        raise UserError(": ".join([problem, "; ".join(reasons)]) if reasons else problem, remedy)


def _hours(seconds: float) -> float:
    return round(seconds / 3600, 4)


def write(work: Stage, source: Source, root: Path, max_bad_share: float) -> Tally:
    """Write the stage's files, utterance by utterance."""
    from tqdm import tqdm

    corpus, text, language = (work.request["arguments"][name] for name in ("corpus", "text", "language"))
    tally, names = Tally(), ["manifest.jsonl", "dropped.jsonl"]
    if corpus in WITH_TRANSLATIONS:
        names.append("translations.jsonl")
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(work.publish(name)) for name in names]
        # Of a file's name that is not text no more is written than that.
        files = [stack.enter_context(open(path, "w", encoding="utf-8", errors="replace")) for path in paths]
        utterances = with_lengths(checked(source.utterances, corpus, text == "clean"))
        for utterance in tqdm(utterances, desc=source.base.name, unit="utt"):
            audio = utterance.audio.removeprefix(f"{root}/")
            row = {} if utterance.problem else manifest_row(utterance, audio, language)
            if utterance.problem:
                where = utterance.where.removeprefix(f"{source.base}/")
                row = {"id": utterance.id, "audio": audio, "reason": utterance.problem, "where": where}
                files[1].write(dumps(row) + "\n")
                tally.drop(utterance)
                if tally.bad() >= ALL_BAD and not tally.kept:
                    break
                continue
            files[0].write(dumps(row) + "\n")
            tally.kept, tally.kept_s = tally.kept + 1, tally.kept_s + row["duration_s"]
            for pair in translations(utterance, language) if len(files) > 2 else ():
                if pair:
                    files[2].write(dumps(pair) + "\n")
                tally.translations[pair["tgt_lang"] if pair else "left out"] += 1
        tally.check(source.base, max_bad_share)
    return tally


def make_manifest(
    output_dir: Path,
    corpus: Literal[tuple(CORPORA)] | None = None,
    cuts: Path | None = None,
    nemo: Path | None = None,
    fairseq: Path | None = None,
    kaldi: Path | None = None,
    parquet: list[Path] | None = None,
    root: Path | None = None,
    split: str | None = None,
    text: Literal["clean", "raw"] = "clean",
    language: str = "en",
    max_bad_share: float = 0.01,
    overwrite: bool = False,
) -> None:
    """Write a corpus's manifest.

    Args:
        output_dir: Folder to write.
        corpus: Which corpus it is; needs --root and --split.
        cuts: Or else cuts of lhotse's: .jsonl, .jsonl.gz or a Shar folder.
        nemo: Or a manifest of NeMo's.
        fairseq: Or a TSV of fairseq's, with .wrd or .ltr beside it.
        kaldi: Or a data folder of Kaldi's, with wav.scp, text and, if recordings are cut, segments.
        parquet: Or Parquet files that hold audio, or a folder of them, as the Hugging Face hub has them.
        root: Folder of the corpus, or one or two above it; with the other forms the folder that audio paths start
            from, if not the form's own. The manifest's audio paths start from it: give it as --audio_root then.
        split: Part of the corpus, by its own name (test-clean, XL, dev).
        text: clean: as the corpus's text rule has it (speech_units/README.md); raw: as the corpus has it.
        language: Code of the language that is spoken.
        max_bad_share: Share of the rows that may be bad, such as missing or unreadable audio; they are left out.
        overwrite: Replace another manifest in the folder.
    """
    arguments = dict(locals())
    known_language(language)
    given = [name for name in ("corpus", *FORMS) if arguments[name]]
    if len(given) != 1:
        raise UserError(
            f"{' and '.join(f'--{name}' for name in given) or 'no corpus'} given, but one is wanted",
            f"give --corpus with --root and --split, or one of {', '.join(f'--{name}' for name in FORMS)}",
        )
    [form] = given
    if corpus and not (root and split):
        raise UserError(f"--corpus {corpus} without {'--split' if root else '--root'}", "give --root and --split too")
    if split and not corpus:
        raise UserError(f"--split {split} with --{form}", "leave it out: the form's files are one part already")
    if not 0 <= max_bad_share < 1:
        raise UserError(f"--max_bad_share is {max_bad_share}", "give a share, from 0 to below 1")
    root = Path(os.path.abspath(root)) if root else None
    if corpus:
        source = CORPORA[corpus](root, split, language, text)
    else:
        paths = arguments[form]
        paths = [Path(os.path.abspath(path)) for path in paths] if form == "parquet" else Path(os.path.abspath(paths))
        source = FORMS[form](paths, root, text)
    arguments |= {"form": form, "index": fingerprint(source)}
    with stage(__file__, output_dir, arguments, ignore=(*FORMS, "root", "max_bad_share")) as work:
        if work.done:
            return
        tally = write(work, source, root or source.root or source.base, max_bad_share)
        work.counts.update(tally.counts())
    print(f"{tally.kept:,} utterances, {tally.kept_s / 3600:,.2f} h")
    for reason, numbers in work.counts["dropped"].items():
        print(f"left out: {numbers['utterances']:,} ({numbers['hours']:,.2f} h where known): {reason}")
    for code, number in sorted(tally.translations.items()):
        print(f"translations {'' if code == 'left out' else 'into '}{code}: {number:,}")
    print(output_dir)


if __name__ == "__main__":
    run(make_manifest)
