#!/usr/bin/env bash
# The whole pipeline on a laptop: sets up what it needs, then audio -> units -> ... -> results table and plot.
# Usage: bash tiny/run.sh [output folder, default runs/tiny] [tiny/pipeline.py's options]
# Killed and run again, it goes on; run once more, it says that all is done.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output_dir="$repo/runs/tiny"
if [[ $# -gt 0 && $1 != --* ]]; then
  output_dir=$1
  shift
fi

bash "$repo/install.sh" tiny
exec "$repo/.venv/bin/python" "$repo/tiny/pipeline.py" --output_dir "$output_dir" "$@"
