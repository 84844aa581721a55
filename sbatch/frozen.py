"""A copy of the code for jobs that wait: what is edited in the checkout afterwards changes none of them."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from towerspeech.errors import UserError
from towerspeech.files import publish
from towerspeech.stage import FROZEN, commit
from towerspeech.system import ROOT

NEW = {".py", ".sh", ".sbatch", ".yaml"}  # files that git does not know yet and that are code all the same


def code_files() -> list[Path]:
    """The checkout's files, from its folder: git's as they are now, new ones beside them, and the site's settings."""
    listed = _git("ls-files", "-z", "--cached")
    if not listed:
        raise UserError(f"{ROOT} is no git checkout, of which jobs could run a copy", "git clone it")
    rooms = sorted({path.parts[0] for path in listed if len(path.parts) > 1})
    new = _git("ls-files", "-z", "--others", "--exclude-standard", "--", *rooms)  # elsewhere may lie terabytes
    paths = {*listed, *(path for path in new if path.suffix in NEW), Path("sbatch/site.env")}
    return sorted(path for path in paths if (ROOT / path).is_file())


def _git(*words: str) -> list[Path]:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    return [Path(name) for name in done.stdout.split("\0") if name] if done.returncode == 0 else []


def freeze(system: Path, folder: Path) -> tuple[Path, Path]:
    """Copy code and a system's YAML below ``folder``, once for each content; returns both copies' paths."""
    digest, files = hashlib.sha256(system.read_bytes()), code_files()
    for path in files:
        digest.update(f"{path} {os.access(ROOT / path, os.X_OK)}\n".encode() + (ROOT / path).read_bytes())
    frozen = folder / digest.hexdigest()[:12]
    if not frozen.is_dir():
        with publish(frozen) as copy:
            for path in files:
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, copy / path)
            shutil.copy(system, copy / system.name)
            (copy / FROZEN).write_text(commit() + "\n", encoding="utf-8")
    return frozen, frozen / system.name
