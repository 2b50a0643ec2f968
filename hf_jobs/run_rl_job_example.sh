#!/usr/bin/env bash
# Submit one RL job from your own machine; what is behind the name goes to the launcher (--dry-run, --detach, ...).
#
#   SFT_REPO=me/my-run bash hf_jobs/run_rl_job_example.sh --dry-run
#
# RUN (hf-jobs-rl), FLAVOR (a10g-large), IMAGE, TIMEOUT (6h), NPROC_PER_NODE (all GPUs there are), RL_ARGS. WANDB_API_KEY travels as a secret if it is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
variables=("SFT_REPO=${SFT_REPO:?set it to the Hub repository that holds an SFT checkpoint}" "RUN=${RUN:-hf-jobs-rl}")
if [ -n "${NPROC_PER_NODE:-}" ]; then variables+=("NPROC_PER_NODE=$NPROC_PER_NODE"); fi
if [ -n "${RL_ARGS:-}" ]; then variables+=("RL_ARGS=$RL_ARGS"); fi
exec python -m hf_jobs.launch --script=bootstrap_and_train_rl.sh --name="${RUN:-hf-jobs-rl}" --flavor="${FLAVOR:-a10g-large}" --timeout="${TIMEOUT:-6h}" \
    --image="${IMAGE:-pytorch/pytorch:2.6.0-cuda12.4-cudnn9-devel}" --env "${variables[@]}" "$@"
