#!/usr/bin/env bash
# R1-style post-training of the embedded default, on what run_aquarat_small.sh left behind, and beside it the control arm:
#
#   cold start (that script's SFT) -> GRPO -> rejection sampling -> SFT on the answers kept -> a short second RL
#   control: expert iteration, supervised training on one's own right answers, with the same problems, samples and steps
#
#   bash run_aquarat_small.sh && bash run_r1_small.sh        about as long again; SEED and NANOCHAT_BASE_DIR as there
#
# For GPUs the same phases are slurm/itiger_r1_*.sh. Finished stages are skipped; FRESH=1 belongs to run_aquarat_small.sh alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/bootstrap.sh
source scripts/pipeline.sh

read_env_file .env
set_up_environment
PRESET=cpu FRESH=0
choose_places
choose_hardware
CHAIN=$(cat "$NANOCHAT_BASE_DIR/stages/train-rl.done" 2>/dev/null) || die "there is no finished run in $NANOCHAT_BASE_DIR: bash run_aquarat_small.sh comes first"

TAG=d4
export AQUA_DATA_DIR="${AQUA_DATA_DIR:-$NANOCHAT_BASE_DIR/aqua}"
RL="--tasks=AQUA --seed=$SEED --run=$WANDB_RUN --num-samples=16 --examples-per-step=32 --max-new-tokens=64 --device-batch-size=128 --rows-in-flight=512
    --embedding-lr=0.05 --init-lr-frac=0.15 --eval-every=40 --save-every=30"
ask() { stage "eval-$1-$2" python -m scripts.chat_eval -i "$1" -g "$2" -a AQUA --split=test --max-new-tokens=64 --batch-size=256; }
compare() { stage "compare-$1-$2" python -m scripts.chat_eval --compare "$1_AQUA_test" "$2_AQUA_test"; }

stage train-expert  $LAUNCH scripts.chat_grpo $RL --algorithm=expert --model-tag="$TAG" --output-tag="$TAG-expert" --num-steps="${RL_STEPS:-120}"
stage train-grpo    $LAUNCH scripts.chat_grpo $RL --algorithm=grpo   --model-tag="$TAG" --output-tag="$TAG-grpo"   --num-steps="${RL_STEPS:-120}"
stage rs-generate   python -m scripts.rs_generate --source=rl --model-tag="$TAG-grpo" --task=AQUA --max-problems="${RS_PROBLEMS:-4000}" --num-samples=4 \
                    --max-per-prompt=2 --max-new-tokens=64 --rows-in-flight=512 --seed="$SEED"
stage train-rs-sft  $LAUNCH scripts.chat_sft --source=mid --model-tag="$TAG" --output-tag="$TAG-rs" --recipe=offline_rs_sft --run="$WANDB_RUN" --seed="$SEED" \
                    --device-batch-size=32 --embedding-lr=0.05 --init-lr-frac=0.1 --num-iterations="${RS_SFT_STEPS:-120}" --eval-every=60 --eval-metrics-every=-1 \
                    --max-new-tokens=64 --save-every=60
stage train-rl2     $LAUNCH scripts.chat_grpo $RL --algorithm=grpo --source=sft --model-tag="$TAG-rs" --output-tag="$TAG-rs" --num-steps="${RL2_STEPS:-60}"
ask rl "$TAG-expert"; ask rl "$TAG-grpo"; ask sft "$TAG-rs"; ask rl "$TAG-rs"
compare "sft_$TAG" "rl_$TAG-expert"
compare "sft_$TAG" "rl_$TAG-grpo"
compare "rl_$TAG-expert" "rl_$TAG-grpo"
compare "sft_$TAG" "sft_$TAG-rs"
compare "sft_$TAG-rs" "rl_$TAG-rs"
stage report-r1     python -m nanochat.report generate
python -m nanochat.report summarize "$WANDB_RUN"
