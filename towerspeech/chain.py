"""The chain: a system's stages in their order, what each is given, which are arrays, and whether one is done.

A stage is a file of sbatch/ with its variables: systems/run.py runs it here, sbatch/submit_pipeline.py gives it to
Slurm. Which commands a stage runs stands in its file alone; the file itself shows them.
"""

import contextlib
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from towerspeech.errors import UserError
from towerspeech.files import read_json
from towerspeech.mixture import Group, Source, recorded_budgets, recorded_files, recorded_test_sets, with_budgets
from towerspeech.stage import RUN_INFO, hash_path, plain
from towerspeech.system import FORMS, ROOT, command_name, read_system, variant_of
from towerspeech.texts import expand, is_hub
from towerspeech.units_parquet import shard_name

# Commands that put what is asked for in place of what they wrote before, without an --overwrite (sbatch/job.sh).
REPLACING = ("score", "score_comet", "summarize")


class Stage(NamedTuple):
    """A stage of the chain."""

    name: str
    file: str  # sbatch/<file>.sbatch
    after: Sequence[str]  # the stages whose output it reads
    variables: dict[str, object]  # of the file; a list's items become words
    tasks: int | None = None  # of an array
    arguments: Sequence[str] = ()  # of the file
    variant: str = ""  # of the YAML's blocks

    def environment(self) -> dict[str, str]:
        """The variables as texts; those that are None are left to the file's defaults."""
        given = {name: value for name, value in self.variables.items() if value is not None}
        return {name: " ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in given.items()}


# --- The stages -----------------------------------------------------------------------------------
class System:
    """A system's YAML, as the chain asks it."""

    def __init__(self, config: Path):
        self.config = config
        self.blocks = read_system(config)
        self.places = self.blocks["system"]
        self.work, self.units = self.places["work"], self.places["units"]
        self.extended = f"{self.places['tokenizer']}/base"

    def get(self, block: str, key: str, variant: str = ""):
        return variant_of(self.blocks, variant).get(block, {}).get(key)

    def need(self, block: str, key: str, variant: str = ""):
        """What the chain itself must know; UserError if the YAML does not say it."""
        value = self.get(block, key, variant)
        if value in (None, "", []):
            raise UserError(f"{self.config}: block {block!r} does not say {key}", "add it")
        for word in value if isinstance(value, list) else ():
            if any(mark in str(word) for mark in " \t\r\n*?["):
                raise UserError(f"{self.config}: {block}.{key} holds {word!r}", "no white space, no * ? [ here")
        return value

    def of_variant(self, variant: str) -> str:
        """What ``--config`` takes."""
        return f"{self.config}:{variant}" if variant else str(self.config)

    def manifest(self, name: str) -> str:
        """A set's manifest."""
        return self.places["sets"][name]["manifest"] or f"{self.places['manifests']}/{name}/manifest.jsonl"

    def manifest_words(self, name: str) -> list[str]:
        """make_manifest.py's flags for a set; none if it has its manifest already."""
        known = self.places["sets"][name]
        if known["manifest"]:
            return []
        given = [(key, known[key]) for key in (*FORMS, "root", "split", "text", "language") if known[key] is not None]
        return [
            word for key, value in given for word in (f"--{key}", *(value if isinstance(value, list) else [value]))
        ]

    def folders(self, sets: str) -> list[str]:
        return [f"{self.units}/{name}" for name in self.places[sets] or self.places["train_sets"]]


def chain(system: System) -> list[Stage]:
    """A system's stages, each after those whose output it reads; what the YAML has no block for is left out."""
    stages = [
        *text_model(system),
        *units(system),
        *pretraining(system, "", system.extended, ["train_bpe_tokenizer", *labelled(system, "train_sets")]),
        *tuning(system),
        *evaluation(system),
    ]
    names = {stage.name for stage in stages}
    return [stage._replace(after=[name for name in stage.after if name in names]) for stage in stages]


def labelled(system: System, sets: str) -> list[str]:
    return [f"label_{name}" for name in system.places[sets]]


def text_model(system: System) -> Iterable[Stage]:
    """The pocket language and a base model that has read it, for a system that makes its own."""
    data, untrained = f"{system.work}/data", f"{system.work}/base_untrained"
    if "make_data" in system.blocks:
        made = {"SCRIPT": "tiny/make_data.py", "OUTPUT_DIR": data}
        yield Stage("make_data", "tiny", [], made, arguments=["--output_dir", data])
    if "make_base" in system.blocks:
        made = {"SCRIPT": "tiny/make_base.py", "OUTPUT_DIR": untrained}
        words = ["--mono", f"{data}/mono.jsonl", "--output_dir", untrained]
        yield Stage("make_base", "tiny", ["make_data"], made, arguments=words)
    if "base" in system.blocks:
        yield from pretraining(system, "base", untrained, ["make_base"])


def units(system: System) -> Iterable[Stage]:
    """Audio -> manifests -> units -> tokenizer and extended model."""
    places = system.places
    num_units = system.need("fit_kmeans", "num_units")
    if system.get("train_bpe", "num_units") not in (None, num_units):
        raise UserError(f"{system.config}: num_units differs in fit_kmeans and train_bpe", "give both the same")
    learned, heard = places["train_sets"], [*places["train_sets"], *places["test_sets"]]
    for name in dict.fromkeys(heard):
        if words := system.manifest_words(name):
            made = {"OUTPUT_DIR": f"{places['manifests']}/{name}"}
            yield Stage(f"manifest_{name}", "make_manifest", ["make_data"], made, arguments=words)
    fitted = {"MANIFEST": [system.manifest(name) for name in learned]}
    fitted |= {"AUDIO_ROOT": [places["sets"][name]["root"] for name in learned]}
    fitted |= {"NUM_UNITS": num_units, "OUTPUT_DIR": places["kmeans"]}
    yield Stage("fit_kmeans", "fit_kmeans", ["make_data", *(f"manifest_{name}" for name in learned)], fitted)
    for name in dict.fromkeys(heard):
        shards = math.ceil((places["sets"][name]["hours"] or 0) / places["shard_hours"]) or 1
        given = {"MANIFEST": system.manifest(name), "AUDIO_ROOT": places["sets"][name]["root"]}
        given |= {"KMEANS": places["kmeans"], "OUTPUT_DIR": f"{system.units}/{name}", "NUM_SHARDS": shards}
        after = ["make_data", f"manifest_{name}", "fit_kmeans"]
        yield Stage(f"label_{name}", "label_audio", after, given, tasks=shards)
    given = {
        "UNITS": system.folders("train_sets"),
        "NUM_UNITS": num_units,
        "VOCAB_SIZE": system.get("train_bpe", "vocab_size"),
        "BASE_MODEL": places["base"],
        "INIT": system.get("extend_model", "init"),
        "TOKENIZER_DIR": places["tokenizer"],
        "OUTPUT_DIR": system.extended,
    }
    after = ["make_base", "base_export_checkpoint", *labelled(system, "train_sets")]
    yield Stage("train_bpe_tokenizer", "train_bpe_tokenizer", after, given)


def pretraining(system: System, variant: str, model: str, after: list[str]) -> Iterable[Stage]:
    """Mixture -> checkpoints -> model folders: of the system's base, whose last step counts, or of the system."""
    prefix, config = f"{variant}_" if variant else "", system.of_variant(variant)
    mixture, folder = f"{system.work}/{prefix}mixture", f"{system.work}/{prefix or 'cpt_'}run"
    steps = system.need("continued_pretraining", "keep_steps", variant)
    steps = steps[-1:] if variant else steps
    mixed = {"MIXTURE": config, "TOKENIZER": model, "OUTPUT_DIR": mixture}
    if system.get("build_mixture", "test_sets", variant):  # among them those of speech
        after = [*after, *(f"manifest_{name}" for name in system.places["test_sets"] if system.manifest_words(name))]
    yield Stage(f"{prefix}build_mixture", "build_mixture", after, mixed, variant=variant)
    trained = {"MODEL": model, "MIXTURE": mixture, "CONFIG": config, "OUTPUT_DIR": folder}
    trained["REPLICATE"] = system.get("continued_pretraining", "replicate", variant)
    trained["NPROC_PER_NODE"] = system.places["nproc_per_node"]
    name, after = f"{prefix}continued_pretraining", [f"{prefix}build_mixture"]
    yield Stage(name, "continued_pretraining", after, trained, variant=variant)
    exported = {"RUN_DIR": folder, "STEPS": steps, "MODEL": model}
    exported["OUTPUT_DIR"] = f"{system.work}/{variant or 'models'}"
    name, after = f"{prefix}export_checkpoint", [name]
    yield Stage(name, "export_checkpoint", after, exported, tasks=len(steps), variant=variant)


def exported_models(system: System) -> list[str]:
    return [f"{system.work}/models/checkpoint-{step}" for step in system.need("continued_pretraining", "keep_steps")]


def tuning(system: System) -> Iterable[Stage]:
    """Instruction tuning of the last step."""
    given = {
        "MODEL": exported_models(system)[-1],
        "UNITS": system.folders("sft_sets"),
        "PARALLEL": system.need("build_sft_data", "parallel"),
        "NUM_ASR": system.need("build_sft_data", "num_asr"),
        "NUM_MT": system.need("build_sft_data", "num_mt"),
        "DATA_DIR": f"{system.work}/sft_data",
        "CONFIG": system.config,
        "NPROC_PER_NODE": system.places["nproc_per_node"],
        "OUTPUT_DIR": f"{system.work}/models/sft",
    }
    after = ["make_data", "export_checkpoint", *labelled(system, "train_sets")]
    yield Stage("instruction_tuning", "instruction_tuning", after, given)


def evaluation(system: System) -> Iterable[Stage]:
    """Prompts, outputs, scores. The base and the checkpoints complete a text; the tuned model chats."""
    work, tests = system.work, system.folders("test_sets")
    named = {"MODEL": system.need("score", "model"), "MIXTURE": system.need("score", "mixture")}
    scored, heard, generated = [], labelled(system, "test_sets"), []
    nearest, shuffled = f"{work}/generations/control_nearest", f"{tests[0]}_shuffled"
    if "make_controls" in system.blocks:
        words = ["--train", system.folders("train_sets")[0], "--test", tests[0]]
        words += ["--shuffled_dir", shuffled, "--nearest_dir", nearest]
        made = {"SCRIPT": "tiny/make_controls.py", "OUTPUT_DIR": shuffled}
        after = [*labelled(system, "train_sets"), *heard]
        yield Stage("make_controls", "tiny", after, made, arguments=words)
        scored.append(nearest)
    models = {"": [system.extended, *exported_models(system)], "_sft": [f"{work}/models/sft"]}
    for suffix, style in (("", "original"), ("_sft", "chat")):
        prompts, after = f"{work}/instructions/{style}", ["export_checkpoint", "instruction_tuning"][bool(suffix)]
        shown = {"DATA_ROOT": system.need("build_instructions", "data_root"), "STYLE": style, "OUTPUT_DIR": prompts}
        built = [f"build_instructions{suffix}"]
        yield Stage(built[0], "build_instructions", ["make_data"], shown)
        if "few_shot" in system.blocks:
            built.append(f"build_few_shot{suffix}")
            yield Stage(built[1], "build_instructions", ["make_data"], shown, variant="few_shot")
        decoded, tasks = {"CHECKPOINTS": models[suffix]}, len(models[suffix])
        mt = {**decoded, "PROMPTS": f"{prompts}/*_shot/*.jsonl", "OUTPUT_DIR": f"{work}/generations/mt"}
        yield Stage(f"generate_mt{suffix}", "generate_mt", [after, "train_bpe_tokenizer", *built], mt, tasks)
        controls = [shuffled] if suffix and "make_controls" in system.blocks else []
        asr = {**decoded, "UNITS": tests + controls, "STYLE": style, "OUTPUT_DIR": f"{work}/generations/asr"}
        waits = [after, "train_bpe_tokenizer", *heard, "make_controls"]
        yield Stage(f"generate_asr{suffix}", "generate_asr", waits, asr, tasks)
        generated += [f"generate_mt{suffix}", f"generate_asr{suffix}"]
        scored += [
            f"{work}/generations/{task}/{Path(model).name}" for model in models[suffix] for task in ("mt", "asr")
        ]
    results = f"{work}/results"
    waits = ["make_controls", *generated]
    yield Stage("score", "score", waits, {"GENERATIONS": scored, **named, "OUTPUT_DIR": results})
    if "score_comet" in system.blocks:
        mt = [folder for folder in scored if "/mt/" in folder]
        metrics = system.get("score_comet", "metrics")
        given = {"GENERATIONS": mt, **named, "METRICS": metrics, "OUTPUT_DIR": results}
        yield Stage("comet", "comet", ["score"], given)
    yield Stage("summarize", "summarize", ["score", "comet"], {"RESULTS": [results], "OUTPUT_DIR": f"{work}/summary"})


def choose(stages: list[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages of some names, or of some files (label_audio: all sets).

    Raises:
        UserError: There is no such stage.
    """
    if not names:
        return stages
    chosen: set[str] = set()
    for name in names:
        called = {stage.name for stage in stages if name == stage.name}
        called = called or {stage.name for stage in stages if name == stage.file}
        if not called:
            raise UserError(f"there is no stage {name!r}", f"there are: {', '.join(stage.name for stage in stages)}")
        chosen |= called
    return [stage for stage in stages if stage.name in chosen]


# --- What a stage runs ----------------------------------------------------------------------------
def environment(stage: Stage, system: System, mode: str, overwrite: bool = False) -> dict[str, str]:
    """What sbatch/job.sh and the stage's file read."""
    given = {"TOWERSPEECH_MODE": mode, "TOWERSPEECH_SYSTEM": system.of_variant(stage.variant)}
    if overwrite:
        given["TOWERSPEECH_OVERWRITE"] = "true"
    return {**stage.environment(), **given}


def own_environment(code: Path = ROOT) -> dict[str, str]:
    """This process's environment for a stage's file that runs here: outside of any job that we may be in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TOWERSPEECH_MODE"))}
    return {**kept, "TOWERSPEECH_CODE": str(code)}


def allotted(stage: Stage, options: Sequence[str]) -> dict[str, object]:
    """Slurm's variables of a job, as far as the stage's file and its sbatch options say what it will get."""
    text = (ROOT / f"sbatch/{stage.file}.sbatch").read_text(encoding="utf-8")
    words = [*re.findall(r"(?m)^#SBATCH (\S+)", text), *options]
    nodes = [re.sub(r"\D+", "", word) for word in words if re.fullmatch(r"(--nodes=|-N)\d+", word)]
    gpus = [re.search(r"gpu:(?:\w+:)?(\d+)|$", word)[1] for word in words if word.startswith("--gres=")]
    cpus = [re.sub(r"\D+", "", word) for word in words if re.fullmatch(r"(--cpus-per-task=|-c)\d+", word)]
    given = {"SLURM_JOB_ID": 0, "SLURM_JOB_NODELIST": "nodes", "SLURM_JOB_NUM_NODES": nodes[-1] if nodes else 1}
    given |= {"SLURM_CPUS_PER_TASK": cpus[-1]} if cpus else {}
    return given | ({"SLURM_GPUS_ON_NODE": gpus[-1]} if gpus and gpus[-1] else {})


def here(stage: Stage) -> dict[str, object]:
    """What a stage that runs outside of Slurm is told of this machine."""
    with contextlib.suppress(OSError):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout.count("GPU "):
            return {"SLURM_GPUS_ON_NODE": listed.stdout.count("GPU ")}
    return {}


def commands(stage: Stage, system: System, slurm: dict[str, object], overwrite: bool = False) -> list[list[str]]:
    """The commands that a stage's file runs, as lists of words; ``slurm`` are variables of a job, or a task's.

    Raises:
        UserError: The file refuses its variables.
    """
    given = {**own_environment(), **environment(stage, system, "show", overwrite)}
    given |= {name: str(value) for name, value in slurm.items()}
    file = ROOT / f"sbatch/{stage.file}.sbatch"
    shown = subprocess.run(["bash", file, *stage.arguments], env=given, capture_output=True, text=True)
    if shown.returncode:
        raise UserError(f"{stage.name}: {shown.stderr.strip()}", f"mend {system.config}")
    return [shlex.split(line) for line in shown.stdout.splitlines()]


def typed(words: Sequence[str]) -> str:
    """A command as one types it: patterns of files are left to the shell."""
    return " ".join(word if re.fullmatch(r"[\w@%+=:,./*-]+", word) else shlex.quote(word) for word in words)


def script_of(words: list[str]) -> tuple[Path, list[str]]:
    """The script of a command, and its own words."""
    place = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return Path(words[place]), words[place + 1 :]


def parsed(words: list[str]) -> dict:
    """A command's flags with their defaults, as its own parser takes them.

    Raises:
        UserError: It refuses them.
    """
    import yaml

    script, flags = script_of(words)
    told = subprocess.run(
        [sys.executable, script, *flags, "--print_config"], env=own_environment(), capture_output=True, text=True
    )
    if told.returncode:
        reason = told.stderr.rpartition("error: ")[2].strip() or "see above"
        raise UserError(f"{script} refuses its flags: {reason}", f"it was given: {shlex.join(flags)}")
    return yaml.safe_load(told.stdout)


def parse_all(
    stages: Sequence[Stage], system: System, slurm: Callable[[Stage], dict]
) -> dict[str, list[tuple[str, dict]]]:
    """{stage: [(script's name, its flags) of each command]}; a mistake in the YAML shows before anything runs."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        several = pool.map(lambda stage: commands(stage, system, slurm(stage)), stages)
        shown = dict(zip([stage.name for stage in stages], several, strict=True))
        flat = [words for several in shown.values() for words in several]
        flags = dict(zip(map(tuple, flat), pool.map(parsed, flat), strict=True))
    return {
        name: [(command_name(script_of(words)[0]), flags[tuple(words)]) for words in several]
        for name, several in shown.items()
    }


# --- What is done ---------------------------------------------------------------------------------
def run_infos(name: str, flags: dict) -> list[Path]:
    """Where a command's run_info files lie when it is done."""
    if name == "make_controls":
        return [Path(flags[folder]) / RUN_INFO for folder in ("shuffled_dir", "nearest_dir")]
    folder = Path(flags["output_dir"])
    if name == "label_audio":
        shards = range(flags["num_shards"]) if flags["shard"] is None else [flags["shard"]]
        return [folder / f"{shard_name(shard, flags['num_shards'])}.{RUN_INFO}" for shard in shards]
    if name in ("generate", "generate_ASR"):
        return [folder / Path(checkpoint).name / RUN_INFO for checkpoint in flags["checkpoints"]]
    if name == "build_instructions":
        return [folder / f"{'all' if flags['all'] else flags['shots']}_shot.{RUN_INFO}"]
    return [folder / (f"{name}.{RUN_INFO}" if name in REPLACING else RUN_INFO)]


def differences(name: str, flags: dict, info: dict, folder: Path) -> list[str]:
    """What a run_info records otherwise than a command would now, and what is not as it left it.

    Arguments are compared, and inputs by what the stages that wrote them recorded; no corpus is read.
    """
    flags = plain(as_recorded(name, flags))
    recorded, told = info["arguments"], []
    for key in sorted(flags.keys() & recorded.keys()):
        if recorded[key] != flags[key]:
            told.append(f"{key} was {recorded[key]!r}, now {flags[key]!r}")
    for key, paths in info["paths"].items():
        if key in flags and not same_paths(paths, flags[key]):
            told.append(f"{key} was {' '.join(paths)}, now {flags[key]}")
            continue
        hashes = info["inputs"].get(key) or [""] * len(paths)  # of some inputs the path alone is recorded
        for path, old in zip(paths, hashes, strict=True):
            if old and recorded_hash(Path(path)) not in ("", old):
                told.append(f"{path} is another one now")
    return told + [f"{path} is gone" for path in info["outputs"] if not (folder / path).is_file()]


def as_recorded(name: str, flags: dict) -> dict:
    """A command's flags as its stage records them."""
    if name == "merge_tokenizer" and flags["special_tokens"] is None:  # its own then
        return {key: value for key, value in flags.items() if key != "special_tokens"}
    if name != "build_mixture":
        return flags
    groups = {name: Group(**group) for name, group in (flags["groups"] or {}).items()}
    sources = with_budgets([Source(**source) for source in flags["sources"]], groups)
    files = {
        source.name: [path for name in source.paths if not is_hub(name) for path in files_of_name(name)]
        for source in sources
    }
    named = (flags["test_sets"] or {}).items()
    tested = {name: [path for each in names for path in files_of_name(each)] for name, names in named}
    recorded = {**recorded_files(sources, files), **recorded_test_sets(tested)}
    return {**flags, **recorded, "budgets": recorded_budgets(sources)}


def files_of_name(name: str) -> list[str]:
    """What a name of text means; the name itself if that is gone since."""
    try:
        return [str(path) for path in expand(name)]
    except UserError:
        return [name]


def same_paths(old: list[str], new: list[str] | str | None) -> bool:
    """Whether recorded paths are those that a flag names; of a folder some files may have been recorded."""
    names = new if isinstance(new, list) else [new] if new else []
    wanted = [Path(os.path.abspath(path)) for name in names for path in files_of_name(name)]
    paths = [Path(os.path.abspath(path)) for path in old]
    return paths == wanted or (
        len(wanted) == 1 and all(path.is_relative_to(wanted[0]) for path in paths) and bool(paths)
    )


def recorded_hash(path: Path) -> str:
    """The hash of an input as the stage recorded that wrote it; nothing if none did."""
    if path.is_dir():
        return hash_path(path) if any(path.glob(f"*{RUN_INFO}")) else ""
    for folder in (path.parent, path.parent.parent):
        for file in folder.glob(f"*{RUN_INFO}"):
            outputs = read_json(file, "remove it").get("outputs", {})
            if str(path.relative_to(folder)) in outputs:
                return outputs[str(path.relative_to(folder))]
    return ""


class State(NamedTuple):
    """How far a stage is."""

    done: bool
    there: bool  # whether all its output is, of whatever settings
    refused: list[str]  # what its commands would not replace unless told to


def state(several: list[tuple[str, dict]]) -> State:
    """How far a stage is, by its commands' names and flags."""
    done, there, refused = True, True, []
    for name, flags in several:
        for path in run_infos(name, flags):
            if not path.is_file():
                done = there = False
                continue
            info = read_json(path, "remove it", ["arguments", "paths", "inputs", "outputs"])
            told = differences(name, flags, info, path.parent)
            done = done and not told
            if name not in REPLACING:
                refused += [f"{path.parent}: {line}" for line in told]
    return State(done, there, refused)


def check(chosen: list[Stage], coming: set[str], states: dict[str, State], overwrite: bool) -> None:
    """Refuse what the stages' commands would refuse to replace, and stages whose input neither is there nor will be.

    ``coming`` are the stages that will have ended before.

    Raises:
        UserError: It names all of it.
    """
    refused = [f"{stage.name}: {line}" for stage in chosen for line in states[stage.name].refused]
    if refused and not overwrite:
        told = "\n  ".join(refused)
        raise UserError(
            f"{len(refused)} outputs are of other settings:\n  {told}",
            "--overwrite true replaces them and what was made of them; or name another work folder in the YAML",
        )
    for stage in chosen:
        for name in stage.after:
            if name not in coming and not states[name].there:
                raise UserError(f"{stage.name} reads what {name} makes, which is not there", f"add {name} to --stages")
