"""vLLM engines in processes of their own: one a data-parallel rank, gone with their memory when they are done.

vLLM runs offline data parallelism as one process a rank, each with its share of the prompts (its own example,
examples/features/data_parallel). With the engine apart, a crash in native code reaches us as an exit status, and a
GPU's memory is free for the next checkpoint.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

from towerspeech.command import quiet
from towerspeech.errors import UserError

# Tokens of a block of the cache. Only whole blocks of a common prefix are shared, so the smallest that vLLM's CPU
# kernels take (its own choice is 128): five same examples before 100 prompts then decode in 12.4 s instead of 17.3 s.
CPU_BLOCK = 32


class Request(NamedTuple):
    """One prompt as the engine takes it."""

    key: int
    prompt_token_ids: list[int]
    max_tokens: int
    seed: int
    stop: list[str]


class Result(NamedTuple):
    """One generation; ``cached`` of the prompt's tokens came from the prefix cache."""

    key: int
    text: str
    finish_reason: str
    num_tokens: int
    cached: int


def on_gpu() -> bool:
    """Whether vLLM runs on CUDA devices here."""
    import torch

    return torch.cuda.is_available()


def run_engines(
    requests: list[Request], engine: dict, sampling: dict, ranks: int, log: Path
) -> Iterator[Result | None]:
    """Decode requests with ``ranks`` engines; yield results in order of completion, and None when an engine is up.

    Neighbours share prefixes, as far as prompts do; ranks take turns in them.

    Args:
        engine: Arguments of ``vllm.LLM``.
        sampling: Arguments of ``vllm.SamplingParams`` that all requests share.
        ranks: Engines, each with tensor_parallel_size GPUs (or its share of the CPU's cores).
        log: File for everything that vLLM prints.

    Raises:
        UserError: A process ended before its share was done; results that were yielded stay good.
    """
    # A fork server imports vLLM once for all engines; its children come into being without a CUDA context.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm"])
    environments = [environment(rank, ranks, engine["tensor_parallel_size"]) for rank in range(ranks)]
    if "OMP_NUM_THREADS" in environments[0]:  # read when OpenMP is loaded: by the fork server's import
        os.environ["OMP_NUM_THREADS"] = environments[0]["OMP_NUM_THREADS"]
    processes: dict[Connection, multiprocessing.Process] = {}
    missing = len(requests)
    log_size = log.stat().st_size if log.is_file() else 0  # what an earlier attempt said
    try:
        with quiet(log):
            for rank, variables in enumerate(environments):
                receiver, sender = context.Pipe(duplex=False)
                own = (sender, requests[rank::ranks], engine, sampling, variables, log)
                processes[receiver] = context.Process(target=serve, args=own, name=f"engine-{rank}")
                processes[receiver].start()
                sender.close()
        while processes:
            for connection in wait(list(processes)):
                try:
                    result = connection.recv()
                except (EOFError, OSError):  # its end, or an end in the middle of a message
                    process = processes.pop(connection)
                    process.join()
                    if process.exitcode or (missing and not processes):
                        raise UserError(
                            f"vLLM ended with status {process.exitcode}, {missing:,} prompts not done: "
                            f"{last_error(log, log_size)}",
                            f"see {log}; what was decoded is kept, the same command goes on from there",
                        ) from None
                else:
                    missing -= result is not None
                    yield result
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def serve(
    sender: Connection, requests: list[Request], engine: dict, sampling: dict, variables: dict, log: Path
) -> None:
    """An engine's process: start it, send None, then each result as it is done."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)  # die with the parent, however it dies
        if not on_gpu():
            # glibc hands large blocks back to the system, and gets them anew in each layer, page by page. Where they
            # are kept, decoding takes a quarter less time. By malloc.h M_MMAP_THRESHOLD is -3, M_TRIM_THRESHOLD -1.
            libc.mallopt(-3, 1 << 30)
            libc.mallopt(-1, -1)
    os.environ.update(variables)
    with quiet(log):
        try:
            run_engine(sender, requests, engine, sampling)
        except Exception:
            traceback.print_exc()  # here, while the log is open
            sys.exit(1)
    sender.close()


def run_engine(sender: Connection, requests: list[Request], engine: dict, sampling: dict) -> None:
    """One engine, from its start to its last result."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(**engine)
    sender.send(None)
    for request in requests:
        params = SamplingParams(
            **sampling,
            max_tokens=request.max_tokens,
            seed=request.seed if sampling["temperature"] else None,
            stop=request.stop,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        llm.llm_engine.add_request(str(request.key), {"prompt_token_ids": request.prompt_token_ids}, params)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            done = output.outputs[0]
            own = (done.text, done.finish_reason, len(done.token_ids), output.num_cached_tokens or 0)
            sender.send(Result(int(output.request_id), *own))


def environment(rank: int, ranks: int, gpus: int) -> dict[str, str]:
    """A rank's share of the machine, as environment variables for its process. Those that are set already win."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}  # the engine is in our process already
    if on_gpu():
        if ranks > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks * gpus)))).split(",")
            if len(visible) < ranks * gpus:
                raise UserError(
                    f"{ranks} engines x {gpus} GPUs wanted, but CUDA_VISIBLE_DEVICES={','.join(visible)}",
                    "ask for more GPUs, or lower --data_parallel_size",
                )
            return {**variables, "CUDA_VISIBLE_DEVICES": ",".join(visible[rank * gpus : (rank + 1) * gpus])}
    elif ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        own = cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] or cores
        variables["OMP_NUM_THREADS"] = str(max(1, len(cores) // ranks))
        variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, own))
    return {name: os.environ.get(name, value) for name, value in variables.items()}


def kv_cache_bytes(config: dict, lengths: list[int], ranks: int) -> int:
    """What a CPU engine's cache is to hold: 256 requests (vLLM's own limit), the longest ones, in float32.

    An eighth of the memory at most: the cache is cleared at the start, which takes a second a gigabyte. ``lengths``
    are tokens of each request, prompt and generation together; ``ranks`` engines share the memory.
    """
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 // ranks
    if not {"num_hidden_layers", "num_attention_heads", "hidden_size"} <= config.keys():
        return most
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    a_token = 2 * 4 * config["num_hidden_layers"] * heads * width
    tokens = sum((length // CPU_BLOCK + 2) * CPU_BLOCK for length in sorted(lengths)[-256:])
    return min(max(a_token * tokens, 1 << 26), most)


def last_error(log: Path, start: int) -> str:
    """The last line of a log that tells of an error, from byte ``start`` on."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    told = [line.strip() for line in lines if "Error" in line]
    return told[-1][:300] if told else "no word of why in its log"
