#!/usr/bin/env bash
# RL, evaluation and report from an SFT checkpoint that is there, with the knobs for one small GPU (or a CPU). The order of the
# stages is run_aquarat_small.sh's: this only says where to begin and how small.
#
#   CUDA_VISIBLE_DEVICES=0 bash run_aquarat_lite.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export START_AT=rl NPROC_PER_NODE="${NPROC_PER_NODE:-1}"
export RL_ARGS="${RL_ARGS:---device_batch_size=1 --num_samples=4 --max_new_tokens=64}"
exec bash run_aquarat_small.sh
