#!/usr/bin/env bash
#SBATCH --job-name=rs_generate
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Rejection sampling: a checkpoint answers training problems, the right answers become data for chat_sft. The parent: MODEL_TAG (and STEP) of
# stage RS_SOURCE, else the pointer of this run's job of that stage.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin rs_generate rs_generate.sh

RS_SOURCE=$(stage_name "${RS_SOURCE:-rl}")
if [ -z "$PARENT_TAG" ]; then find_parent "$RS_SOURCE" "$RS_SOURCE"; fi
RS_COT_PATH="${RS_COT_PATH:-$NANOCHAT_BASE_DIR/rs_cot_$RUN_ID.jsonl}"
launch "$RS_COT_PATH.rank*" -m scripts.rs_generate --source="$PARENT_STAGE" --model-tag="$PARENT_TAG" ${PARENT_STEP:+--step="$PARENT_STEP"} --output="$RS_COT_PATH" \
    --task="${RS_TASKS:-AQUA}" --seed="$SEED" ${RS_PROBLEMS:+--max-problems="$RS_PROBLEMS"} ${RS_SAMPLES:+--num-samples="$RS_SAMPLES"} \
    ${RS_TEMPERATURE:+--temperature="$RS_TEMPERATURE"} ${RS_MAX_PER_PROMPT:+--max-per-prompt="$RS_MAX_PER_PROMPT"} ${MAX_NEW_TOKENS:+--max-new-tokens="$MAX_NEW_TOKENS"} \
    ${DATA_DIR:+--data-dir="$DATA_DIR"} ${RS_ARGS:-}
python -m scripts.pointer --write="$(pointer "$PHASE")" --file="$RS_COT_PATH"
