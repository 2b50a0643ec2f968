#!/usr/bin/env bash
# RL, evaluation and report from an SFT checkpoint that is there or on the Hub, with the knobs for one small GPU (or a CPU). The order of
# the stages is run_aquarat_small.sh's: this only says where to begin and how small.
#
#   CUDA_VISIBLE_DEVICES=0 bash run_aquarat_lite.sh
#   SFT_REPO=user/repo bash run_aquarat_lite.sh     fetch the SFT checkpoint first (scripts/fetch_checkpoint.py), unless one is there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export NPROC_PER_NODE="${NPROC_PER_NODE:-1}"
if [ -n "${SFT_REPO:-}" ]; then
    source scripts/bootstrap.sh
    source scripts/pipeline.sh
    read_env_file .env
    set_up_environment
    FRESH=0 choose_places
    choose_hardware
    if [ "$PRESET" = cpu ]; then tag=d4; else tag="d${DEPTH:-8}"; fi
    if ! compgen -G "$NANOCHAT_BASE_DIR/chatsft_checkpoints/$tag/meta_*.json" > /dev/null; then
        python -m scripts.fetch_checkpoint --repo="$SFT_REPO" --source=sft --save-as="$tag" || die "no checkpoint came from $SFT_REPO: the lines above say why"
    fi
    # the problems for RL and evaluation, which a whole pipeline would have made before
    if [ -z "${AQUA_DATA_DIR:-}" ] && [ ! -f "$NANOCHAT_BASE_DIR/aqua/train.jsonl" ]; then
        if [ "$PRESET" = cpu ]; then
            for part in aqua identity; do python -m scripts.prepare_offline --only="$part" --seed="$SEED"; done
        else
            python -m scripts.prepare_aqua
        fi
    fi
    export EVAL_SOURCES="${EVAL_SOURCES:-sft rl}"  # there may be no other stages here
fi
export START_AT=rl
export RL_ARGS="${RL_ARGS:---device_batch_size=1 --num_samples=4 --max_new_tokens=64}"
exec bash run_aquarat_small.sh
