#!/usr/bin/env bash
#SBATCH --job-name=chat_rl
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Reinforcement learning on one task. The parent: MODEL_TAG (and STEP) of stage RL_SOURCE, else the pointer of this run's job of that stage.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin rl chat_rl.sh

RL_SOURCE=$(stage_name "${RL_SOURCE:-sft}")
find_parent "$RL_SOURCE" "$RL_SOURCE"
OUTPUT_TAG="${OUTPUT_TAG:-$PARENT_TAG}"
launch_training rl "$OUTPUT_TAG" -m scripts.chat_rl --source="$PARENT_STAGE" --model-tag="$PARENT_TAG" ${PARENT_STEP:+--step="$PARENT_STEP"} --output-tag="$OUTPUT_TAG" \
    --run="$WANDB_RUN" --seed="$SEED" --task="${RL_TASK:-AQUA}" --examples-per-step="${EXAMPLES_PER_STEP:-$(times_ranks 16)}" --save-every="${SAVE_EVERY:-60}" \
    ${NUM_STEPS:+--max-steps="$NUM_STEPS"} ${DEVICE_BATCH_SIZE:+--device-batch-size="$DEVICE_BATCH_SIZE"} ${NUM_SAMPLES:+--num-samples="$NUM_SAMPLES"} \
    ${MAX_NEW_TOKENS:+--max-new-tokens="$MAX_NEW_TOKENS"} ${TEMPERATURE:+--temperature="$TEMPERATURE"} ${DATA_DIR:+--data-dir="$DATA_DIR"} ${RL_ARGS:-}
