"""Which files belong beside a model's weights, and which folders are a run's checkpoints."""

import pytest

from towerspeech.errors import UserError
from towerspeech.model_folder import (
    TOKENIZER_FILES,
    check_tokenizer_fits,
    checkpoint_step,
    checkpoints,
    copy_files,
    notes,
)


def test_notes_are_neither_weights_nor_tokenizer(tmp_path):
    model, copy = tmp_path / "model", tmp_path / "copy"
    (model / "original").mkdir(parents=True)
    copy.mkdir()
    kept = {"config.json", "generation_config.json", "LICENSE", "README.md", "NOTICE.txt"}
    others = {"model.safetensors", "model.safetensors.index.json", "model.bin", "modeling.py", "run_info.json", ".git"}
    for name in {*kept, *others, "tokenizer.json", "merges.txt"}:
        (model / name).write_text(name)
    assert set(notes(model)) == kept
    copy_files(model, copy, TOKENIZER_FILES)
    assert {path.name: path.read_text() for path in copy.iterdir()} == {
        "tokenizer.json": "tokenizer.json",
        "merges.txt": "merges.txt",
    }


def test_a_tokenizer_fits_up_to_the_last_row(tmp_path):
    check_tokenizer_fits(tmp_path, 64, 64)
    with pytest.raises(UserError, match="its tokenizer has 1,065 tokens, its model only 1,064 embedding rows"):
        check_tokenizer_fits(tmp_path, 1065, 1064)


def test_checkpoints_are_folders_in_the_order_of_their_steps(tmp_path):
    for end in ("10", "9", "100", "07", "4-backup", "old-7", "", "²"):
        (tmp_path / f"checkpoint-{end}").mkdir()
    (tmp_path / "checkpoint-11").write_text("mine")
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [9, 10, 100]
    assert checkpoints(tmp_path / "nowhere") == []
