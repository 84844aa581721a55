#!/usr/bin/env bash
# Translate the first 100 lines of three real test sets with a real model, 0-shot and 5-shot, and score them.
# Usage: bash tiny/smollm2.sh FLORES200_DIR WMT23_DIR OUTPUT_DIR
# FLORES200_DIR holds devtest/deu_Latn.devtest ...; WMT23_DIR holds generaltest2023.en-de.src.en and .ref.refA.de.
set -euo pipefail
usage="Usage: bash tiny/smollm2.sh FLORES200_DIR WMT23_DIR OUTPUT_DIR"
flores=${1:?$usage} wmt23=${2:?$usage} out=${3:?$usage}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$repo/install.sh" smollm2
python="$repo/.venv/bin/python"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1

"$python" "$repo/tiny/make_smollm2.py" --output_dir "$out/models/smollm2-135m-instruct"
for shots in 0 5; do
  # No dev split is at hand: examples are other lines of the same files.
  examples=()
  if [[ $shots == 5 ]]; then examples=(--example_lines 101-300); fi
  "$python" "$repo/instructions/build_instructions.py" --test_set flores200 --data_root "$flores" --pairs de-en,en-fr \
    --shots "$shots" --test_lines 1-100 --example_split devtest "${examples[@]}" --output_dir "$out/instructions"
  "$python" "$repo/instructions/build_instructions.py" --test_set wmt23 --data_root "$wmt23" --pairs en-de \
    --shots "$shots" --test_lines 1-100 "${examples[@]}" --output_dir "$out/instructions"
done
"$python" "$repo/generate/generate.py" --checkpoints "$out/models/smollm2-135m-instruct" --dtype float32 \
  --max_new_tokens 256 --prompts "$out"/instructions/*_shot/*.jsonl --output_dir "$out/generations"
"$python" "$repo/results/score.py" --generations "$out/generations/smollm2-135m-instruct" --model smollm2 \
  --mixture none --output_dir "$out/results/smollm2"
"$python" "$repo/results/summarize.py" --results "$out/results" --output_dir "$out/summary"
