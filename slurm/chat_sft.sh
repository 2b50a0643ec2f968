#!/usr/bin/env bash
#SBATCH --job-name=chat_sft
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Supervised fine-tuning. The parent: MODEL_TAG (and STEP) of stage SFT_SOURCE, else the pointer of this run's job of that stage.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin sft chat_sft.sh

SFT_SOURCE=$(stage_name "${SFT_SOURCE:-mid}")
if [ -z "$PARENT_TAG" ]; then find_parent "$SFT_SOURCE" "$SFT_SOURCE"; fi
OUTPUT_TAG="${OUTPUT_TAG:-$PARENT_TAG}" DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-4}"
launch_training sft "$OUTPUT_TAG" -m scripts.chat_sft --source="$PARENT_STAGE" --model-tag="$PARENT_TAG" ${PARENT_STEP:+--step="$PARENT_STEP"} --output-tag="$OUTPUT_TAG" \
    --run="$WANDB_RUN" --seed="$SEED" --recipe="${SFT_RECIPE:-default}" --device-batch-size="$DEVICE_BATCH_SIZE" \
    --target-examples-per-step="${TARGET_EXAMPLES_PER_STEP:-$(( DEVICE_BATCH_SIZE * $(times_ranks $(( 32 / DEVICE_BATCH_SIZE ))) ))}" \
    --save-every="${SAVE_EVERY:-200}" ${NUM_STEPS:+--num-iterations="$NUM_STEPS"} ${NUM_EPOCHS:+--num-epochs="$NUM_EPOCHS"} \
    ${OT_DATASET:+--ot-dataset="$OT_DATASET"} ${OT_PATH:+--ot-path="$OT_PATH"} ${OT_SPLIT:+--ot-split="$OT_SPLIT"} ${OT_STOP:+--ot-stop="$OT_STOP"} \
    ${GSM8K_STOP:+--gsm8k-stop="$GSM8K_STOP"} ${CHAT_RATIO:+--chat-ratio="$CHAT_RATIO"} \
    ${DOLCI_PATH:+--dolci-path="$DOLCI_PATH"} ${DOLCI_STOP:+--dolci-stop="$DOLCI_STOP"} ${DOLCI_STREAMING:+--dolci-streaming="$DOLCI_STREAMING"} \
    ${DOLCI_STREAM_CACHE:+--dolci-stream-cache="$DOLCI_STREAM_CACHE"} ${RS_COT_PATH:+--rs-cot-path="$RS_COT_PATH"} ${RS_COT_STOP:+--rs-cot-stop="$RS_COT_STOP"} \
    ${DATA_DIR:+--data-dir="$DATA_DIR"} ${SFT_ARGS:-}
