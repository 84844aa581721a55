#!/usr/bin/env bash
# The whole pipeline on a laptop: sets up what it needs, then audio -> units -> ... -> results table and plot.
# Usage: bash tiny/run.sh [output folder, default runs/tiny] [systems/run.py's options]
# Killed and run again, it goes on; run once more, it says that all is done.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=()
if [[ $# -gt 0 && $1 != --* ]]; then
  work=(--work "$1")
  shift
fi

bash "$repo/install.sh" tiny
export OMP_NUM_THREADS=1 # one thread a process: the same sums in the same order
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_VERBOSITY=error # ours stay
python="$repo/.venv/bin/python"
"$python" "$repo/systems/run.py" --system "$repo/systems/tiny.yaml" "${work[@]}" "$@"
results=${work[1]:-$repo/runs/tiny}/results
if [[ $# == 0 ]]; then
  "$python" "$repo/tiny/check_scores.py" --results "$results" --limits "$repo/tiny/limits.yaml"
fi
