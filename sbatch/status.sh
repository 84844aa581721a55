#!/usr/bin/env bash
# How the stages of a submitted chain fare: sbatch/status.sh systems/NAME.yaml
set -euo pipefail
# shellcheck source=sbatch/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
[[ $# != 1 || $1 == -* ]] || set -- --system "$1"
exec "$python" "$repo/sbatch/status.py" "$@"
