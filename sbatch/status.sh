#!/usr/bin/env bash
# How the stages of a chain fare: done, running, waiting or failed, with the last line of each log.
# Usage: sbatch/status.sh CONFIG.env        (the one that submit_pipeline.sh was given)
# States come from sacct where there is accounting, else from squeue, else from what the job's log says last.
set -euo pipefail

die() { printf 'error: %s\n  -> %s\n' "$1" "$2" >&2; exit 1; }

[[ ${1:-} != -h && ${1:-} != --help ]] || { sed -n '2,4s/^# //p' "$0"; exit 0; }
config=${1:-}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f $config ]] || die "no config ${config:-given}" "sbatch/status.sh sbatch/towerspeech_6b.env"
# shellcheck source=sbatch/pipeline.sh
source sbatch/pipeline.sh
read_config "$config"
[[ -f $JOBS ]] || die "$JOBS does not exist: nothing was submitted" "sbatch/submit_pipeline.sh $config"

# Slurm's states of a job or of an array's tasks, each with their number: "2 COMPLETED, 1 RUNNING".
states() { # job
    local found=""
    # sacct's "-X" is one line a task. Where there is no accounting, squeue knows a job for a while after its end.
    found=$(sacct --noheader -X --parsable2 --jobs="$1" --format=State 2>/dev/null) || found=""
    [[ -n $found ]] || found=$(squeue --noheader --array --states=all --jobs="$1" --format=%T 2>/dev/null) || found=""
    awk 'NF { count[$1]++ } END { for (state in count) printf "%s%d %s", (n++ ? ", " : ""), count[state], state }' <<<"$found"
}

# The newest of a stage's logs (an array has one a task), and of it the last line that says something.
last_line() { # stage, job
    local log=""
    log=$(find logs -maxdepth 1 \( -name "$1-$2.out" -o -name "$1-$2_*.out" \) -printf '%T@ %p\n' 2>/dev/null | sort -n |
        tail -n 1 | cut -d' ' -f2-) || true
    [[ -z $log ]] || tr '\r' '\n' <"$log" | awk 'NF { last = $0 } END { print substr(last, 1, 150) }'
}

{
    printf 'stage\tjob\tstate\tlast line of its log\n'
    while IFS=$'\t' read -r stage job _; do
        line=-
        if [[ $job == - ]]; then
            state="done before"
        else
            state=$(states "$job")
            line=$(last_line "$stage" "$job")
            if [[ -z $state ]]; then # Slurm has forgotten it
                case "$line" in
                "== "*": done") state="done" ;;
                "== "*": error:"*) state="failed" ;;
                *) state="unknown to Slurm" ;;
                esac
            fi
        fi
        printf '%s\t%s\t%s\t%s\n' "$stage" "$job" "$state" "${line:--}"
    done < <(tail -n +2 "$JOBS")
} | if command -v column >/dev/null; then column -t -s $'\t'; else cat; fi
