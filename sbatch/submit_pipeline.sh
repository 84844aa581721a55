#!/usr/bin/env bash
# Submit the whole chain, audio to scores, to Slurm: each stage waits for those whose output it reads.
# Usage: sbatch/submit_pipeline.sh CONFIG.env [--dry_run]        (from the repo's folder)
# Reads the settings (sbatch/towerspeech_6b.env shows them, sbatch/README.md explains them) and sbatch/site.env; writes
# <WORK>/jobs.tsv: stage, job or "-" (done before), log. Submitted again, it leaves out what is done or still queued.
# --dry_run prints the sbatch commands and submits nothing.
set -euo pipefail

die() { printf 'error: %s\n  -> %s\n' "$1" "$2" >&2; exit 1; }

dry_run=false config=""
for word in "$@"; do
    case "$word" in
    --dry_run) dry_run=true ;;
    -h | --help) sed -n '2,6s/^# //p' "$0"; exit 0 ;;
    -*) die "unknown option $word" "sbatch/submit_pipeline.sh CONFIG.env [--dry_run]" ;;
    *) [[ -z $config ]] || die "two configs: $config and $word" "name one"; config=$word ;;
    esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." # jobs start where they are submitted
[[ -n $config && -f $config ]] || die "no config ${config:-given}" "sbatch/submit_pipeline.sh sbatch/towerspeech_6b.env"
if [[ -f sbatch/site.env ]]; then
    set +eu # module and conda know nothing of it
    # shellcheck disable=SC1091 # a site's own
    source sbatch/site.env
    set -eu
fi
# shellcheck source=sbatch/pipeline.sh
source sbatch/pipeline.sh
read_config "$config"
$dry_run || command -v sbatch >/dev/null || die "there is no sbatch here" "log in to a node that submits jobs"
inputs=("$BASE_MODEL/config.json" "$MIXTURE" "$CPT_CONFIG" "$SFT_CONFIG" "${PARALLEL[@]}" "$DATA_ROOT" "$AUDIO_ROOT")
for set in "${TRAIN_SETS[@]}" "${TEST_SETS[@]}"; do inputs+=("$MANIFESTS/$set.jsonl"); done
for file in "${inputs[@]}"; do
    $dry_run || [[ -e $file ]] || die "$file does not exist" "mend $config (the paths of a list hold no blanks)"
done

if ! $dry_run; then
    mkdir -p logs "$WORK"
    exec 9>"$WORK/.submit.lock"
    flock --nonblock 9 || die "another submit_pipeline.sh submits $WORK" "wait for it"
fi

declare -A job_of=() # stage -> job, or "-" if it is done
declare -A anew=()   # stages that this call submits
declare -A queued=() # stage -> job of an earlier call; one that was killed left it under the other name
for file in "$JOBS" "$JOBS.new"; do
    [[ ! -f $file ]] || while IFS=$'\t' read -r stage job _; do queued["$stage"]=$job; done < <(tail -n +2 "$file")
done
# A dry run needs no Slurm; else not to know what is queued would submit it a second time.
in_queue=$(squeue --noheader --array --me --format='%F %T %r' 2>&1) || { $dry_run && in_queue=""; } ||
    die "squeue fails: $in_queue" "is Slurm up?"
table=$'stage\tjob\tlog\n'

# Whether a job waits or runs, and can still come to a good end: no task has failed, nor what it waits for.
is_queued() { # job
    [[ $1 != - ]] && grep -q "^$1 " <<<"$in_queue" && ! grep -q "^$1 .*DependencyNeverSatisfied" <<<"$in_queue" &&
        ! squeue --noheader --array --states=all --jobs="$1" --format=%T 2>/dev/null |
            grep -qE 'FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY'
}

# Submit a stage unless it is done, or queued by an earlier call, and nothing that it waits for is submitted anew.
submit() { # stage, "stages that it waits for", number of array tasks or "", file, VARIABLE=value ...
    local stage=$1 after=$2 tasks=$3 kind=$4 name dependency="" job fresh=false log="logs/$1-%j.out" settings
    shift 4
    [[ -z $tasks ]] || log=${log/%j/%A_%a}
    settings=$(settings_of "$kind" "$@")
    for name in $after; do
        [[ ${job_of[$name]} == - ]] || dependency+=":${job_of[$name]}"
        [[ -z ${anew[$name]:-} ]] || fresh=true
    done
    job=${queued[$stage]:--}
    if ! $fresh && [[ -z $dependency ]] && is_done "$stage" "$tasks" "$settings" "$@"; then
        job=- log=-
        ! $dry_run || echo "# $stage is done"
    elif $fresh || ! is_queued "$job"; then
        local -n options="OPTIONS_$kind" arguments="ARGS_$kind"
        local command=(env "$@" DONE_MARK="$WORK/done/$stage" DONE_SETTINGS="$settings"
            sbatch --parsable --export=ALL --kill-on-invalid-dep=yes --job-name="$stage")
        [[ -z $dependency ]] || command+=(--dependency="afterok$dependency")
        [[ -z $tasks ]] || command+=(--array="0-$((tasks - 1))${ARRAY_LIMIT:+%$ARRAY_LIMIT}")
        command+=("${options[@]}" "sbatch/$kind.sbatch" "${arguments[@]}")
        if $dry_run; then
            printf '%s\n' "$(printf '%q ' "${command[@]}")"
            job="<$stage>"
        else
            [[ $job == - ]] || ! grep -q "^$job " <<<"$in_queue" || scancel "$job" # it waits for what has failed
            job=$("${command[@]}") || die "sbatch refused $stage (see above)" "what was submitted before it stays queued"
            job=${job%%;*}
        fi
        anew["$stage"]=true
    fi
    job_of["$stage"]=$job
    table+="$stage"$'\t'"$job"$'\t'"$log"$'\n'
    $dry_run || printf '%s' "$table" >"$JOBS.new" # a killed call loses no job
}

each_stage submit
if ! $dry_run; then
    mv "$JOBS.new" "$JOBS"
    column -t -s $'\t' "$JOBS" 2>/dev/null || cat "$JOBS"
    echo "job ids: $JOBS; how they fare: sbatch/status.sh $config"
fi
