#!/usr/bin/env bash
# Set up what the tests need, then lint and test everything. Usage: bash tests/run.sh [pytest's arguments]
# TOWERSPEECH_TEST_DATA names a folder with FLORES-200, WMT23 and the original's outputs; without it their tests skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=()
python3 -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || packages+=(libnuma1) # vLLM on the CPU links it
for program in munged slurmctld slurmd sbatch; do # tests/test_slurm.py starts a Slurm of its own
    PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null || packages+=(munge slurmctld slurmd slurm-client)
done
if ((${#packages[@]})) && [[ $EUID == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
bash install.sh dev tiny smollm2 corpora comet
export PATH="$PWD/.venv/bin:$PATH"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 # the models are so small that threads only wait for one another
export PYTHONUNBUFFERED=1 # progress reaches a log file as it happens

ruff check
ruff format --check
shopt -s nullglob
shellcheck -x ./*.sh ./*/*.sh ./sbatch/*.sbatch .ci/run

# Quick ones first: a mistake shows within minutes. Both parts run in any case; 5 means that nothing was selected.
# Two files at a time, each whole: what a file trains once serves its tests.
status=5
for part in "not slow" slow; do
    code=0
    python -m pytest -n 2 --dist loadfile --durations=15 -m "$part" "$@" || code=$?
    if [[ $code != 0 && $code != 5 ]]; then
        status=$code
    elif [[ $code == 0 && $status == 5 ]]; then
        status=0
    fi
done
exit "$status"
