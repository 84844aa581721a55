# shellcheck shell=bash
# The chain itself, for submit_pipeline.sh and status.sh: its settings, its stages, and whether a stage is done.

# shellcheck source=sbatch/words.sh
source sbatch/words.sh

STAGE_FILES=(fit_kmeans label_audio train_bpe_tokenizer build_mixture continued_pretraining export_checkpoint
    instruction_tuning build_instructions generate_mt generate_asr score comet summarize)

read_config() { # file
    local name required=(RUN BASE_MODEL MANIFESTS AUDIO_ROOT TRAIN_SETS TEST_SETS NUM_UNITS MIXTURE CPT_CONFIG STEPS
        SFT_CONFIG PARALLEL NUM_ASR NUM_MT DATA_ROOT)
    for name in "${STAGE_FILES[@]}"; do
        declare -ga "OPTIONS_$name=()" "ARGS_$name=()"
    done
    # shellcheck disable=SC1090 # the user's
    source "$1"
    for name in "${required[@]}"; do
        [[ ${!name:-} == *[![:space:]]* ]] || die "$1 does not set $name" "see sbatch/README.md"
    done
    : "${SFT_SETS:=${TRAIN_SETS[*]}}"
    words TRAIN_SETS TEST_SETS SFT_SETS STEPS PARALLEL
    : "${WORK:=runs/$RUN}" "${MIXTURE_NAME:=$RUN}" "${VOCAB_SIZE:=$NUM_UNITS}" "${INIT:=normal}" "${NUM_SHARDS:=8}"
    : "${UNITS_DIR:=$WORK/units}" "${KMEANS:=$WORK/kmeans}" "${COMET:=false}"
    : "${RESULTS_DIR:=$WORK/results}" "${ARRAY_LIMIT:=}"
    # shellcheck disable=SC2034 # for those who source this file
    JOBS=$WORK/jobs.tsv
    # Lists and patterns hold paths below the first three, and the others are single words.
    for name in WORK UNITS_DIR RESULTS_DIR NUM_UNITS VOCAB_SIZE INIT NUM_SHARDS NUM_ASR NUM_MT COMET ARRAY_LIMIT; do
        [[ ${!name} != *[[:space:]*?[]* ]] ||
            die "$name=${!name@Q} holds white space or one of * ? [" "choose another in $1"
    done
}

# The settings of a stage, as a hash: its variables and arguments, and the content of its YAML files.
settings_of() { # file, VARIABLE=value ...
    local kind=$1 word
    shift
    local -n arguments="ARGS_$kind"
    {
        printf '%s\n' "$@" "${arguments[@]}"
        for word in "$@"; do [[ $word != *.yaml || ! -f ${word#*=} ]] || cat "${word#*=}"; done
    } | sha256sum | cut -d' ' -f1
}

# Whether a stage's job, or each task of its array, came to its end with these settings, and its folder is still there.
is_done() { # stage, tasks or nothing, settings, VARIABLE=value ...
    local mark=$WORK/done/$1 tasks=$2 settings=$3 word task
    for word in "${@:4}"; do [[ $word != OUTPUT_DIR=* || -d ${word#*=} ]] || return 1; done
    if [[ -z $tasks ]]; then
        [[ -f $mark && $(<"$mark") == "$settings" ]]
        return
    fi
    for ((task = 0; task < tasks; task++)); do
        [[ -f $mark.$task && $(<"$mark.$task") == "$settings" ]] || return 1
    done
}

# Call a function for each stage, in an order in which all that a stage waits for comes before it:
#   FUNCTION stage "stages that it waits for" "array tasks or nothing" file VARIABLE=value ...
each_stage() { # function
    local do=$1 set units="" labelled="" heard="" model=$WORK/models/base
    local models=() names=(base) last step style tests=() scored=() mt=()
    for step in "${STEPS[@]}"; do models+=("$WORK/models/checkpoint-$step") names+=("checkpoint-$step"); done
    last=${models[-1]}

    "$do" fit_kmeans "" "" fit_kmeans MANIFEST="$MANIFESTS/${TRAIN_SETS[0]}.jsonl" AUDIO_ROOT="$AUDIO_ROOT" \
        NUM_UNITS="$NUM_UNITS" OUTPUT_DIR="$KMEANS"
    for set in "${TRAIN_SETS[@]}" "${TEST_SETS[@]}"; do
        "$do" "label_$set" fit_kmeans "$NUM_SHARDS" label_audio MANIFEST="$MANIFESTS/$set.jsonl" \
            AUDIO_ROOT="$AUDIO_ROOT" KMEANS="$KMEANS" OUTPUT_DIR="$UNITS_DIR/$set" NUM_SHARDS="$NUM_SHARDS"
    done
    for set in "${TRAIN_SETS[@]}"; do units+=" $UNITS_DIR/$set" labelled+=" label_$set"; done
    for set in "${TEST_SETS[@]}"; do heard+=" label_$set" tests+=("$UNITS_DIR/$set"); done

    "$do" train_bpe_tokenizer "$labelled" "" train_bpe_tokenizer UNITS="${units# }" NUM_UNITS="$NUM_UNITS" \
        VOCAB_SIZE="$VOCAB_SIZE" BASE_MODEL="$BASE_MODEL" INIT="$INIT" TOKENIZER_DIR="$WORK/tokenizer" OUTPUT_DIR="$model"
    "$do" build_mixture "train_bpe_tokenizer$labelled" "" build_mixture MIXTURE="$MIXTURE" TOKENIZER="$model" \
        OUTPUT_DIR="$WORK/mixture"
    "$do" continued_pretraining build_mixture "" continued_pretraining MODEL="$model" MIXTURE="$WORK/mixture" \
        CONFIG="$CPT_CONFIG" OUTPUT_DIR="$WORK/cpt_run"
    "$do" export_checkpoint continued_pretraining "${#STEPS[@]}" export_checkpoint RUN_DIR="$WORK/cpt_run" \
        STEPS="${STEPS[*]}" MODEL="$model" OUTPUT_DIR="$WORK/models"
    units=""
    for set in "${SFT_SETS[@]}"; do units+=" $UNITS_DIR/$set"; done
    "$do" instruction_tuning export_checkpoint "" instruction_tuning MODEL="$last" UNITS="${units# }" \
        PARALLEL="${PARALLEL[*]}" NUM_ASR="$NUM_ASR" NUM_MT="$NUM_MT" DATA_DIR="$WORK/sft_data" CONFIG="$SFT_CONFIG" \
        OUTPUT_DIR="$WORK/models/sft"

    # The base and the checkpoints complete a text; the tuned model chats.
    for style in original chat; do
        local after=export_checkpoint checkpoints="$model ${models[*]}" suffix=""
        [[ $style == original ]] || { after=instruction_tuning checkpoints=$WORK/models/sft suffix=_sft names=(sft); }
        "$do" "build_instructions$suffix" "" "" build_instructions DATA_ROOT="$DATA_ROOT" STYLE="$style" \
            OUTPUT_DIR="$WORK/instructions/$style"
        "$do" "generate_mt$suffix" "$after build_instructions$suffix" "${#names[@]}" generate_mt \
            CHECKPOINTS="$checkpoints" PROMPTS="$WORK/instructions/$style/*_shot/*.jsonl" \
            OUTPUT_DIR="$WORK/generations/mt"
        "$do" "generate_asr$suffix" "$after$heard" "${#names[@]}" generate_asr CHECKPOINTS="$checkpoints" \
            UNITS="${tests[*]}" STYLE="$style" OUTPUT_DIR="$WORK/generations/asr"
        mt+=("${names[@]/#/$WORK/generations/mt/}")
        scored+=("${names[@]/#/$WORK/generations/mt/}" "${names[@]/#/$WORK/generations/asr/}")
    done

    local generated="generate_mt generate_asr generate_mt_sft generate_asr_sft" after=score
    "$do" score "$generated" "" score GENERATIONS="${scored[*]}" MODEL="$RUN" MIXTURE="$MIXTURE_NAME" \
        OUTPUT_DIR="$RESULTS_DIR"
    if [[ $COMET == true ]]; then
        after=comet
        "$do" comet score "" comet GENERATIONS="${mt[*]}" MODEL="$RUN" MIXTURE="$MIXTURE_NAME" OUTPUT_DIR="$RESULTS_DIR"
    fi
    "$do" summarize "$after" "" summarize RESULTS="$RESULTS_DIR" OUTPUT_DIR="$WORK/summary"
}
