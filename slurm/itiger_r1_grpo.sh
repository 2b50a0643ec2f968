#!/usr/bin/env bash
#SBATCH --job-name=itiger_r1_grpo
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Phase 2: GRPO from this run's cold start. Defaults after the seeds' recipe: clipped asymmetrically, rewards 0 or 1, no KL, a constant learning rate,
# a length penalty over the last fifth of the tokens.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin grpo itiger_r1_grpo.sh

NUM_STEPS="${RL_STEPS:-${NUM_STEPS:-500}}" RL_TASKS="${RL_TASKS:-AQUA:0.5,GSM8K:0.5}" MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-1024}"
CLIP_RATIO_LOW="${CLIP_RATIO_LOW:-0.2}" CLIP_RATIO_HIGH="${CLIP_RATIO_HIGH:-0.28}" REWARD_MODE="${REWARD_MODE:-dapo}" LR_SCHEDULE="${LR_SCHEDULE:-constant}"
LENGTH_PENALTY_MODE="${LENGTH_PENALTY_MODE:-dapo}" LENGTH_PENALTY_COEF="${LENGTH_PENALTY_COEF:-1}" LENGTH_PENALTY_TARGET="${LENGTH_PENALTY_TARGET:-$(( MAX_NEW_TOKENS * 4 / 5 ))}"
find_parent "${RL_SOURCE:-sft}" ot_sft
source slurm/chat_grpo.sh
