# shellcheck shell=bash
# For submit_pipeline.sh and status.sh: the site's settings, $repo, and $python with our libraries.
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -f $repo/sbatch/site.env ]]; then
    set +eu # module and conda know nothing of it
    # shellcheck disable=SC1091 # a site's own
    source "$repo/sbatch/site.env"
    set -eu
fi
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}" # this checkout's library, wherever another one is installed
python=$repo/.venv/bin/python
[[ -x $python ]] || python=$(command -v python || true)
[[ -n $python ]] || { printf 'error: there is no .venv here\n  -> bash install.sh\n' >&2; exit 1; }
