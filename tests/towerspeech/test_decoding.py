"""What decoding keeps, asks for and publishes, over states that a kill really left.

The engine is stood in for (vLLM takes 20 s to start); tests/generate/test_generate.py runs the real one.
"""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from generate.generate import generate
from generate.generate_ASR import generate_ASR
from towerspeech import decoding, engine, prompts
from towerspeech.errors import UserError
from towerspeech.records import read_jsonl, read_prompts, write_jsonl

NEVER = 10**9
PARTIAL_0, PARTIAL_5 = ".0_shot-t.jsonl.partial", ".5_shot-t.jsonl.partial"


class Engine:
    """Answers in the place of ``run_engines``: from last to first, so that completion has an order of its own.

    An answer tells of all that decides a real one: the prompt's ids, the seed, the limit, the stop rule.
    """

    def __init__(self, kill_after: int = NEVER):
        self.kill_after = kill_after  # results
        self.asked: list[engine.Request] = []
        self.arguments: dict = {}
        self.sampling: dict = {}
        self.ranks = 0

    def __call__(self, requests, arguments, sampling, ranks, log):
        self.asked, self.arguments, self.sampling, self.ranks = requests, arguments, sampling, ranks
        yield None
        for number, request in enumerate(reversed(requests)):
            if number == self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            key, ids, max_tokens, seed, stop = request
            text = f" {sum(ids)} {len(ids)} {max_tokens} {seed} {stop} " + "long " * 20
            yield engine.Result(key, text, "length" if len(ids) % 2 else "stop", 3, 1)
        if self.kill_after == len(requests):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def decode(monkeypatch, tmp_path, model_dir) -> Callable[..., Engine]:
    """Run generate.py into tmp_path/<name>; returns the engine, which knows what it was asked for."""
    monkeypatch.setattr(engine, "on_gpu", lambda: False)

    def run(name: str, files: list[Path], kill_after: int = NEVER, checkpoint: Path = model_dir, **settings) -> Engine:
        own = Engine(kill_after)
        monkeypatch.setattr(engine, "run_engines", own)
        generate([checkpoint], files, tmp_path / name, **settings)
        return own

    return run


def killed(function: Callable, *arguments, by: int = signal.SIGKILL, **options) -> None:
    """Run a function in a process of its own, which a signal must end."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join(100)
    assert process.exitcode == -by


def rows_of(texts: list[str], **facts) -> list[dict]:
    return [{"id": chr(97 + i), "instruction": text, "output": f"r{i}", **facts} for i, text in enumerate(texts)]


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Five and three prompts, of which some have the same text, some the same id."""
    write_jsonl(tmp_path / "0_shot/t.jsonl", rows_of(["the dog", "a boat", "the dog", "my sister", "the dog"]))
    write_jsonl(tmp_path / "5_shot/t.jsonl", rows_of(["a boat", "the dog", "the red boat"]))
    return [tmp_path / "0_shot/t.jsonl", tmp_path / "5_shot/t.jsonl"]


def outputs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.jsonl")}


def on_disk(folder: Path) -> int:
    """Whole results, in whatever file."""
    return sum(path.read_bytes().count(b"\n") for path in [*folder.rglob("*.jsonl"), *folder.rglob(".*.partial")])


# --- Resume ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("after", range(9))
def test_killed_after_any_result_it_asks_for_the_others_alone(tmp_path, model_dir, decode, files, after):
    whole = decode("whole", files, temperature=0.7)
    assert len(whole.asked) == 8
    killed(decode, "killed", files, after, temperature=0.7)
    assert on_disk(tmp_path / "killed") == after
    assert not list((tmp_path / "killed").rglob("run_info.json"))
    again = decode("killed", files, temperature=0.7)
    known = {(tuple(r.prompt_token_ids), r.seed): r for r in whole.asked}
    assert len(known) == 8
    missing = [(tuple(r.prompt_token_ids), r.seed) for r in whole.asked[: 8 - after]]
    assert [(tuple(r.prompt_token_ids), r.seed) for r in again.asked] == missing  # the others were answered
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*.partial"))
    info = json.loads((tmp_path / "killed" / model_dir.name / "run_info.json").read_text())
    assert info["counts"]["prompts"] == 8 and info["counts"]["new_tokens"] == 24  # 3 each


def test_killed_again_and_again_in_the_same_file(tmp_path, decode, files):
    decode("whole", files)
    for kill in range(1, 8):
        killed(decode, "killed", files, 1)
        assert on_disk(tmp_path / "killed") == kill
    assert len(decode("killed", files).asked) == 1
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


def test_a_line_that_a_kill_cut_off_is_decoded_anew(tmp_path, model_dir, decode):
    """The kernel itself ends the process in the middle of a write: at a limit of a file's size."""
    write_jsonl(tmp_path / "t.jsonl", rows_of([f"the dog {i}" for i in range(20)]))
    files = [tmp_path / "t.jsonl"]
    decode("whole", files)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        decode("killed", files)

    killed(limited, by=signal.SIGXFSZ)
    partial = tmp_path / "killed" / model_dir.name / ".t.jsonl.partial"
    left = partial.read_bytes()
    assert len(left) == 5000 and not left.endswith(b"\n")
    found = decoding.finished_rows(partial, read_jsonl(tmp_path / "t.jsonl"))
    assert 1 < len(found) == left.count(b"\n") < 20
    assert partial.read_bytes() == left[: left.rindex(b"\n") + 1]  # what is appended begins a line
    assert len(decode("killed", files).asked) == 20 - len(found)
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


def test_killed_before_and_after_a_file_appears(tmp_path, model_dir, decode, files, monkeypatch):
    decode("whole", files)
    write = decoding.write_jsonl

    def dies(after: bool) -> None:
        def dying(target, rows):
            if after:
                write(target, rows)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(decoding, "write_jsonl", dying)
        decode("killed", files[1:] if alone else files)

    for alone in (True, False):
        for after in (True, False):
            killed(dies, after)
            folder = tmp_path / "killed" / model_dir.name
            assert (folder / PARTIAL_5).is_file() and (folder / "5_shot/t.jsonl").is_file() == after
            again = decode("killed", files[1:] if alone else files)
            assert len(again.asked) == (0 if alone else 5)
            assert not list(folder.glob(".*.partial"))
            made, wanted = outputs(tmp_path / "killed"), outputs(tmp_path / "whole")
            assert made == {name: text for name, text in wanted.items() if not alone or "5_shot" in name}
            shutil.rmtree(tmp_path / "killed")


def test_results_of_other_prompts_are_not_taken(tmp_path, model_dir, decode, files):
    """By the prompt's text, not by its id alone: templates change with the code, which no argument shows."""
    killed(decode, "killed", files, 6)
    partial = tmp_path / "killed" / model_dir.name / PARTIAL_0
    rows = read_jsonl(files[0])
    assert len(decoding.finished_rows(partial, rows)) == partial.read_bytes().count(b"\n") > 2
    same = [read_jsonl(partial)[i]["id"] for i in (0, 1)]
    changed = [row if row["id"] in same else {**row, "instruction": row["instruction"] + "."} for row in rows]
    assert list(decoding.finished_rows(partial, changed)) == same
    chat = [{**row, "messages": [{"role": "user", "content": row["instruction"]}]} for row in rows]
    assert decoding.finished_rows(partial, chat) == {}
    assert decoding.finished_rows(partial, [{**row, "id": f"new {row['id']}"} for row in rows]) == {}
    assert decoding.finished_rows(tmp_path / "nowhere", rows) == {}


def test_a_changed_template_decodes_all_anew(tmp_path, model_dir, decode, make_units, monkeypatch):
    folder = make_units(tmp_path / "clean", 6)

    def decode_units(name: str, template: str, kill_after: int = NEVER) -> Engine:
        own = Engine(kill_after)
        monkeypatch.setattr(engine, "run_engines", own)
        monkeypatch.setattr(prompts, "asr", lambda speech: template.format(speech))
        generate_ASR([model_dir], tmp_path / name, units=[folder])
        return own

    killed(decode_units, "killed", "Speech: {} \nEnglish:", 4)
    partial = tmp_path / "killed" / model_dir.name / ".asr-clean.jsonl.partial"
    assert partial.read_bytes().count(b"\n") == 4
    assert len(decode_units("killed", "Speech: {}\nEnglish:").asked) == 6
    decode_units("whole", "Speech: {}\nEnglish:")
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")


def test_done_is_done_and_other_settings_are_refused(tmp_path, decode, files, capsys):
    assert len(decode("out", files).asked) == 8
    before = outputs(tmp_path)
    assert decode("out", files, data_parallel_size=2, gpu_memory_utilization=0.5).asked == []  # these change speed
    assert "already done" in capsys.readouterr().out
    for other in ({"temperature": 0.5}, {"seed": 1}, {"max_new_tokens": 7}, {"top_p": 0.5}, {"dtype": "bfloat16"}):
        with pytest.raises(UserError, match=f"{next(iter(other))} was .*, now "):
            decode("out", files, **other)
    write_jsonl(files[1], rows_of(["another prompt"]))
    with pytest.raises(UserError, match="the content of prompts differs"):
        decode("out", files)
    write_jsonl(files[1], read_jsonl(files[0]))
    assert {name: text for name, text in before.items() if name.startswith("out/")}.items() <= outputs(
        tmp_path
    ).items()


# --- What is asked for ----------------------------------------------------------------------------
def test_prompts_of_the_same_text_are_sampled_from_streams_of_their_own(decode, files):
    seeds = [r.seed for r in decode("a", files, temperature=0.7).asked]
    assert len(set(seeds)) == 8
    assert 0x8B3D98A3 in seeds  # printf '0 0_shot/t.jsonl a' | sha256sum
    others = [r.seed for r in decode("b", files, temperature=0.7, seed=1).asked]
    assert len({*seeds, *others}) == 16
    alone = [r.seed for r in decode("c", files[1:], temperature=0.7).asked]
    assert set(alone) < set(seeds)  # whatever else is decoded


def test_ids_are_sentencepieces_behind_one_bos(decode, files, base_model_dir):
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(base_model_dir / "tokenizer.model"))
    texts = ["the dog", "a boat", "the dog", "my sister", "the dog", "a boat", "the dog", "the red boat"]
    asked = [request.prompt_token_ids for request in decode("out", files).asked]
    assert Counter(map(tuple, asked)) == Counter((1, *reference.encode(text)) for text in texts)


def ids_of(folder: Path, text: str) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


def test_a_prompt_of_exactly_the_limits_length(tmp_path, model_dir, decode, files):
    """One token must be left to write; what is left bounds the generation."""
    write_jsonl(tmp_path / "t.jsonl", rows_of(["the dog", "the old captain sees a small dog"]))
    file, longest = [tmp_path / "t.jsonl"], ids_of(model_dir, "the old captain sees a small dog")
    short = ids_of(model_dir, "the dog")
    for limit in (longest - 1, longest):
        with pytest.raises(UserError, match=rf"t\.jsonl:2: prompt 'b' has {longest} tokens, .* {limit}\n"):
            decode(f"refused {limit}", file, max_model_len=limit)
    for limit in (longest + 1, longest + 2, 400):
        asked = decode(f"{limit}", file, max_model_len=limit, max_new_tokens=20)
        assert asked.arguments["max_model_len"] == min(limit, longest + 20)  # no more, for a CPU's cache must hold it
        assert {len(r.prompt_token_ids): r.max_tokens for r in asked.asked} == {
            longest: min(limit - longest, 20),
            short: min(limit - short, 20),
        }


def test_the_models_own_context_is_the_limit(tmp_path, model_dir, decode):
    folder = Path(shutil.copytree(model_dir, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    length = ids_of(model_dir, "the old captain")
    write_jsonl(tmp_path / "t.jsonl", rows_of(["the old captain"]))
    for context in (length, length + 1):
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
        if context == length:
            with pytest.raises(UserError, match=f"prompt 'a' has {length} tokens"):
                decode("out", [tmp_path / "t.jsonl"], checkpoint=folder)
    (request,) = decode("other", [tmp_path / "t.jsonl"], checkpoint=folder).asked
    assert request.max_tokens == 1
    with pytest.raises(UserError, match=f"--max_model_len is {length + 2}, but the context of .* is {length + 1} tok"):
        decode("out", [tmp_path / "t.jsonl"], checkpoint=folder, max_model_len=length + 2)


def test_settings_reach_the_engine(tmp_path, model_dir, decode, files):
    chat = {"id": "z", "messages": [{"role": "user", "content": "the dog"}], "output": "r"}
    write_jsonl(tmp_path / "chat.jsonl", [chat])
    settings = {"temperature": 0.25, "top_p": 0.75, "seed": 9, "data_parallel_size": 3}
    asked = decode("out", [*files, tmp_path / "chat.jsonl"], **settings)
    vocabulary = json.loads((model_dir / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in vocabulary}
    assert asked.sampling == {
        "temperature": 0.25,
        "top_p": 0.75,
        "stop_token_ids": sorted([2, ids["<EOD>"], ids["<|im_end|>"]]),  # </s> is Llama's 2
    }
    assert asked.ranks == 3
    wanted = {"dtype": "float32", "seed": 9, "max_model_len": 512, "enable_prefix_caching": True}
    assert wanted.items() <= asked.arguments.items() and asked.arguments["model"] == str(model_dir)
    assert decode("bf16", files, dtype="bfloat16").arguments["dtype"] == "bfloat16"
    # A completion ends at a newline, a chat answer at an end-of-sequence id alone.
    assert sorted(request.stop for request in asked.asked) == [[], *[["\n"]] * 8]
    (request,) = [request for request in asked.asked if not request.stop]
    assert request.prompt_token_ids[0] == ids["<|im_start|>"]
    assert request.max_tokens == 512 - len(request.prompt_token_ids)  # fewer than --max_new_tokens 1024


def test_prompts_that_begin_alike_are_neighbours(tmp_path, decode):
    texts = ["the dog one", "a boat one", "the dog two", "a boat two", "the dog three", "a boat three"]
    write_jsonl(tmp_path / "t.jsonl", rows_of(texts))
    begins = [tuple(r.prompt_token_ids[:3]) for r in decode("out", [tmp_path / "t.jsonl"]).asked]
    assert begins[0] == begins[1] == begins[2] and begins[3] == begins[4] == begins[5]
    assert begins[0] != begins[3]


# --- What is published ----------------------------------------------------------------------------
def test_rows_are_in_the_prompts_order_with_their_facts(tmp_path, model_dir, decode):
    facts = {"task": "mt", "dataset": "d", "shots": 0, "src_lang": "en", "tgt_lang": "de"}
    write_jsonl(tmp_path / "t.jsonl", rows_of(["the dog", "a boat", "my sister"], **facts, source="S"))
    asked = decode("out", [tmp_path / "t.jsonl"])
    rows = read_jsonl(tmp_path / "out" / model_dir.name / "t.jsonl")
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["reference"] for row in rows] == ["r0", "r1", "r2"]
    lengths = [ids_of(model_dir, text) for text in ("the dog", "a boat", "my sister")]
    assert [int(row["text"].split()[1]) for row in rows] == lengths
    assert rows[0]["text"].startswith(" ")  # raw
    assert {name: rows[0][name] for name in (*facts, "source")} == {**facts, "source": "S"}
    assert rows[0]["num_tokens"] == 3
    # printf '"the dog"' | sha256sum
    assert rows[0]["prompt_sha256"] == "646df1f6bc4ea8733bdfd84be43dbe325335e010983a7fa305b4691144294b2e"
    reasons = Counter("length" if length % 2 else "stop" for length in lengths)
    assert Counter(row["finish_reason"] for row in rows) == reasons
    counts = json.loads((tmp_path / "out" / model_dir.name / "run_info.json").read_text())["counts"]
    assert (counts["prompts"], counts["new_tokens"], counts["finish_reasons"]) == (3, 9, reasons)
    last = counts["last_attempt"]
    assert (last["prompts"], last["prompt_tokens"], last["cached_tokens"]) == (3, sum(lengths), 3)
    assert len(asked.asked) == 3


def generation(model_dir: Path, tasks: dict[str, list[dict]], output_dir: Path) -> decoding.Generation:
    work = SimpleNamespace(output_dir=output_dir, counts={})
    return decoding.Generation(model_dir, tasks, decoding.Decoding(max_new_tokens=1024), work)


def test_finish_orders_and_removes_what_was_partial(tmp_path, model_dir):
    name = "0_shot/t.jsonl"
    partial = decoding.partial_file(tmp_path, name)
    unordered = generation(model_dir, {name: rows_of(["x", "y"])}, tmp_path)
    unordered.results[name] = {"b": {"id": "b"}, "a": {"id": "a"}}
    partial.write_text("old\n")
    unordered.finish(name)
    assert (tmp_path / "0_shot/t.jsonl").read_text() == '{"id": "a"}\n{"id": "b"}\n' and not partial.exists()
    names = [decoding.partial_file(tmp_path, f"{folder}t.jsonl") for folder in ("0_shot/", "5_shot/", "asr/", "")]
    assert len(set(names)) == 4 and all(name.parent == tmp_path and name.name.startswith(".") for name in names)


def test_a_task_is_published_as_soon_as_its_last_prompt_is_done(tmp_path, model_dir, decode, files):
    killed(decode, "killed", files, 3)
    folder = tmp_path / "killed" / model_dir.name
    whole = [path for path in (folder / "0_shot/t.jsonl", folder / "5_shot/t.jsonl") if path.is_file()]
    assert whole == [folder / "5_shot/t.jsonl"]  # of three prompts, which are answered first here
    assert not (folder / PARTIAL_5).exists() and not (folder / PARTIAL_0).exists()


def test_a_generation_finishes_what_needs_no_engine(tmp_path, model_dir, decode, files, monkeypatch):
    """All results are there, in the partial files alone: no engine is started for none."""
    decode("whole", files)
    tasks = read_prompts(files)
    for name in tasks:
        shutil.copy(tmp_path / "whole" / model_dir.name / name, decoding.partial_file(tmp_path, name))
    monkeypatch.delattr(engine, "run_engines")
    for file in files:
        file.unlink()  # they lie where the outputs go here
    whole = generation(model_dir, tasks, tmp_path)
    whole.run()
    assert whole.work.counts["new_tokens"] == 24 and "last_attempt" not in whole.work.counts
    for name in tasks:
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / model_dir.name / name).read_bytes()


# --- Prompt files ---------------------------------------------------------------------------------
def test_names_and_ids_of_prompt_files(tmp_path):
    rows = [{"instruction": "x", "output": "1"}, {"id": "own", "instruction": "y", "output": "2"}]
    for name in (
        "0_shot/a.jsonl",
        "5_shot/a.jsonl",
        "asr/a.jsonl",
        "st/a.jsonl",
        "cascaded_st/a.jsonl",
        "other/a.jsonl",
    ):
        write_jsonl(tmp_path / name, rows)
    found = read_prompts(sorted(tmp_path.rglob("*.jsonl")))
    assert sorted(found) == [
        "0_shot/a.jsonl", "5_shot/a.jsonl", "a.jsonl", "asr/a.jsonl", "cascaded_st/a.jsonl", "st/a.jsonl",
    ]  # fmt: skip
    assert [row["id"] for row in found["a.jsonl"]] == ["a-0", "own"]
    assert [row["where"] for row in found["a.jsonl"]] == [f"{tmp_path}/other/a.jsonl:{i}" for i in (1, 2)]


def test_an_id_that_was_given_twice_is_refused_wherever_it_stands(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [*rows_of(["x", "y", "z"]), {"id": "a", "instruction": "x", "output": ""}])
    with pytest.raises(UserError, match=r"t\.jsonl:4: id 'a' repeats"):
        read_prompts([tmp_path / "t.jsonl"])


# --- generate_ASR.py ------------------------------------------------------------------------------
def test_speech_is_asked_for_by_its_units(tmp_path, model_dir, make_units, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folders = [
        make_units(tmp_path / name, [{"units": units, "text": "t"}]) for name, units in (("b", [7, 3]), ("a", [49]))
    ]
    asked = {}
    monkeypatch.setattr(engine, "on_gpu", lambda: False)
    for style in ("original", "chat"):
        own = Engine()
        monkeypatch.setattr(engine, "run_engines", own)
        generate_ASR([model_dir], tmp_path / style, units=folders, style=style)
        asked[style] = sorted(tokenizer.decode(request.prompt_token_ids) for request in own.asked)
        assert {request.max_tokens for request in own.asked} == {128}
        assert sorted(path.name for path in (tmp_path / style).rglob("asr/*.jsonl")) == ["a.jsonl", "b.jsonl"]
        (row,) = read_jsonl(tmp_path / style / model_dir.name / "asr/b.jsonl")
        assert (row["task"], row["dataset"], row["reference"], row["source"]) == ("asr", "b", "t", "utt0000.wav")
    asr = ["Speech: \U000f0007\U000f0003\nEnglish:", "Speech: \U000f0031\nEnglish:"]
    assert asked["original"] == [f"<s> {text}" for text in asr] or asked["original"] == [f"<s>{text}" for text in asr]
    assert asked["chat"] == [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in asr]
    with pytest.raises(UserError, match="two units folders have the same name"):
        generate_ASR([model_dir], tmp_path / "twice", units=[folders[0], folders[0]])
    too_many = make_units(tmp_path / "c", [{"units": [50]}])
    with pytest.raises(UserError, match="unit id 50 is outside 0..49"):
        generate_ASR([model_dir], tmp_path / "out", units=[too_many])
    assert not list((tmp_path / "out").rglob("*.jsonl"))


@pytest.mark.parametrize("option", ["data_parallel_size", "tensor_parallel_size", "max_new_tokens"])
def test_sizes_are_1_or_more(tmp_path, model_dir, files, decode, option):
    with pytest.raises(UserError, match=f"--{option} is 0\n"):
        decode("out", files, **{option: 0})
    assert not (tmp_path / "out").exists()


# --- What prompts are about -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "facts"),
    [
        ("5_shot/flores_de-en.json", ("mt", "flores", 5, "de", "en")),
        ("0_shot/wmt23_en-zh.json", ("mt", "wmt23", 0, "en", "zh")),
        ("0_shot/AST_de.json", ("cascaded_st", "AST", 0, "en", "de")),
    ],
)
def test_the_originals_lists_say_by_their_names_what_they_are(tmp_path, file, facts, capsys):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text('[{"instruction": "x", "output": "y"}]')
    [[row]] = read_prompts([tmp_path / file]).values()
    assert tuple(row[name] for name in ("task", "dataset", "shots", "src_lang", "tgt_lang")) == facts
    assert "cannot score" not in capsys.readouterr().out


def test_facts_are_the_rows_own_else_given_else_the_names(tmp_path, capsys):
    (tmp_path / "flores_de-en.json").write_text(
        '[{"instruction": "x", "output": "y", "tgt_lang": "fr", "shots": null}]'
    )
    given = {"dataset": "mine", "shots": 3, "src_lang": None}
    [[row]] = read_prompts([tmp_path / "flores_de-en.json"], given).values()
    facts = {"dataset": "mine", "shots": 3, "src_lang": "de", "tgt_lang": "fr", "task": "mt"}
    assert facts.items() <= row.items()
    (tmp_path / "some.json").write_text('[{"instruction": "x", "output": "y"}]')
    read_prompts([tmp_path / "some.json"])
    said = "some.json: nothing says its task, shots, src_lang, tgt_lang, without which score.py cannot score it"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": "b\nc"}, "the reference has several lines"),
        ({"instruction": "a", "output": 3}, "its output is a int, but a text is wanted: 3"),
        ({"messages": [{"content": "a"}]}, "message 1: it has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: it has no content, but a text is wanted"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
            "message 1: its content is a list, but a text is wanted",
        ),
        ({"messages": ["a"]}, "message 1 is 'a', but an object"),
        ({"messages": []}, "messages must be a list of turns"),
        ({"messages": {"role": "user"}}, "messages must be a list of turns"),
    ],
)
def test_prompts_that_cannot_be_are_named_by_row(tmp_path, row, message):
    fine = {"instruction": "a", "output": "b\n"}
    write_jsonl(tmp_path / "p.jsonl", [fine, row])
    with pytest.raises(UserError, match=rf"p\.jsonl:2[:,] {message}"):
        read_prompts([tmp_path / "p.jsonl"])
