#!/usr/bin/env bash
#SBATCH --job-name=chat_eval
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Accuracy on tasks of the checkpoint MODEL_TAG (and STEP) of stage EVAL_SOURCE, else of the one that the pointer of this run's job of that stage names.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin eval chat_eval.sh

EVAL_SOURCE=$(stage_name "${EVAL_SOURCE:-sft}")
if [ -z "$PARENT_TAG" ]; then find_parent "$EVAL_SOURCE" "$EVAL_SOURCE"; fi
launch "$NANOCHAT_BASE_DIR/eval/*" -m scripts.chat_eval --source="$PARENT_STAGE" --model-tag="$PARENT_TAG" ${PARENT_STEP:+--step="$PARENT_STEP"} \
    ${TASKS:+--task-name="$TASKS"} ${EVAL_SPLIT:+--split="$EVAL_SPLIT"} ${MAX_PROBLEMS:+--max-problems="$MAX_PROBLEMS"} ${EVAL_SAMPLES:+--num-samples="$EVAL_SAMPLES"} \
    ${EVAL_TEMPERATURE:+--temperature="$EVAL_TEMPERATURE"} ${EVAL_BATCH_SIZE:+--batch-size="$EVAL_BATCH_SIZE"} ${MAX_NEW_TOKENS:+--max-new-tokens="$MAX_NEW_TOKENS"} \
    ${DATA_DIR:+--data-dir="$DATA_DIR"} ${EVAL_ARGS:-}
