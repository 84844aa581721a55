"""The script's folder leads sys.path, as it does when the script is run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "instructions"))
