#!/usr/bin/env bash
#SBATCH --job-name=itiger_r1_rs_generate
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Phase 3a: this run's reinforced model answers training problems; the right answers are written down.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin rs_generate itiger_r1_rs_generate.sh

RS_TASKS="${RS_TASKS:-AQUA|GSM8K}" MAX_NEW_TOKENS="${MAX_NEW_TOKENS:-1024}"
find_parent "${RS_SOURCE:-rl}" grpo
source slurm/rs_generate.sh
