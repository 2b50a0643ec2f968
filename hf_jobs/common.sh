# What the job scripts share: the knobs and their checks, folders, packages, and the store where results outlive the job's disk. Sourced, from the
# repository's root.

source scripts/bootstrap.sh
source scripts/pipeline.sh
read_env_file hf_jobs/.env
read_env_file .env

# name | default | least | most | where it counts | what it is. README.md shows the same table. A default of a "gpu" or "both" knob is taken on GPUs; without
# one the embedded default has sizes of its own, "both" knobs change them and "gpu" knobs are refused.
KNOBS='
HF_TRAIN_GPUS|8|1|64|gpu|number of GPUs for base, mid and SFT
HF_RL_GPUS|1|1|64|gpu|number of GPUs for RL
HF_BASE_DEPTH|20|1|64|gpu|number of layers
HF_BASE_ITERATIONS|400|1|10000000|both|number of base steps
HF_MID_ITERATIONS|400|1|10000000|both|number of mid steps
HF_SFT_TRAIN_EXAMPLES|80000|1|97467|gpu|number of AQuA rows in SFT
HF_SFT_VAL_EXAMPLES|254|1|254|gpu|number of AQuA rows in the validation of SFT
HF_RL_EXAMPLES_PER_STEP|32|1|100000|both|number of problems per RL step
HF_RL_NUM_SAMPLES|16|2|4096|both|number of completions per problem
HF_RL_MAX_NEW_TOKENS|128|1|2000|both|number of tokens of the longest completion
HF_RL_TEMPERATURE|0.7|0.01|10|both|temperature of sampling
HF_RL_SAVE_EVERY|60|1|10000000|both|number of RL steps between checkpoints
HF_RL_EVAL_EVERY|60|1|10000000|both|number of RL steps between evaluations
HF_RL_EVAL_EXAMPLES|512|1|100000|both|number of problems per evaluation (all there are, if there are fewer)
HF_DATASET_SHARDS|24|1|1822|gpu|number of shards of pretraining text
HF_INSTALL_BASE_PACKAGES|1|0|1|any|switch (1 = install missing system packages with apt-get, 0 = never)
HF_SYNC_MINUTES|15|0|1440|any|number of minutes between uploads inside of a stage (0 = only after stages)
'

# check_knobs SCRIPT: knobs take their defaults; all that is wrong is told at once and ends the script with status 2, before anything is installed or computed
check_knobs() {
    local name default least most where what given problem problems=() gpus
    gpus="${HF_JOB_GPUS:-$(count_gpus)}"  # launch.py checks for a flavor that is elsewhere
    if [ "${PRESET:-}" = cpu ]; then gpus=0; fi
    if [ "${PRESET:-}" = gpu ] && [ "$gpus" = 0 ]; then problems+=("PRESET=gpu, but there is no GPU here: choose a flavor with GPUs (python -m hf_jobs.launch --hardware)"); fi
    if [ "${HF_RL_GPUS:-}" = all ]; then if [ "$gpus" -gt 0 ]; then HF_RL_GPUS=$gpus; else HF_RL_GPUS=; fi; fi
    while IFS='|' read -r name default least most where what; do
        if [ -z "$name" ]; then continue; fi
        given="${!name:-}"
        if [ -z "$given" ]; then
            if [ "$where" = any ] || [ "$gpus" -gt 0 ]; then printf -v "$name" %s "$default"; fi
        elif problem=$(wrong_number "$given" "$least" "$most"); then
            problems+=("$name=$given $problem: it is the $what, from $least to $most (default $default)")
        elif [ "$where" = gpu ] && [ "$gpus" = 0 ]; then
            problems+=("$name=$given is for GPUs, and there is none here: leave it out, or choose a flavor with GPUs (python -m hf_jobs.launch --hardware)")
        elif [[ "$name" = HF_*_GPUS && "$given" -gt "$gpus" ]]; then
            problems+=("$name=$given, but there are $gpus GPUs here: leave it out to take what there is, or choose a flavor with more (a100-large has one, a100x8 has 8)")
        fi
    done <<<"$KNOBS"
    if [ "$gpus" -gt 0 ] && [ "${#problems[@]}" = 0 ]; then
        if [ "$HF_TRAIN_GPUS" -gt "$gpus" ]; then HF_TRAIN_GPUS=$gpus; fi  # the default is what there is, and no more than 8
        if [ $(( HF_RL_EXAMPLES_PER_STEP % HF_RL_GPUS )) != 0 ]; then
            problems+=("HF_RL_EXAMPLES_PER_STEP=$HF_RL_EXAMPLES_PER_STEP is not a multiple of the $HF_RL_GPUS GPUs of RL: try $(( (HF_RL_EXAMPLES_PER_STEP / HF_RL_GPUS + 1) * HF_RL_GPUS ))")
        fi
    fi
    for name in $(compgen -e | grep -E '^HF_(TRAIN|RL|BASE|MID|SFT|DATASET|SYNC|INSTALL)_' || true); do
        grep -q "^$name|" <<<"$KNOBS" || problems+=("there is no knob $name: hf_jobs/README.md lists them all")
    done
    if [ -n "${NPROC_PER_NODE:-}" ] && { wrong_number "$NPROC_PER_NODE" 1 64 >/dev/null || [ "$NPROC_PER_NODE" -gt "$gpus" ]; }; then
        problems+=("NPROC_PER_NODE=$NPROC_PER_NODE, but there are $gpus GPUs here: leave it out to take them all")
    fi
    for name in RUN WANDB_RUN; do
        [[ "${!name:-x}" =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$ ]] || problems+=("$name=${!name} is no run's name: use letters, digits, . _ and -")
    done
    check_store
    if [ "$1" = bootstrap_and_train_rl.sh ] && [ -z "${SFT_REPO:-}" ]; then
        problems+=("SFT_REPO is not set: RL starts from an SFT checkpoint, so give the Hub repository that holds one (the HF_OUTPUT_REPO of a run_full_pipeline.sh job)")
    fi
    if [ "${#problems[@]}" -gt 0 ]; then
        printf 'ERROR: %s\n' "${problems[@]}" >&2
        exit 2
    fi
    GPUS=$gpus
}

# wrong_number VALUE LEAST MOST: true, and says why, where VALUE is not a number between them; a decimal point is right where LEAST has one
wrong_number() {
    local form='^[0-9]{1,9}$'
    case "$2" in *.*) form='^[0-9]{1,3}(\.[0-9]{1,6})?$' ;; esac
    if ! [[ "$1" =~ $form ]]; then echo "is not $([[ "$2" = *.* ]] && echo "a number such as $2" || echo "a whole number")"; return 0; fi
    local value; value=$(millionths "$1")
    if [ "$value" -lt "$(millionths "$2")" ]; then echo "is too small"; return 0; fi
    if [ "$value" -gt "$(millionths "$3")" ]; then echo "is too large"; return 0; fi
    return 1
}

millionths() { local whole="${1%%.*}" part=000000; case "$1" in *.*) part="${1#*.}000000" ;; esac; echo $(( 10#$whole * 1000000 + 10#${part:0:6} )); }

# Where results are kept. A job's disk is gone when it ends, so a job without a store is refused.
check_store() {
    if [ -n "${HF_OUTPUT_REPO:-}" ] && [ -n "${HF_OUTPUT_DIR:-}" ]; then
        problems+=("HF_OUTPUT_REPO and HF_OUTPUT_DIR are both set: choose one")
    elif [ -n "${HF_OUTPUT_REPO:-}" ]; then
        [[ "$HF_OUTPUT_REPO" =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]] || problems+=("HF_OUTPUT_REPO=$HF_OUTPUT_REPO is no Hub repository: write user/name")
        [ -n "${HF_TOKEN:-}" ] || [ -s "${HF_TOKEN_PATH:-${HF_HOME:-${HOME:-/root}/.cache/huggingface}/token}" ] \
            || problems+=("HF_OUTPUT_REPO=$HF_OUTPUT_REPO needs the secret HF_TOKEN, a token that may write there")
    elif [ -n "${HF_OUTPUT_DIR:-}" ]; then
        [[ "$HF_OUTPUT_DIR" =~ ^/[A-Za-z0-9_./-]+$ ]] || problems+=("HF_OUTPUT_DIR=$HF_OUTPUT_DIR must be an absolute path of letters, digits, . _ - and /")
    elif [ -n "${JOB_ID:-}" ]; then
        problems+=("the disk of a job is gone when it ends, so its results need a place: set HF_OUTPUT_REPO=user/name and the secret HF_TOKEN, or HF_OUTPUT_DIR to a mounted bucket")
    fi
}

# begin SCRIPT "$@": from here on knobs are checked, folders chosen, packages installed and what an earlier job left in the store is back. --check only checks.
begin() {
    check_knobs "$1"
    if [ "${2:-}" = --check ]; then exit 0; fi
    export NANOCHAT_CACHE_ROOT="${NANOCHAT_CACHE_ROOT:-${HOME:-/root}/.cache}"
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$NANOCHAT_CACHE_ROOT/nanochat}" HF_HOME="${HF_HOME:-$NANOCHAT_CACHE_ROOT/huggingface}"
    export HF_DATASETS_CACHE="${HF_DATASETS_CACHE:-$HF_HOME/datasets}" HF_HUB_CACHE="${HF_HUB_CACHE:-$HF_HOME/hub}"
    mkdir -p "$NANOCHAT_BASE_DIR"
    say "job ${JOB_ID:-none}, ${ACCELERATOR:-no accelerator named}, $GPUS GPUs, ${CPU_CORES:-$(nproc)} cores, memory ${MEMORY:-not named}; base directory $NANOCHAT_BASE_DIR"
    install_system_packages
    set_up_environment
    check_arguments
    STORE=(python -m hf_jobs.store --repo="${HF_OUTPUT_REPO:-}" --folder="${HF_OUTPUT_DIR:-}")
    if has_store; then
        [ "${FRESH:-0}" = 1 ] || "${STORE[@]}" --pull || die "stage restore failed: what earlier jobs kept could not be fetched"
        export AFTER_STAGE="${STORE[*]} --push --after"
    fi
    # a stage's stamp depends on its command, which names the run: a restarted job must find the name of the first
    if [ -z "${WANDB_RUN:-}" ] && [ "${FRESH:-0}" != 1 ]; then WANDB_RUN=$(cat "$NANOCHAT_BASE_DIR/run_name" 2>/dev/null || true); fi
    export WANDB_RUN="${WANDB_RUN:-${RUN:-aquarat-hf-$(date -u +%Y%m%d-%H%M%S)}}"
    printf '%s\n' "$WANDB_RUN" > "$NANOCHAT_BASE_DIR/run_name"
    if [ -z "${WANDB_API_KEY:-}" ] && [ -z "${WANDB_MODE:-}" ]; then
        say "no WANDB_API_KEY: nothing goes to Weights & Biases; the curves are in the report"
        export WANDB_MODE=disabled
    fi
    if [ "$GPUS" -gt 0 ]; then
        export DEPTH="$HF_BASE_DEPTH" SHARDS="$HF_DATASET_SHARDS" NPROC_PER_NODE="$HF_TRAIN_GPUS" RL_NPROC="$HF_RL_GPUS"
    fi
}

has_store() { [ -n "${HF_OUTPUT_REPO:-}${HF_OUTPUT_DIR:-}" ]; }

install_system_packages() {
    local missing=() pair
    for pair in curl:curl git:git cc:build-essential pkg-config:pkg-config; do command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}"); done
    if [ "${#missing[@]}" = 0 ]; then return; fi
    if [ "$HF_INSTALL_BASE_PACKAGES" = 0 ]; then say "HF_INSTALL_BASE_PACKAGES=0, so not installed: ${missing[*]}"; return; fi
    say "installing ${missing[*]}"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" ca-certificates libssl-dev; } \
        || die "stage packages failed: ${missing[*]} could not be installed: choose an image with them, or set HF_INSTALL_BASE_PACKAGES=0 if they are not needed"
}

# a wrong flag in BASE_ARGS to EVAL_ARGS ends the job now and not hours later, when its stage begins
check_arguments() {
    if [ -z "${BASE_ARGS:-}${MID_ARGS:-}${SFT_ARGS:-}${RL_ARGS:-}${EVAL_ARGS:-}" ]; then return; fi
    python -c 'import sys; from hf_jobs.launch import check_arguments; check_arguments(dict(zip(sys.argv[1::2], sys.argv[2::2])))' \
        BASE_ARGS "${BASE_ARGS:-}" MID_ARGS "${MID_ARGS:-}" SFT_ARGS "${SFT_ARGS:-}" RL_ARGS "${RL_ARGS:-}" EVAL_ARGS "${EVAL_ARGS:-}" \
        || die "stage check failed: the line above says which flag is wrong"
}

# flag NAME KNOB: " --NAME=value" where the knob has a value
flag() { if [ -n "${!2:-}" ]; then printf ' --%s=%s' "$1" "${!2}"; fi; }

rl_flags() {
    flag examples-per-step HF_RL_EXAMPLES_PER_STEP; flag num-samples HF_RL_NUM_SAMPLES; flag max-new-tokens HF_RL_MAX_NEW_TOKENS
    flag temperature HF_RL_TEMPERATURE; flag save-every HF_RL_SAVE_EVERY; flag eval-every HF_RL_EVAL_EVERY; flag eval-examples HF_RL_EVAL_EXAMPLES
}

# run COMMAND...: with uploads every HF_SYNC_MINUTES beside it and one at the end, whatever the end is; then exit with the command's status
run() {
    local status=0 watcher= stopped=
    running=
    if has_store && [ "$HF_SYNC_MINUTES" != 0 ]; then "${STORE[@]}" --watch-minutes="$HF_SYNC_MINUTES" & watcher=$!; fi
    trap 'stopped=1; [ -z "$running" ] || kill -TERM -- "-$running" 2>/dev/null || true' TERM INT
    set -m  # a process group of its own, which TERM can be passed on to
    "$@" & running=$!
    set +m
    if [ -n "$stopped" ]; then kill -TERM -- "-$running" 2>/dev/null || true; fi  # it came before there was somebody to pass it on to
    wait "$running" || status=$?
    while kill -0 "$running" 2>/dev/null; do status=0; wait "$running" || status=$?; done  # a signal ends `wait` before the command has ended
    trap - TERM INT
    if [ -n "$watcher" ]; then kill "$watcher" 2>/dev/null || true; wait "$watcher" 2>/dev/null || true; fi
    if has_store; then "${STORE[@]}" --push --after=the-end || { say "the last upload failed"; if [ "$status" = 0 ]; then status=1; fi; }; fi
    if [ "$status" != 0 ]; then printf '\nERROR: %s ended with status %s; start the same job again to go on from what is kept\n' "$*" "$status" >&2; fi
    exit "$status"
}
