"""Engines' processes: shares, ends and messages, with real processes and a stand-in for vLLM.

tests/generate/test_generate.py runs the real vLLM.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest

from towerspeech import engine
from towerspeech.engine import Request, Result
from towerspeech.errors import UserError

ENGINE, SAMPLING = {"tensor_parallel_size": 1}, {"temperature": 0.0}


def requests_of(count: int) -> list[Request]:
    return [Request(key, [1, key], 5, 100 + key, ["\n"]) for key in range(count)]


@pytest.fixture
def decode(monkeypatch, tmp_path) -> Callable:
    """``run_engines`` over forked processes in which a given function stands for ``run_engine``."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(engine.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(engine, "on_gpu", lambda: False)

    def start(function: Callable, count: int = 5, ranks: int = 1):
        def run_engine(*arguments) -> None:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not pytest's, but what goes to the log
            function(*arguments)

        monkeypatch.setattr(engine, "run_engine", run_engine)
        return engine.run_engines(requests_of(count), ENGINE, SAMPLING, ranks, tmp_path / "vllm.log")

    return start


def answer(sender, requests, *_) -> None:
    sender.send(None)
    for request in requests:
        sender.send(Result(request.key, f"{os.getpid()}", "stop", 1, 0))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_take_turns_and_every_request_is_answered_once(decode, ranks):
    results = list(decode(answer, 7, ranks))
    assert results.count(None) == ranks
    answered = [result for result in results if result]
    assert sorted(result.key for result in answered) == list(range(7))
    processes = {result.text for result in answered}
    assert len(processes) == ranks and str(os.getpid()) not in processes
    for process in processes:
        keys = [result.key for result in answered if result.text == process]
        assert keys == list(range(keys[0], 7, ranks))  # neighbours share prefixes: 0 2 4 6 and 1 3 5 of two


def test_an_engine_that_fails_is_told_of_with_this_attempts_last_error(decode, tmp_path):
    (tmp_path / "vllm.log").write_text("OldError: of an earlier attempt\n")

    def fails(sender, requests, *_) -> None:
        sender.send(None)
        sender.send(Result(0, "", "stop", 1, 0))
        print("a FirstError: forgotten")
        raise ValueError("no room for the cache")

    found = []
    with pytest.raises(UserError) as error:
        found.extend(iter(decode(fails)))
    assert str(error.value).splitlines()[0] == (
        "vLLM ended with status 1, 4 prompts not done: ValueError: no room for the cache"
    )
    log = (tmp_path / "vllm.log").read_text()
    assert log.startswith("OldError") and "FirstError" in log and "Traceback" in log

    def silent(sender, *_) -> None:
        os._exit(3)

    with pytest.raises(UserError, match="status 3, 5 prompts not done: no word of why in its log"):
        list(decode(silent))


def test_results_before_an_end_are_given_out(decode):
    def dies(sender, requests, *_) -> None:
        answer(sender, requests[:3])
        os.kill(os.getpid(), signal.SIGKILL)

    found = []
    with pytest.raises(UserError, match="status -9, 2 prompts not done"):
        for result in decode(dies):
            found.append(result)
    assert [result and result.key for result in found] == [None, 0, 1, 2]


def test_an_engine_that_ends_well_without_all_its_answers_is_an_error(decode):
    with pytest.raises(UserError, match="status 0, 1 prompts not done"):
        list(decode(lambda sender, requests, *_: answer(sender, requests[:-1])))


def test_one_of_two_that_dies_ends_the_other(decode, tmp_path):
    def one_dies(sender, requests, *_) -> None:
        (tmp_path / f"pid{requests[0].key}").write_text(str(os.getpid()))
        sender.send(None)
        if requests[0].key == 1:
            while not (tmp_path / "ready").exists():
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / "ready").touch()
        time.sleep(5)
        (tmp_path / "outlived").touch()

    found = []
    with pytest.raises(UserError, match="status -9, 5 prompts not done"):
        for result in decode(one_dies, ranks=2):
            found.append(result)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    assert not any(map(psutil.pid_exists, pids)) and not (tmp_path / "outlived").exists()


def test_who_stops_listening_leaves_no_engine(decode):
    results = decode(
        lambda sender, *_: (sender.send(None), sender.send(Result(0, f"{os.getpid()}", "", 1, 0)), time.sleep(600))
    )
    assert next(results) is None
    process = psutil.Process(int(next(results).text))
    assert process.is_running()
    results.close()
    assert not process.is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_an_engine_dies_with_its_parent(decode, tmp_path):
    def waits(sender, *_) -> None:
        (tmp_path / "pid").write_text(f"{os.getpid()}\n")
        sender.send(None)
        time.sleep(600)

    def parent() -> None:
        assert next(results := decode(waits)) is None
        os.kill(os.getpid(), signal.SIGKILL)
        results.close()  # never

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.01)


# --- One engine -----------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_requests_reach_vllm_and_results_come_back(monkeypatch, temperature):
    """What is added to an engine, and what is taken from its outputs, by vLLM's names for them."""
    added, sent = [], []

    def output(key: str, text: str, tokens: int, cached: int | None) -> SimpleNamespace:
        done = SimpleNamespace(text=text, finish_reason="length", token_ids=[0] * tokens)
        return SimpleNamespace(request_id=key, outputs=[done], num_cached_tokens=cached)

    steps = [[], [output("1", "b", 5, 32)], [output("0", "a", 4, None)]]
    own = SimpleNamespace(
        add_request=lambda *request: added.append(request),
        has_unfinished_requests=lambda: bool(steps),
        step=lambda: steps.pop(0),
    )
    vllm = SimpleNamespace(
        LLM=lambda **given: SimpleNamespace(llm_engine=own, given=given), SamplingParams=lambda **given: given
    )
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="the end alone"))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", kinds)
    requests = [Request(0, [1, 5], 4, 17, ["\n"]), Request(1, [1, 6, 7], 5, 18, [])]
    sampling = {"temperature": temperature, "top_p": 0.9, "stop_token_ids": [2]}
    engine.run_engine(SimpleNamespace(send=sent.append), requests, ENGINE, sampling)
    assert sent == [None, Result(1, "b", "length", 5, 32), Result(0, "a", "length", 4, 0)]
    assert [(key, prompt) for key, prompt, _ in added] == [
        ("0", {"prompt_token_ids": [1, 5]}),
        ("1", {"prompt_token_ids": [1, 6, 7]}),
    ]
    shared = {**sampling, "output_kind": "the end alone"}
    assert [params for *_, params in added] == [
        {**shared, "max_tokens": 4, "seed": 17 if temperature else None, "stop": ["\n"]},
        {**shared, "max_tokens": 5, "seed": 18 if temperature else None, "stop": []},
    ]


# --- Shares of the machine ------------------------------------------------------------------------
def test_gpus_are_shared_out_in_order(monkeypatch):
    monkeypatch.setattr(engine, "on_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    visible = "CUDA_VISIBLE_DEVICES"
    assert [engine.environment(rank, 2, 2)[visible] for rank in (0, 1)] == ["0,1", "2,3"]
    assert visible not in engine.environment(0, 1, 2)
    monkeypatch.setenv(visible, "7,3,5")
    assert [engine.environment(rank, 3, 1)[visible] for rank in (0, 1, 2)] == ["7", "3", "5"]
    with pytest.raises(UserError, match="2 engines x 2 GPUs wanted, but CUDA_VISIBLE_DEVICES=7,3,5"):
        engine.environment(0, 2, 2)


def test_cores_are_shared_out_and_what_is_set_wins(monkeypatch):
    monkeypatch.setattr(engine, "on_gpu", lambda: False)
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 8})
    found = [engine.environment(rank, 2, 1) for rank in (0, 1)]
    assert [variables["VLLM_CPU_OMP_THREADS_BIND"] for variables in found] == ["2,3", "5,7,8"]
    assert {variables["OMP_NUM_THREADS"] for variables in found} == {"2"}
    assert "OMP_NUM_THREADS" not in engine.environment(0, 1, 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4})
    assert [engine.environment(rank, 2, 1)["VLLM_CPU_OMP_THREADS_BIND"] for rank in (0, 1)] == ["4", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert engine.environment(0, 2, 1)["OMP_NUM_THREADS"] == "9"


def test_the_cache_of_a_cpu_engine(monkeypatch):
    memory = {"SC_PHYS_PAGES": 1 << 22, "SC_PAGE_SIZE": 4096}  # 16 GiB
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    config = {"num_hidden_layers": 1, "num_attention_heads": 8, "hidden_size": 1024, "num_key_value_heads": 2}
    # A token: keys and values, 4 bytes, 1 layer, 2 heads of 128. A request: whole blocks of 32, and one more.
    token = 2 * 4 * 1 * 2 * 128
    assert token == 2048
    assert engine.kv_cache_bytes(config, [1000] * 100, 1) == token * 100 * 33 * 32
    assert engine.kv_cache_bytes(config, [100] * 200 + [1000] * 100, 1) == token * (100 * 33 + 156 * 5) * 32
    assert engine.kv_cache_bytes({**config, "head_dim": 64}, [1000] * 100, 1) == token * 100 * 33 * 32 // 2
    del config["num_key_value_heads"]
    assert engine.kv_cache_bytes(config, [1000] * 10, 1) == 4 * token * 10 * 33 * 32
    assert engine.kv_cache_bytes(config, [10], 1) == 64 << 20  # at least
    assert engine.kv_cache_bytes(config, [10**6] * 256, 1) == 2 << 30  # at most, an eighth of the memory
    assert engine.kv_cache_bytes(config, [10**6] * 256, 4) == 512 << 20
    assert engine.kv_cache_bytes({}, [10], 2) == 1 << 30  # an architecture that tells of no heads
