#!/usr/bin/env bash
#SBATCH --job-name=mid_train
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Mid-training. The parent: the base checkpoint MODEL_TAG (and STEP), else the pointer of this run's base_train.sh.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin mid mid_train.sh

find_parent base base
OUTPUT_TAG="${OUTPUT_TAG:-$PARENT_TAG}"
launch_training mid "$OUTPUT_TAG" -m scripts.mid_train --model-tag="$PARENT_TAG" ${PARENT_STEP:+--step="$PARENT_STEP"} --output-tag="$OUTPUT_TAG" --run="$WANDB_RUN" \
    --seed="$SEED" --recipe="${MID_RECIPE:-default}" --save-every="${SAVE_EVERY:-200}" ${NUM_STEPS:+--num-iterations="$NUM_STEPS"} \
    ${DEVICE_BATCH_SIZE:+--device-batch-size="$DEVICE_BATCH_SIZE"} ${TOTAL_BATCH_SIZE:+--total-batch-size="$TOTAL_BATCH_SIZE"} ${DATA_DIR:+--data-dir="$DATA_DIR"} ${MID_ARGS:-}
