# What run_aquarat_small.sh and its kin need to walk through stages: presets, skipping, resuming, stopping. Sourced.

# One word describes all that a stage depends on: the stages before it and its own command. When any of them changes, it runs again.
CHAIN="${CHAIN:-start}"

default_base_dir() {
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
    NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR/#\~\//$HOME/}"  # .env is data: nobody has expanded its ~
}

choose_places() {
    default_base_dir
    mkdir -p "$NANOCHAT_BASE_DIR/stages"
    if [ "${FRESH:-0}" = 1 ]; then
        rm -f "$NANOCHAT_BASE_DIR"/stages/*
        python -m nanochat.report reset
    fi
    WANDB_RUN="${WANDB_RUN:-dummy}"
    SEED="${SEED:-42}"
}

count_gpus() {
    local gpus=0
    if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true); fi
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .); fi
    echo "$gpus"
}

choose_hardware() {
    local gpus; gpus=$(count_gpus)
    if [ -z "${PRESET:-}" ]; then if [ "$gpus" -gt 0 ]; then PRESET=gpu; else PRESET=cpu; fi; fi
    case "$PRESET" in cpu|gpu) ;; *) die "PRESET=$PRESET is neither cpu nor gpu" ;; esac
    if [ "$PRESET" = gpu ]; then
        NPROC="${NPROC_PER_NODE:-$gpus}"
        [ "$NPROC" -ge 1 ] || die "PRESET=gpu, but nvidia-smi lists 0 GPUs: use PRESET=cpu"
        LAUNCH="torchrun --standalone --nproc_per_node=$NPROC -m --"  # torchrun would take --run for one of its own
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    else
        NPROC=1
        LAUNCH="python -m"
        # huge pages for the allocator: 1.1 to 1.9 times the training speed on a CPU (dev/LOG.md)
        export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=2147483648:glibc.malloc.trim_threshold=4294967296}"
    fi
}

# times_ranks N: the multiple of NPROC nearest to N, so that any number of GPUs divides a batch
times_ranks() { local turns=$(( ($1 + NPROC / 2) / NPROC )); echo $(( (turns > 0 ? turns : 1) * NPROC )); }

# stage NAME COMMAND...: run it unless it ended well before with the same command after the same stages. $AFTER_STAGE is a command that is run behind
# it with its name as the last argument, to carry its results away; $STOP_AFTER names the stage that is the last one.
stage() {
    local name=$1; shift
    CHAIN=$(printf '%s\n' "$CHAIN" "$@" | grep -v '^--nproc_per_node=' | sha256sum | cut -c1-16)  # a resumed run may have another number of GPUs
    local stamp="$NANOCHAT_BASE_DIR/stages/$name"
    if [ -n "${START_AT:-}" ]; then  # run_aquarat_lite.sh begins in the middle
        if [ "$name" != "train-$START_AT" ]; then return; fi
        START_AT=
    fi
    if [ "$(cat "$stamp.done" 2>/dev/null)" = "$CHAIN" ]; then
        say "$name: done before, skipped"
        stop_after "$name"
        return
    fi
    # A training stage whose command changed starts over. One that was interrupted goes on, or, where it had not yet cleared an earlier run away, starts over
    local how=()
    if [ "$name" != "${name#train-}" ]; then
        if [ "$(cat "$stamp.started" 2>/dev/null)" = "$CHAIN" ]; then how=(--resume --overwrite); else how=(--overwrite); fi
    fi
    printf '%s\n' "$CHAIN" > "$stamp.started"
    rm -f "$stamp.done"
    say "$name: $* ${how[*]}"
    local began=$SECONDS
    "$@" "${how[@]}" || die "stage $name failed: the lines above say why. Run the same command again to go on from there, or with FRESH=1 to start over"
    printf '%s\n' "$CHAIN" > "$stamp.done"
    say "$name: $((SECONDS - began)) s"
    if [ -n "${AFTER_STAGE:-}" ]; then
        $AFTER_STAGE "$name" || die "stage $name is done, but what is run after it failed: $AFTER_STAGE $name"
    fi
    stop_after "$name"
}

stop_after() { if [ "${STOP_AFTER:-}" = "$1" ]; then say "STOP_AFTER=$1: done"; exit 0; fi; }
