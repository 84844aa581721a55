"""The whole pipeline, as tiny/run.sh runs it: killed twice it goes on, it learns, and it knows when all is done."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.other_ways import with_transformers
from tiny import pipeline
from tiny.check_scores import problems
from towerspeech.errors import UserError
from towerspeech.records import (
    read_jsonl,
    read_prompts,
)
from towerspeech.speech_prompts import speech_rows
from towerspeech.tokenizer import read_metadata

REPO = Path(__file__).resolve().parent.parent


# --- Without running it ---------------------------------------------------------------------------
@pytest.fixture
def plan(tmp_path, monkeypatch):
    """The commands of a run, (script, settings), as the pipeline gives them to its runner; nothing is run."""

    def commands(split: str = "test", seed: int = 0) -> list[tuple[str, dict]]:
        given = []

        class Recorder:
            def __init__(self, processes: int):
                self.processes = processes

            def __call__(self, script: str, **settings) -> None:
                given.append((script, settings))

            def seconds(self) -> str:
                return "0 s"

        (tmp_path / "base_run/checkpoint-90").mkdir(parents=True, exist_ok=True)
        (tmp_path / "base_run/checkpoint-100").mkdir(exist_ok=True)
        monkeypatch.setattr(pipeline, "Runner", Recorder)
        pipeline.pipeline(tmp_path, split=split, seed=seed, processes=3)
        (tmp_path / pipeline.FINISHED).unlink()
        return given

    return commands


def words_of(settings: dict) -> list[str]:
    return [str(word) for value in settings.values() for word in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("split", ["test", "tuning"])
def test_nothing_learns_from_what_is_scored(plan, tmp_path, split):
    """Until the controls are made, the evaluated split is named by its own labelling alone."""
    given = plan(split)
    scripts = [script for script, _ in given]
    until = scripts.index("tiny/make_controls.py")
    flores = {"test": "devtest", "tuning": "dev"}[split]
    named = [
        (script, word)
        for script, settings in given[:until]
        for word in words_of(settings)
        if word.startswith(str(tmp_path)) and (split in Path(word).parts[-1] or "flores" in word)
    ]
    assert named == [
        ("speech_units/label_audio.py", f"{tmp_path}/units/{split}"),
        ("speech_units/label_audio.py", f"{tmp_path}/data/audio/{split}.jsonl"),
    ]
    built = [settings for script, settings in given if script == "instructions/build_instructions.py"]
    assert [settings["shots"] for settings in built] == [0, 5, 0, 5]
    for settings in built:
        assert (settings["split"], settings["test_lines"]) == (flores, "1-100")
        if settings["shots"]:
            assert (settings["example_split"], settings["example_lines"]) == ("dev", "151-200")
    assert ("tiny/check_scores.py" in scripts) == (split == "test")  # the limits are the test split's


def test_the_order_and_what_each_stage_builds_on(plan, tmp_path):
    given = plan(seed=7)
    first = {}
    for script, settings in given:
        first.setdefault(script, []).append(settings)
    assert [settings["checkpoint"].name for settings in first["continued_pretraining/export_checkpoint.py"]] == [
        "checkpoint-100",  # the last one, by number
        "checkpoint-600",
        "checkpoint-1200",
        "checkpoint-1800",
    ]
    (tuning,) = first["instruction_tuning/train.py"]
    assert tuning["model"] == tmp_path / "models/checkpoint-1800" and tuning["sft.num_train_epochs"] == 1
    decoded = {
        (task, s["checkpoints"][0].name): len(s["checkpoints"])
        for task in ("generate/generate.py",)
        for s in first[task]
    }
    assert decoded == {("generate/generate.py", "base"): 4, ("generate/generate.py", "sft"): 1}
    styles = [(s["checkpoints"][0].name, s["style"]) for s in first["generate/generate_ASR.py"]]
    assert styles == [("base", "original"), ("sft", "chat")]
    seeded = {script for script, settings in given if settings.get("seed") == 7}
    assert seeded == {
        "tiny/make_base.py",
        "data_mixture/build_mixture.py",
        "train_bpe_tokenizer/extend_model.py",
        "instruction_tuning/build_sft_data.py",
        "instruction_tuning/train.py",
    }
    (scored,) = first["results/score.py"]
    assert len(scored["generations"]) == 11  # the control, and five models' mt and asr
    written = [settings["output_dir"] for _, settings in given if "output_dir" in settings]
    folders = [folder for folder in written if folder.parent.name not in ("instructions", "generations")]
    assert len(set(folders)) == len(folders)  # else one stage would refuse the other's


def test_flags_as_one_types_them():
    settings = {
        "num_units": 100,
        "bos": True,
        "keep_steps": [1, 2],
        "paths": [Path("a b")],
        "sources": [{"name": "x"}],
    }
    words = ["--num_units", "100", "--bos", "true", "--keep_steps", "1", "2", "--paths", "a b"]
    assert pipeline.flags(settings) == [*words, "--sources", '[{"name": "x"}]']
    assert pipeline.flags({"sft.lr": 3e-3, "off": False}) == ["--sft.lr", "0.003", "--off", "false"]


def test_what_is_finished_and_what_is_not(tmp_path, capsys):
    request = {"settings": {"a": 1}, "split": "test", "seed": 0, "processes": 2}
    assert not pipeline.finished(tmp_path, request)
    for name in ("results/tiny/base.csv", "summary/table.md", "summary/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    # printf 'summary/table.md' | sha256sum
    outputs = {
        "results/tiny/base.csv": "348a7d4967bbbf0143d0edcb5ddfe2311047ebbc134ecdcc6369b25595dff210",
        "summary/table.md": "79a4d93360468bdaa26b3374f7e53c6c7059f8548bbe9573587e99bbcc93e7f3",
    }
    (tmp_path / "finished.json").write_text(json.dumps({**request, "outputs": outputs}))
    assert pipeline.finished(tmp_path, request)
    for other in ({"settings": {"a": 2}}, {"split": "tuning"}, {"seed": 1}, {"processes": 1}):
        assert not pipeline.finished(tmp_path, {**request, **other})
    (tmp_path / "results/tiny/sft.csv").write_text("one more")
    assert not pipeline.finished(tmp_path, request)
    (tmp_path / "results/tiny/sft.csv").unlink()
    (tmp_path / "summary/table.md").write_text("changed")
    assert not pipeline.finished(tmp_path, request)
    (tmp_path / "summary/table.md").unlink()
    assert not pipeline.finished(tmp_path, request)


def test_a_stage_that_fails_ends_the_run_and_is_named(capfd):
    do = pipeline.Runner(2)
    with pytest.raises(UserError, match="tiny/check_scores.py ended with status 1\n.*goes on from there"):
        do("tiny/check_scores.py", results=Path("/nowhere"), limits=REPO / "tiny/ci_limits.yaml")
    shown = capfd.readouterr()
    assert (
        "[stage 1, " in shown.out
        and "tiny/check_scores.py --results /nowhere --limits tiny/ci_limits.yaml" in shown.out
    )
    assert "/nowhere does not exist" in shown.err


# --- A whole run ----------------------------------------------------------------------------------
def start(root: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP")}
    with open(root.with_suffix(".log"), "ab") as log:
        command = ["bash", str(REPO / "tiny/run.sh"), str(root)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def stopped(process: psutil.Process) -> list[psutil.Process]:
    """A process and all below it, each stopped before it is asked for its children: none is born meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        process.suspend()
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)
        return [process, *(other for child in process.children() for other in stopped(child))]
    return []


def kill_when(process: subprocess.Popen, ready, seconds: float) -> None:
    """SIGKILL a process and all its children as soon as ``ready()``."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the pipeline ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    everybody = stopped(psutil.Process(process.pid))
    for one in everybody:
        one.kill()
    process.wait()
    assert not psutil.wait_procs(everybody, timeout=60)[1]


def begun(folder: Path) -> bool:
    """Whether some results of a checkpoint are on the disk."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):  # just published
            return path.stat().st_size > 0
    return False


def finish(root: Path) -> str:
    process = start(root)
    assert process.wait() == 0, root.with_suffix(".log").read_text()[-3000:]
    return root.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory) -> tuple[Path, str]:
    """A run that is killed in the middle of continued pretraining and in the middle of generation."""
    root = tmp_path_factory.mktemp("pipeline") / "killed"
    log = root / "cpt_run/train.log"
    kill_when(start(root), lambda: log.is_file() and log.read_text().count("\n") >= 85, 1800)
    steps = sorted(int(path.name.split("-")[1]) for path in (root / "cpt_run").glob("checkpoint-*"))
    assert len(steps) >= 2 and steps[0] == 600 and 800 <= steps[-1] < 1800  # however late the kill came
    kill_when(start(root), lambda: begun(root / "generations/mt/checkpoint-600"), 1800)
    printed = finish(root)
    assert f"going on after step {steps[-1]}" in printed and "prompts were done before" in printed
    return root, printed


@pytest.mark.slow
def test_it_learns(killed_run):
    """The limits were fixed on the tuning split, before the test split was opened: see the YAML."""
    assert problems(killed_run[0] / "results/tiny", REPO / "tiny/ci_limits.yaml") == []


@pytest.mark.slow
def test_every_output_of_the_tuned_model_is_transformers_own(killed_run):
    """Greedy search in float32, token for token: translation 0- and 5-shot, speech, and shuffled speech."""
    root = killed_run[0]
    model = root / "models/sft"
    prompts = read_prompts(list(root.glob("instructions/chat/*_shot/*.jsonl")))
    tasks = {f"mt/sft/{name}": rows for name, rows in prompts.items()}
    dsu = read_metadata(model)
    for name in ("test", "test_shuffled"):
        rows = speech_rows(root / "units" / name, name, "chat", dsu["offset"], dsu["num_units"])
        tasks[f"asr/sft/asr/{name}.jsonl"] = rows
    assert {name: len(rows) for name, rows in tasks.items()} == {
        **{f"mt/sft/{shots}_shot/tiny_{pair}.jsonl": 100 for shots in (0, 5) for pair in ("de-en", "en-de")},
        **{f"asr/sft/asr/{name}.jsonl": 200 for name in ("test", "test_shuffled")},
    }
    theirs, _ = with_transformers(model, tasks, max_new_tokens=64, batch_size=16)
    for name, rows in tasks.items():
        ours = read_jsonl(root / "generations" / name)
        assert [row["id"] for row in ours] == [row["id"] for row in rows]
        for row, (text, num_tokens) in zip(ours, theirs[name], strict=True):
            assert (row["text"].strip(), row["num_tokens"]) == (text.strip(), num_tokens), (name, row["id"])


@pytest.mark.slow
def test_its_prompts_are_the_committed_ones(killed_run):
    root, _ = killed_run
    for shots in (0, 5):
        built = {path.name: path.read_bytes() for path in root.glob(f"instructions/original/{shots}_shot/*.jsonl")}
        committed = {path.name: path.read_bytes() for path in REPO.glob(f"instructions/{shots}_shot/tiny_*.jsonl")}
        assert built == committed and len(built) == 2


@pytest.mark.slow
def test_run_again_it_says_that_all_is_done(killed_run):
    root, before = killed_run
    printed = finish(root)[len(before) :]
    assert "all done before" in printed and "| sft" in printed and "[stage" not in printed  # not one script is asked


@pytest.mark.slow
def test_the_generations_that_were_killed_are_an_unbroken_runs(killed_run):
    """Decoded anew without a kill and scored anew, the CSVs are the same bytes. test_train.py does so for training."""
    root, _ = killed_run
    printed = root.with_suffix(".log").read_text()
    csvs = sorted((root / "results/tiny").glob("*.csv"))
    assert [path.stem for path in csvs] == ["1200", "1800", "600", "base", "control_nearest", "sft"]
    before = {path: path.read_bytes() for path in csvs}
    table = (root / "summary/table.md").read_bytes()
    for name in ("generations/mt/checkpoint-600", "results", "summary"):
        shutil.rmtree(root / name)
    printed = finish(root)[len(printed) :]
    assert printed.count("already done") > 20 and printed.count("starting vLLM") == 1
    assert {path: path.read_bytes() for path in csvs} == before
    assert (root / "summary/table.md").read_bytes() == table
    assert (root / "summary/scores.png").stat().st_size > 10_000
