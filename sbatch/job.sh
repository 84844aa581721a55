# shellcheck shell=bash
# What the .sbatch files share; each sources it. A file says
#   outputs=(PATH ...)       what grows while the job makes progress
#   words VARIABLE ...       for those that hold lists, see words.sh
#   own_task LIST            of an array's list this task's item alone (its number is $task), or all without --array
#   begin VARIABLE ...       shows the settings; ends a job that was requeued again and again and got nowhere
#   run COMMAND ...          runs it; on USR1 (time limit, preemption) the job is requeued
#   stop_file=FOLDER/.stop   for a trainer: on USR1 this file asks it to save first
#   finish                   at the end: says so in the log
# The chain (towerspeech/chain.py) sets besides:
#   TOWERSPEECH_MODE          slurm (default); here: runs the commands outside of Slurm; show: prints them
#   TOWERSPEECH_CODE          folder of the code to run; default: where the job was submitted
#   TOWERSPEECH_SYSTEM        systems/<name>.yaml, of which every command takes its own block
#   TOWERSPEECH_OVERWRITE     true: every command replaces the output of other settings
# Set in sbatch/site.env or at submission:
#   SAVE_SECONDS (100)        how long a trainer may save before the job is requeued all the same
#   MAX_IDLE_REQUEUES (3)     requeues in a row without progress before the job fails
#   LOST_NODE_SECONDS (120)   how long a job of several nodes that failed looks for a node that is gone
#   TOWERSPEECH_LOCK_WAIT_S   how long to wait for an old self on another node (600 in a requeued job)
set -euo pipefail

mode=${TOWERSPEECH_MODE:-slurm}
signals=0 # USR1s that came
begun=false child="" watchdog="" stop_file="" outputs=()
[[ $mode != slurm ]] || trap on_usr1 USR1 # from the first line on: without a trap the signal ends the job

on_usr1() {
    signals=$((signals + 1))
    ! $begun || leave
}

say() { printf '== %s %s: %s\n' "$(date +%FT%T)" "${SLURM_JOB_NAME:-job}" "$*"; }
fail() { # status, words...
    local status=$1
    shift
    say "error: $*"
    exit "$status"
}

requeue() {
    say "requeueing job $job_id"
    scontrol requeue "$job_id" || fail 1 "scontrol requeue $job_id failed: submit this job anew, it goes on"
    sleep 600 # Slurm ends us; to leave by ourselves would end the job
    exit 1
}

# A trainer is asked to save, once; whatever else runs may be killed at any time, and goes on from what it has written.
leave() {
    if [[ -z $stop_file || -z $child ]] || ((signals > 1)) || ! { mkdir -p "${stop_file%/*}" && touch "$stop_file"; }; then
        requeue
    fi
    say "USR1: asking for a checkpoint"
    (sleep "${SAVE_SECONDS:-100}" && kill -USR1 $$) &
    watchdog=$!
}

[[ $mode != slurm ]] || cd "$SLURM_SUBMIT_DIR" # the batch script itself runs from Slurm's spool folder
code=$(realpath "${TOWERSPEECH_CODE:-.}")
# shellcheck source=sbatch/words.sh
source "$code/sbatch/words.sh"
if [[ -f $code/sbatch/site.env ]]; then
    set +eu # module and conda know nothing of it
    # shellcheck disable=SC1091 # a site's own
    source "$code/sbatch/site.env" >&2 # what is shown are commands alone
    set -eu
fi
[[ ! -d .venv/bin ]] || export PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"     # before an editable install, which is the checkout
export PYTHONUNBUFFERED=1                                # what is printed reaches the log before a kill
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"    # srun does not take it over from sbatch
restarts=${SLURM_RESTART_COUNT:-0} task=${SLURM_ARRAY_TASK_ID:-} job_id=${SLURM_JOB_ID:-}
# An array's last task has the number of the whole array, and requeueing that would requeue all tasks.
[[ -z $task || $mode != slurm ]] || job_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Of an array's list its task's item alone; all of it where there is no array.
own_task() { # LIST
    local -n items=$1
    [[ -n $task ]] || return 0
    [[ -n ${items[task]:-} ]] || fail 1 "only ${#items[@]} $1: submit with --array=0-$((${#items[@]} - 1))"
    items=("${items[task]}")
}

begin() { # names of the variables to show
    local name commit
    [[ $mode == slurm ]] || return 0
    if [[ -f $code/COMMIT ]]; then
        commit="$(<"$code/COMMIT"), code frozen in $code"
    else
        commit=$(git -C "$code" describe --always --abbrev=40 --exclude='*' --dirty=+changes 2>/dev/null) || commit=unknown
    fi
    say "job $job_id, restart $restarts, on $SLURM_JOB_NODELIST, commit $commit"
    for name in "$@"; do
        local -n value=$name # an array where words made one
        printf '   %s=%s\n' "$name" "${value[*]-}"
    done
    check_progress
    begun=true
    ((signals == 0)) || leave # the signal came before
}

# A job that was requeued goes on; one that was requeued MAX_IDLE_REQUEUES times and wrote nothing new fails.
check_progress() {
    local state="logs/.$SLURM_JOB_NAME-$job_id.progress" seen last="" idle=0
    seen=$(find "${outputs[@]}" -type f ! -path '*/.tmp-*' ! -name '*.log' ! -name '*.lock' ! -name '*.stop' \
        ! -name '*.unfinished.json' -printf '%p %s\n' 2>/dev/null | sort | sha256sum | cut -d' ' -f1) || true
    if ((restarts)); then
        export TOWERSPEECH_LOCK_WAIT_S=${TOWERSPEECH_LOCK_WAIT_S:-600}
        [[ ! -f $state ]] || read -r last idle <"$state"
        if [[ $seen == "$last" ]]; then idle=$((idle + 1)); else idle=0; fi
        say "was requeued, goes on with what is in ${outputs[*]}"
    fi
    mkdir -p logs
    echo "$seen $idle" >"$state"
    if ((idle >= ${MAX_IDLE_REQUEUES:-3})); then
        fail 1 "requeued $idle times in a row and nothing new in ${outputs[*]}; not again (MAX_IDLE_REQUEUES)." \
            "See above why; give more --time or smaller pieces, then submit anew"
    fi
}

# A command's script is the code's, and takes the system's block; flags after it override.
run() { # command...
    local status=0 words=() word
    for word in "$@"; do
        if [[ $word != *.py ]]; then
            words+=("$word")
            continue
        fi
        [[ $code -ef . ]] || word=$code/$word
        words+=("$word")
        [[ -z ${TOWERSPEECH_SYSTEM:-} || " $* " == *" --config "* ]] || words+=(--config "$TOWERSPEECH_SYSTEM")
        [[ ${TOWERSPEECH_OVERWRITE:-} != true || $word =~ /(score|score_comet|summarize)\.py$ ]] || words+=(--overwrite true)
    done
    set -- "${words[@]}"
    if [[ $mode != slurm ]]; then
        printf '%s\n' "$(printf ' %q' "$@")" | cut -c2-
        [[ $mode == show ]] || "$@"
        return
    fi
    [[ -z $stop_file ]] || rm -f "$stop_file" # an earlier attempt's
    printf '$%s\n' "$(printf ' %q' "$@")"
    "$@" & # in the background: bash handles a signal only after a foreground command
    child=$!
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends the wait, not the child
    wait "$child" || status=$?
    child=""
    [[ -z $watchdog ]] || kill "$watchdog" 2>/dev/null || true
    [[ -z $stop_file ]] || rm -f "$stop_file"
    ((status)) || return 0
    if ((signals)) || slurm_took_it; then requeue; fi
    local script=${2-}
    fail "$status" "$1 ${script#"$code/"} ended with status $status; the reason stands above"
}

# Whether the command failed because Slurm is preempting the job, or because a node is gone: the other nodes' processes
# then fail before Slurm notices.
slurm_took_it() {
    local deadline=$((SECONDS + ${LOST_NODE_SECONDS:-120})) lost
    while true; do
        if scontrol show job "$job_id" 2>/dev/null | grep -q 'PreemptTime=[0-9]'; then
            say "preempted"
            return 0
        fi
        ((SLURM_JOB_NUM_NODES > 1)) || return 1
        lost=$(sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format='%N %T' 2>/dev/null |
            grep -E '\*|down|fail|not_resp' | sort -u | tr '\n' ' ') || true
        if [[ -n $lost ]]; then
            say "lost a node: $lost"
            return 0
        fi
        ((SECONDS < deadline)) || return 1
        sleep 5
    done
}

finish() { [[ $mode != slurm ]] || say "done"; }
