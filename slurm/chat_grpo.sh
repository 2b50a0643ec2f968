#!/usr/bin/env bash
#SBATCH --job-name=chat_grpo
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# GRPO and its kin on a mixture of tasks. The parent: MODEL_TAG (and STEP) of stage RL_SOURCE, else the pointer of this run's job of that stage.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin rl chat_grpo.sh

RL_SOURCE=$(stage_name "${RL_SOURCE:-sft}")
if [ -z "$PARENT_TAG" ]; then find_parent "$RL_SOURCE" "$RL_SOURCE"; fi
OUTPUT_TAG="${OUTPUT_TAG:-$PARENT_TAG}"
launch_training rl "$OUTPUT_TAG" -m scripts.chat_grpo --source="$PARENT_STAGE" --model-tag="$PARENT_TAG" ${PARENT_STEP:+--step="$PARENT_STEP"} --output-tag="$OUTPUT_TAG" \
    --run="$WANDB_RUN" --seed="$SEED" --tasks="${RL_TASKS:-AQUA}" --examples-per-step="${EXAMPLES_PER_STEP:-$(times_ranks 16)}" --save-every="${SAVE_EVERY:-60}" \
    ${NUM_STEPS:+--num-steps="$NUM_STEPS"} ${DEVICE_BATCH_SIZE:+--device-batch-size="$DEVICE_BATCH_SIZE"} ${NUM_SAMPLES:+--num-samples="$NUM_SAMPLES"} \
    ${MAX_PROMPT_TOKENS:+--max-prompt-tokens="$MAX_PROMPT_TOKENS"} ${MAX_NEW_TOKENS:+--max-new-tokens="$MAX_NEW_TOKENS"} ${TEMPERATURE:+--temperature="$TEMPERATURE"} \
    ${ALGORITHM:+--algorithm="$ALGORITHM"} ${CLIP_RATIO_LOW:+--clip-ratio-low="$CLIP_RATIO_LOW"} ${CLIP_RATIO_HIGH:+--clip-ratio-high="$CLIP_RATIO_HIGH"} \
    ${KL_COEF:+--kl-coef="$KL_COEF"} ${REWARD_MODE:+--reward-mode="$REWARD_MODE"} ${LR_SCHEDULE:+--lr-schedule="$LR_SCHEDULE"} ${DYNAMIC_SAMPLING:+--dynamic-sampling="$DYNAMIC_SAMPLING"} \
    ${LENGTH_PENALTY_MODE:+--length-penalty-mode="$LENGTH_PENALTY_MODE"} ${LENGTH_PENALTY_COEF:+--length-penalty-coef="$LENGTH_PENALTY_COEF"} \
    ${LENGTH_PENALTY_TARGET:+--length-penalty-target="$LENGTH_PENALTY_TARGET"} ${DATA_DIR:+--data-dir="$DATA_DIR"} ${RL_ARGS:-}
