#!/usr/bin/env bash
# From a fresh clone to a trained, RL-tuned, evaluated model. The only place where the order of the stages is written.
#
#   bash run_aquarat_small.sh               everything; stages that are done are skipped when it is run again
#   PRESET=cpu bash run_aquarat_small.sh    the embedded default: no GPU, no network data, no account; 12 minutes on 2 cores
#   FRESH=1 bash run_aquarat_small.sh       start over
#   DEPTH=12 SHARDS=80 bash run_aquarat_small.sh       a larger model on GPUs
#
# BASE_ARGS, MID_ARGS, SFT_ARGS, RL_ARGS and EVAL_ARGS are put behind a stage's flags and override them; STOP_AFTER=base-loss ends there (scripts/pipeline.sh).
# PRESET is gpu where nvidia-smi lists a GPU, else cpu. .env is read as data; what the caller has set wins.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/bootstrap.sh
source scripts/pipeline.sh

read_env_file .env
set_up_environment
choose_places
choose_hardware

if [ "$PRESET" = cpu ]; then
    TAG=d4
    # AQUA is the embedded algebra here: prepare_offline writes it in AQuA's form
    export AQUA_DATA_DIR="${AQUA_DATA_DIR:-$NANOCHAT_BASE_DIR/aqua}"
    stage data       python -m scripts.prepare_offline --seed="$SEED"
    stage tokenizer  python -m scripts.tok_train --vocab-size=1024
    stage train-base $LAUNCH scripts.base_train --model-tag="$TAG" --run="$WANDB_RUN" --seed="$SEED" --depth=4 --n-embd=128 --head-dim=32 --max-seq-len=256 \
                     --device-batch-size=16 --total-batch-size=4096 --mask-documents --embedding-lr=0.05 --num-iterations="${BASE_STEPS:-900}" \
                     --eval-every=300 --eval-tokens=65536 --sample-every=450 --save-every=300 ${BASE_ARGS:-}
    stage base-loss  python -m scripts.base_loss --model-tag="$TAG" --split-tokens=65536
    stage train-mid  $LAUNCH scripts.mid_train --model-tag="$TAG" --run="$WANDB_RUN" --seed="$SEED" --recipe=offline --embedding-lr=0.05 --num-iterations="${MID_STEPS:-200}" \
                     --compile=False --eval-every=100 --save-every=100 ${MID_ARGS:-}
    stage train-sft  $LAUNCH scripts.chat_sft --model-tag="$TAG" --run="$WANDB_RUN" --seed="$SEED" --recipe=offline --device-batch-size=32 --embedding-lr=0.05 \
                     --init-lr-frac=0.1 --num-iterations="${SFT_STEPS:-60}" --compile=False --eval-every=30 --eval-metrics-every=60 --max-new-tokens=64 --save-every=30 ${SFT_ARGS:-}
    stage train-rl   $LAUNCH scripts.chat_rl --model-tag="$TAG" --run="$WANDB_RUN" --seed="$SEED" --max-steps="${RL_STEPS:-200}" --num-samples=16 --examples-per-step=24 \
                     --max-new-tokens=64 --device-batch-size=128 --rows-in-flight=384 --embedding-lr=0.05 --init-lr-frac=0.15 --eval-every=40 --kl-every=40 --attn-every=100 --save-every=30 ${RL_ARGS:-}
    for source in ${EVAL_SOURCES:-base mid sft rl}; do
        case $source in sft|rl) how="--controls --control-problems=300" ;; *) how=--max-problems=1000 ;; esac  # before SFT there is little to know
        stage eval-$source python -m scripts.chat_eval -i $source -g "$TAG" -a AQUA --split=test --max-new-tokens=64 --batch-size=256 $how ${EVAL_ARGS:-}
    done
    stage compare    python -m scripts.chat_eval --compare "sft_${TAG}_AQUA_test" "rl_${TAG}_AQUA_test"
    stage reasoning  python -m scripts.reasoning_eval -i rl -g "$TAG" -a AQUA --split=test --max-new-tokens=64 --batch-size=256 --max-problems=300
    stage leaks      python -m scripts.contamination --recipe=offline --against=AQUA
else
    TAG="d${DEPTH:-8}"
    stage shards     python -m nanochat.dataset -n "${SHARDS:-40}"
    stage aqua       python -m scripts.prepare_aqua
    stage identity   python -m scripts.prepare_offline --only=identity --seed="$SEED"
    stage tokenizer  python -m scripts.tok_train --vocab-size=65536 --max-chars=2000000000
    stage train-base $LAUNCH scripts.base_train --model-tag="$TAG" --run="$WANDB_RUN" --seed="$SEED" --depth="${DEPTH:-8}" --device-batch-size=32 \
                     --total-batch-size=$(( 32 * 2048 * $(times_ranks 8) )) --save-every=1000 ${BASE_ARGS:-}
    stage base-loss  $LAUNCH scripts.base_loss --model-tag="$TAG"
    stage base-eval  $LAUNCH scripts.base_eval --model-tag="$TAG"
    stage train-mid  $LAUNCH scripts.mid_train --model-tag="$TAG" --run="$WANDB_RUN" --seed="$SEED" --save-every=500 ${MID_ARGS:-}
    stage train-sft  $LAUNCH scripts.chat_sft --model-tag="$TAG" --run="$WANDB_RUN" --seed="$SEED" --aqua_train_examples=20000 --aqua_val_examples=254 \
                     --target-examples-per-step=$(( 4 * $(times_ranks 8) )) --save-every=500 ${SFT_ARGS:-}
    gpus=$NPROC; NPROC_PER_NODE="${RL_NPROC:-$gpus}" choose_hardware  # RL may take fewer
    stage train-rl   $LAUNCH scripts.chat_rl --model-tag="$TAG" --run="$WANDB_RUN" --seed="$SEED" --max-steps="${RL_STEPS:-600}" --max-new-tokens=128 \
                     --examples-per-step="$(times_ranks 16)" ${RL_ARGS:-}
    NPROC_PER_NODE=$gpus choose_hardware
    for source in ${EVAL_SOURCES:-base mid sft rl}; do
        stage eval-$source $LAUNCH scripts.chat_eval -i $source -g "$TAG" -a AQUA --max-new-tokens=256 --controls ${EVAL_ARGS:-}
    done
    stage compare    python -m scripts.chat_eval --compare "sft_${TAG}_AQUA" "rl_${TAG}_AQUA"
    stage eval-test  $LAUNCH scripts.chat_eval -i rl -g "$TAG" -a AQUA --split=test --max-new-tokens=256  # RL watched the validation split
    stage reasoning  $LAUNCH scripts.reasoning_eval -i rl -g "$TAG" -a AQUA
fi
stage report         python -m nanochat.report generate
python -m nanochat.report summarize "$WANDB_RUN"
say "the report: $NANOCHAT_BASE_DIR/report/report.html"
