#!/usr/bin/env bash
#SBATCH --job-name=base_train
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Pretraining on the shards in the base directory, with its tokenizer (nanochat.dataset and scripts.tok_train come first).
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin base base_train.sh

DEPTH="${DEPTH:-20}" DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:-32}" MAX_SEQ_LEN="${MAX_SEQ_LEN:-2048}"
OUTPUT_TAG="${MODEL_TAG:-d$DEPTH}"
one_pass=$(( DEVICE_BATCH_SIZE * MAX_SEQ_LEN ))
launch_training base "$OUTPUT_TAG" -m scripts.base_train --model-tag="$OUTPUT_TAG" --run="$WANDB_RUN" --seed="$SEED" --depth="$DEPTH" --max-seq-len="$MAX_SEQ_LEN" \
    --device-batch-size="$DEVICE_BATCH_SIZE" --total-batch-size="${TOTAL_BATCH_SIZE:-$(( one_pass * $(times_ranks $(( 524288 / one_pass ))) ))}" \
    --save-every="${SAVE_EVERY:-500}" ${NUM_STEPS:+--num-iterations="$NUM_STEPS"} ${TARGET_PARAM_DATA_RATIO:+--target-param-data-ratio="$TARGET_PARAM_DATA_RATIO"} ${BASE_ARGS:-}
