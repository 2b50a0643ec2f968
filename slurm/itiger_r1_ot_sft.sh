#!/usr/bin/env bash
#SBATCH --job-name=itiger_r1_ot_sft
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Phase 1 of R1-style training, the cold start: long reasoning learnt by supervision. It begins from MODEL_TAG (and STEP) of stage SFT_SOURCE, else from
# this run's mid_train.sh, and its checkpoint bears the run's name, so that two runs never meet.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin ot_sft itiger_r1_ot_sft.sh

NUM_STEPS="${SFT_STEPS:-${NUM_STEPS:-}}" SFT_RECIPE="${SFT_RECIPE:-r1_ot_mixed}" SFT_SOURCE=$(stage_name "${SFT_SOURCE:-mid}")
find_parent "$SFT_SOURCE" "$SFT_SOURCE"
OUTPUT_TAG="${OUTPUT_TAG:-$PARENT_TAG-$RUN_ID}"
source slurm/chat_sft.sh
