#!/usr/bin/env bash
# Submit a system's chain to Slurm: sbatch/submit_pipeline.sh systems/NAME.yaml [--dry_run] [--stages a,b] [--overwrite]
# Reads sbatch/site.env, then runs sbatch/submit_pipeline.py, which says what it does (--help).
set -euo pipefail
words=()
for word in "$@"; do
    case "$word" in
    --dry_run | --overwrite) words+=("$word" true) ;;
    true | --system) ;; # as in --dry_run true, --system systems/tiny.yaml
    *.yaml | *.yml) words+=(--system "$word") ;;
    *) words+=("$word") ;;
    esac
done
# shellcheck source=sbatch/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$python" "$repo/sbatch/submit_pipeline.py" "${words[@]}"
