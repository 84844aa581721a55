"""Turn a checkpoint of train.py into a Hugging Face model folder, for vLLM, SFT and everything else.

Usage: python continued_pretraining/export_checkpoint.py --checkpoint runs/towerspeech_6b/checkpoint-5000 \\
           --model extended_model/ --output_dir models/towerspeech_6b/checkpoint-5000

Reads checkpoint-<step>/ and the model folder that training began with (config and tokenizer); writes a folder with
safetensors, config and tokenizer.
"""

from pathlib import Path
from typing import Literal

from towerspeech.command import run
from towerspeech.errors import UserError
from towerspeech.files import read_json
from towerspeech.model_folder import save_trained
from towerspeech.stage import RUN_INFO, hash_path, stage


def export_checkpoint(
    checkpoint: Path,
    model: Path,
    output_dir: Path,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    overwrite: bool = False,
) -> None:
    """Export a checkpoint.

    Args:
        checkpoint: A checkpoint-<step> folder.
        model: The --model that train.py was given.
        output_dir: New model folder.
        dtype: Number format of the exported weights; the checkpoint's are float32.
        overwrite: Replace the output of a run with other arguments.
    """
    arguments = dict(locals())
    made_by = "name a checkpoint-<step> folder of continued_pretraining/train.py"
    info = read_json(checkpoint / RUN_INFO, made_by, ["step", "tokens", "plan"])
    with stage(__file__, output_dir, arguments, inputs=["checkpoint", "model"]) as work:
        if work.done:
            return
        if info["plan"]["inputs"]["model"] != [hash_path(model)]:
            raise UserError(f"{checkpoint} was not trained from {model}", "name the --model that train.py was given")
        import warnings

        import torch
        import torch.distributed.checkpoint as dcp
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what we want
            dcp.load({"model": network.state_dict()}, checkpoint_id=checkpoint, no_dist=True)  # in place
        network.to(getattr(torch, dtype))
        with work.publish() as folder:
            save_trained(network, model, folder)
        work.counts.update({"step": info["step"], "tokens": info["tokens"]})
        print(f"step {info['step']:,}, {sum(info['tokens'].values()):,} tokens, {dtype}: {output_dir}")


if __name__ == "__main__":
    run(export_checkpoint)
