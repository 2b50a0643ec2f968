#!/usr/bin/env bash
#SBATCH --job-name=itiger_r1_rs_sft
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Phase 3b: supervised training on the answers kept, from the checkpoint where the cold start began, as DeepSeek-R1 does; RS_SFT_FROM=ot_sft or grpo goes
# on from that phase's checkpoint instead.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin rs_sft itiger_r1_rs_sft.sh

NUM_STEPS="${RS_SFT_STEPS:-${NUM_STEPS:-}}" SFT_RECIPE="${RS_SFT_RECIPE:-r1_rs_sft}"
RS_COT_PATH="${RS_COT_PATH:-$(python -m scripts.pointer --read="$(pointer rs_generate)")}" || die "phase 3b needs the answers that phase 3a keeps: run it first, or set RS_COT_PATH"
case "${RS_SFT_FROM:-start}" in
    start) find_parent "${SFT_SOURCE:-mid}" ot_sft --parent ;;
    *) find_parent "${SFT_SOURCE:-mid}" "$RS_SFT_FROM" ;;
esac
OUTPUT_TAG="${OUTPUT_TAG:-${PARENT_TAG%-"$RUN_ID"}-$RUN_ID-rs}"
source slurm/chat_sft.sh
