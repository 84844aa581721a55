"""A system's YAML (systems/<name>.yaml): a block for each command, and two for the chain of them.

``system`` says where things are and which sets of speech there are (``Places``), ``sbatch`` which options Slurm gets
for a stage. Every other block is called as its command (the two train.py as their folders) and holds its flags. A
command that runs twice has its second settings in ``base`` (the text model is made first) or ``few_shot`` (prompts
that show examples), over those above: ``--config systems/tiny.yaml:base`` takes them. ``{work}`` in a text stands for
the system's folder.
"""

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import publish

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("base", "few_shot")
WHERE = "systems/ has five to begin with, README.md tells of them"


@dataclass
class Places:
    """The block ``system``.

    Attributes:
        work: Folder of what is this system's alone.
        base: Hugging Face folder of the text model.
        sets: The sets of speech: {name: ``SpeechSet``}.
        train_sets: Those to learn from; k-means is fitted on a sample of them all.
        test_sets: Those to transcribe.
        sft_sets: Those of train_sets that instruction tuning draws from; default: all.
        manifests: Folder of <set>/manifest.jsonl.
        kmeans: Folder of the k-means. Systems that name the same one share it; so with the next two.
        units: Folder of the sets' units.
        tokenizer: Folder of units_bpe/, tokenizer/ and base/, the extended model.
        shard_hours: Hours of a set that one task of an array labels.
        array_limit: Tasks of an array that may run at a time; default: all.
        nproc_per_node: Processes of a training on a node; default: one for each of its GPUs.
    """

    work: str
    base: str
    sets: dict[str, dict]
    train_sets: list[str]
    test_sets: list[str]
    sft_sets: list[str] | None = None
    manifests: str = "{work}/manifests"
    kmeans: str = "{work}/kmeans"
    units: str = "{work}/units"
    tokenizer: str = "{work}/tokenizer"
    shard_hours: float = 250
    array_limit: int | None = None
    nproc_per_node: int | None = None


FORMS = ("corpus", "cuts", "nemo", "fairseq", "kaldi", "parquet")  # options of speech_units/make_manifest.py


@dataclass
class SpeechSet:
    """A set of speech: one of the six forms that make_manifest.py reads, or a manifest.

    Attributes:
        root: Folder of the corpus; audio paths start there.
        corpus, cuts, nemo, fairseq, kaldi, parquet: As make_manifest.py's.
        manifest: A manifest that is there already.
        split, text, language: As make_manifest.py's.
        hours: How long the set is, which decides the number of shards; default: one shard.
    """

    root: str
    corpus: str | None = None
    cuts: str | None = None
    nemo: str | None = None
    fairseq: str | None = None
    kaldi: str | None = None
    parquet: list[str] | None = None
    manifest: str | None = None
    split: str | None = None
    text: str | None = None
    language: str | None = None
    hours: float | None = None


def command_name(script: Path) -> str:
    """What a script's block is called."""
    return script.parent.name if script.stem == "train" else script.stem


def is_command(name: object) -> bool:
    """Whether a system's YAML may have a block of this name: a script that is run, or a folder of a train.py."""
    scripts = [*ROOT.glob(f"*/{name}.py"), *ROOT.glob(f"{name}/train.py")]
    return any('__name__ == "__main__"' in script.read_text(encoding="utf-8") for script in scripts)


def is_system(blocks: object) -> bool:
    """Whether a YAML's content is a system's, and not a command's flags."""
    return isinstance(blocks, dict) and any(
        isinstance(block, dict) and (is_command(name) or name == "system") for name, block in blocks.items()
    )


def read_block(config: str, name: str) -> dict | None:
    """A command's block of ``<file>`` or ``<file>:<variant>``; empty if there is none.

    None if the file holds a command's flags, or is jsonargparse's to refuse.

    Raises:
        UserError: The file is a system's, with a mistake.
    """
    import yaml

    path, variant = _split(config)
    try:
        blocks = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not is_system(blocks):
        return None
    return variant_of(_checked(path, blocks), variant).get(name, {})


def moved(path: Path, work: Path, folder: Path | str) -> Path:
    """Write a copy of a system's YAML with another work folder into ``folder``; returns its path."""
    import yaml

    read_system(path)  # a mistake is named with the file that it stands in
    blocks = yaml.safe_load(path.read_text(encoding="utf-8"))
    blocks["system"]["work"] = str(work)
    with publish(Path(folder) / path.name) as target:
        target.write_text(yaml.safe_dump(blocks, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Path(folder) / path.name


def _split(config: str) -> tuple[Path, str]:
    path, _, variant = config.rpartition(":")
    return (Path(path), variant) if variant in VARIANTS else (Path(config), "")


def variant_of(blocks: dict, variant: str) -> dict:
    """The blocks of commands, a variant's settings over the others."""
    plain = {name: block for name, block in blocks.items() if name not in VARIANTS}
    return {**plain, **{name: {**plain.get(name, {}), **block} for name, block in blocks.get(variant, {}).items()}}


def read_system(path: Path) -> dict[str, dict]:
    """The blocks of a system's YAML, with ``system`` in full and ``{work}`` filled in.

    Raises:
        UserError: It cannot be read, or has a block or a key of ``system`` or ``sbatch`` that is not known.
    """
    import yaml

    try:
        blocks = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}", WHERE) from None
    if not is_system(blocks):
        raise UserError(f"{path} has no blocks of commands", WHERE)
    if "system" not in blocks:
        raise UserError(f"{path} has no block 'system', which says where things are", WHERE)
    return _checked(path, blocks)


def _checked(path: Path, blocks: dict) -> dict[str, dict]:
    named = {name: block for name, block in blocks.items() if name not in VARIANTS}
    for variant in VARIANTS:
        if variant in blocks:
            inner = blocks[variant] if isinstance(blocks[variant], dict) else {"": None}
            named |= {f"{variant}.{name}".removesuffix("."): block for name, block in inner.items()}
    for called, block in named.items():
        if called not in ("system", "sbatch", *VARIANTS) and not is_command(called.rpartition(".")[2]):
            raise UserError(f"{path}: {called!r} is no command's block", "blocks are called as commands are")
        if not isinstance(block, dict):
            raise UserError(f"{path}: block {called!r} holds no settings", "give it {name: value, ...}")
    if "sbatch" in blocks:
        _check_options(path, blocks["sbatch"])
    if "system" not in blocks:
        return blocks
    blocks = {**blocks, "system": _places(path, blocks["system"])}
    return _filled(blocks, blocks["system"]["work"])


def _check_options(path: Path, options: dict) -> None:
    files = sorted(file.stem for file in ROOT.glob("sbatch/*.sbatch"))
    for name, words in options.items():
        if name not in files:
            raise UserError(f"{path}: sbatch.{name} is no file of sbatch/", f"there are: {', '.join(files)}")
        if not isinstance(words, list) or not all(isinstance(word, str) and word.startswith("-") for word in words):
            raise UserError(f"{path}: sbatch.{name} is no list of sbatch's options", "[--nodes=4, --time=24:00:00]")


def _places(path: Path, block: dict) -> dict:
    """``system`` with its defaults; paths of lists end at white space in a job, so these hold none."""
    places = _filled_in(f"{path}: system", Places, block, ("work", "units", "tokenizer", "manifests"))
    for name, given in places["sets"].items():
        where = f"{path}: system.sets.{name}"
        if not isinstance(given, dict) or not re.fullmatch(r"[\w.+-]+", str(name)):
            raise UserError(f"{where} is {given!r}", "name it with letters, digits and . _ + -, and say what it is")
        if not isinstance(name, str):
            raise UserError(
                f"{path}: system.sets has a set called {name!r}, a {type(name).__name__}", "put it in quotes"
            )
        places["sets"][name] = _filled_in(where, SpeechSet, given, ("root", *FORMS, "manifest"))
        forms = [form for form in (*FORMS, "manifest") if given.get(form) is not None]
        if len(forms) != 1:
            said = f"says {' and '.join(forms)}" if forms else "does not say what it is"
            raise UserError(f"{where} {said}", f"give one of {', '.join(FORMS)}, manifest")
    for sets in ("train_sets", "test_sets", "sft_sets"):
        among = "train_sets" if sets == "sft_sets" else "sets"
        for name in sorted({*(places[sets] or [])} - {*places[among]}):
            raise UserError(f"{path}: system.{sets} names {name}, {among} do not", "add it there")
    return places


def _filled_in(where: str, kind: type, block: dict, words: Sequence[str]) -> dict:
    """A block with its defaults; ``words`` and lists hold no white space.

    Raises:
        UserError: It has unknown keys, lacks some, or has values of another type.
    """
    known = {field.name: field for field in fields(kind)}
    if unknown := block.keys() - known.keys():
        raise UserError(f"{where} has no key {min(unknown)!r}", f"it takes: {', '.join(known)}")
    filled = {name: field.default for name, field in known.items()} | block
    for name, value in filled.items():
        wanted = known[name].type
        if value is MISSING:
            raise UserError(f"{where} does not say {name}", "README.md and the other systems show it")
        if not _is(value, wanted):
            raise UserError(f"{where}.{name} is {value!r}", f"it wants {getattr(wanted, '__name__', wanted)}")
        if isinstance(value, list) or (name in words and value is not None):
            for word in value if isinstance(value, list) else [value]:
                if any(mark in word for mark in " \t\r\n*?["):
                    raise UserError(f"{where}.{name} holds {word!r}", "no white space, no * ? [ here")
    return filled


def _is(value, kind) -> bool:
    """Whether a value is what a key of ``system`` wants, and not empty."""
    if value is None:
        return "None" in str(kind)
    if "dict" in str(kind):
        return isinstance(value, dict) and bool(value)
    if "list" in str(kind):
        return isinstance(value, list) and bool(value) and all(isinstance(word, str) and word for word in value)
    if "int" in str(kind):
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    if "float" in str(kind):
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return isinstance(value, str) and bool(value.strip())


def _filled(value, work: str):
    if isinstance(value, dict):
        return {name: _filled(item, work) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, work) for item in value]
    return value.replace("{work}", work) if isinstance(value, str) else value
