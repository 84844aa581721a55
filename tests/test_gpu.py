"""What only a machine with NVIDIA GPUs can show: bf16, FSDP2 over NCCL, and vLLM on the GPU. Skips without CUDA."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
]


def call(*words) -> str:
    found = subprocess.run(list(map(str, words)), capture_output=True, text=True, env={**os.environ})
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout


def test_bf16_matmul_is_close_to_fp32():
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(512, 512, device="cuda", generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    rounded = (a.bfloat16() @ b.bfloat16()).double()
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.01  # bf16 keeps 8 bits of a number


def test_bf16_forward_is_close_to_the_cpu(model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.arange(5, 69).unsqueeze(0)  # (1, 64)
    with torch.inference_mode():
        on_cpu = model(ids).logits.softmax(-1)
        on_gpu = model.to("cuda", torch.bfloat16)(ids.cuda()).logits.float().softmax(-1).cpu()
    assert (on_cpu - on_gpu).abs().max() < 0.05


def test_training_over_nccl_follows_the_cpu_and_vllm_decodes_it(tmp_path, model_dir):
    """One run on all GPUs (sharded) against one on the CPU, both fp32; then the bf16 export through vLLM."""
    text = tmp_path / "mono.jsonl"
    text.write_text("".join(json.dumps({"text": f"the old captain sees {i} boats"}) + "\n" for i in range(200)))
    mixture = tmp_path / "mixture"
    sources = [{"name": "mono", "kind": "text", "paths": [str(text)], "budget": 4096, "max_epochs": 8}]
    build = [REPO / "data_mixture/build_mixture.py", "--tokenizer", model_dir, "--output_dir", mixture]
    call(sys.executable, *build, "--sources", json.dumps(sources))

    gpus = torch.cuda.device_count()
    batch = 4 * math.lcm(gpus, 2)
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node"]
    losses = {}
    for device, processes in (("cpu", 1), ("cuda", gpus)):
        words = [*torchrun, processes, REPO / "continued_pretraining/train.py", "--model", model_dir]
        words += ["--mixture", mixture, "--output_dir", tmp_path / device, "--device", device]
        words += ["--sequence_length", 64, "--global_batch_size", batch, "--dtype", "float32", "--log_every", 1]
        call(*words, "--learning_rate", "1e-3", "--shard", processes)
        lines = (tmp_path / device / "train.log").read_text().splitlines()
        losses[device] = [json.loads(line)["loss"] for line in lines]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)
    assert losses["cuda"][-1] < losses["cuda"][0]

    steps = len(losses["cuda"])
    export = [REPO / "continued_pretraining/export_checkpoint.py", "--model", model_dir, "--dtype", "bfloat16"]
    exported = tmp_path / f"checkpoint-{steps}"
    checkpoint = tmp_path / "cuda" / f"checkpoint-{steps}"
    call(sys.executable, *export, "--checkpoint", checkpoint, "--output_dir", exported)

    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": str(i), "instruction": f"the old captain sees {i}", "output": "boats"} for i in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate = [REPO / "generate/generate.py", "--checkpoints", exported, "--prompts", prompts]
    generate += ["--max_new_tokens", 16, "--dtype", "bfloat16", "--gpu_memory_utilization", 0.3]
    call(sys.executable, *generate, "--output_dir", tmp_path / "generations")
    results = (tmp_path / "generations" / exported.name / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in results] == [row["id"] for row in rows]
    assert all(0 < json.loads(line)["num_tokens"] <= 16 for line in results)


@pytest.mark.parametrize("large", [True, False], ids=["large-like", "base-like"])
def test_units_on_the_gpu_are_nearly_those_of_the_cpu(tmp_path, large, record_property):
    """bfloat16 in padded batches (base-like: equal lengths) beside float32 alone: the share of frames that differ."""
    import numpy as np

    from speech_units import features
    from speech_units.kmeans import Nearest
    from tests.speech_units.test_speech_units import small_encoder

    small_encoder(tmp_path, "hubert", large, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    config = features.encoder_config("hubert", str(tmp_path), 3)
    rng = np.random.default_rng(0)
    lengths = rng.integers(16_000, 160_000, 24) if large else [80_000] * 24
    samples = [features.prepare(rng.standard_normal(length).astype("f4"), config) for length in lengths]
    found = {}
    for device in ("cpu", "cuda"):
        encoder = features.Encoder(config, device)
        frames = encoder.encode(samples)
        if device == "cpu":
            assert encoder.batches == "alone"
            centroids = torch.cat(frames)[::37][:200].numpy()
        else:
            assert encoder.batches == ("padded" if large else "equal")
        found[device] = torch.cat(Nearest(centroids, encoder.device)(frames)).cpu()
    differing = (found["cpu"] != found["cuda"]).float().mean().item()
    record_property("share_of_units_that_differ", differing)
    print(f"{differing:.2%} of {len(found['cpu']):,} units differ")
    assert differing < 0.03  # with bfloat16 on a CPU 0.4% and 0.7%; on a GPU not measured yet


def test_kmeans_on_the_gpu_is_as_near_as_on_the_cpu(tmp_path):
    import numpy as np

    from speech_units import kmeans

    rng = np.random.default_rng(0)
    centres = rng.normal(0, 3, (500, 64))[rng.integers(0, 500, 60_000)]
    frames = (centres + rng.normal(0, 0.6, centres.shape)).astype("f4")
    on_cpu = kmeans.fit(frames, 300, seed=0)
    on_gpu = kmeans.fit(frames, 300, seed=0, device="cuda", kept=tmp_path / "kept")
    assert on_gpu.used == 300
    assert on_gpu.distance == pytest.approx(on_cpu.distance, rel=0.01)
