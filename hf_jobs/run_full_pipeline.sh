#!/usr/bin/env bash
# The whole of run_aquarat_small.sh as one job: tokenizer, base, mid, SFT, RL, evaluation, report. After every stage its results are uploaded, and a job
# that is started again goes on from there.
#
#   python -m hf_jobs.launch --script=run_full_pipeline.sh --flavor=a100x8 --timeout=12h --env HF_BASE_DEPTH=12
#   bash hf_jobs/run_full_pipeline.sh                  here; without a GPU the embedded default
#   bash hf_jobs/run_full_pipeline.sh --check          only look at the knobs
#
# The knobs are in README.md and common.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source hf_jobs/common.sh
begin run_full_pipeline.sh "$@"

export BASE_ARGS="$(flag num-iterations HF_BASE_ITERATIONS) ${BASE_ARGS:-}" MID_ARGS="$(flag num-iterations HF_MID_ITERATIONS) ${MID_ARGS:-}"
export SFT_ARGS="$(flag aqua-train-examples HF_SFT_TRAIN_EXAMPLES)$(flag aqua-val-examples HF_SFT_VAL_EXAMPLES) ${SFT_ARGS:-}" RL_ARGS="$(rl_flags) ${RL_ARGS:-}"
run bash run_aquarat_small.sh
