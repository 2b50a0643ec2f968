#!/usr/bin/env bash
# RL as one job: the SFT checkpoint and tokenizer of SFT_REPO, AQuA, chat_rl, evaluation before and after, report; by run_aquarat_lite.sh.
#
#   python -m hf_jobs.launch --script=bootstrap_and_train_rl.sh --flavor=a10g-large --timeout=6h --env SFT_REPO=me/my-run
#
# RUN (hf-jobs-rl) names the run, NPROC_PER_NODE the number of GPUs (all there are), RL_ARGS more flags of scripts/chat_rl.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source hf_jobs/common.sh
RUN="${RUN:-hf-jobs-rl}" HF_RL_GPUS="${HF_RL_GPUS:-${NPROC_PER_NODE:-all}}"
begin bootstrap_and_train_rl.sh "$@"

export RL_ARGS="$(rl_flags) ${RL_ARGS:-}" SFT_REPO
run bash run_aquarat_lite.sh
