#!/usr/bin/env bash
# Pretraining as one job: shards, tokenizer, base_train, bits per byte; the first part of run_aquarat_small.sh.
#
#   python -m hf_jobs.launch --script=bootstrap_and_train_base.sh --flavor=a100x8 --timeout=12h --env HF_BASE_ITERATIONS=20000
#
# RUN (hf-jobs-base) names the run, NPROC_PER_NODE the number of GPUs (all there are), BASE_ARGS more flags of scripts/base_train.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source hf_jobs/common.sh
RUN="${RUN:-hf-jobs-base}" HF_TRAIN_GPUS="${HF_TRAIN_GPUS:-${NPROC_PER_NODE:-}}"
begin bootstrap_and_train_base.sh "$@"

export BASE_ARGS="$(flag num-iterations HF_BASE_ITERATIONS) ${BASE_ARGS:-}" STOP_AFTER=base-loss
run bash run_aquarat_small.sh
