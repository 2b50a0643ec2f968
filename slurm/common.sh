# What every batch job needs: the repository's root, the environment, the parent's checkpoint, torchrun on 1..N nodes, signals and requeue, the pointer
# it leaves. Sourced by the other scripts, which hold one command each. Nothing here knows a cluster: what one needs, sbatch's own flags and SBATCH_*
# variables say (account, partition, gres, time).

if [ -n "${COMMON_IS_SOURCED:-}" ]; then return; fi  # a phase is a stage's job with other defaults
COMMON_IS_SOURCED=1 PHASE= PARENT_TAG= ASKED= SRUN= STOP_WITH= RESULTS=
set -euo pipefail

# sbatch copies a script to a spool folder, so only where it was submitted tells where the repository is
cd "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}"
NANOCHAT_ROOT=$PWD
source scripts/bootstrap.sh
source scripts/pipeline.sh

# refuse_a_bare_export SCRIPT: --export=A=b without ALL has dropped the user's variables (keys, paths), and PATH from every srun
refuse_a_bare_export() {
    case ",${SLURM_EXPORT_ENV:-ALL}," in *,ALL,*) export SLURM_EXPORT_ENV=ALL; return ;; esac
    local given=$SLURM_EXPORT_ENV
    case "$given" in NONE|NIL) given= ;; esac
    die "--export=$SLURM_EXPORT_ENV has dropped your environment, with the keys, NANOCHAT_BASE_DIR and the PATH of every srun. Submit it as
    sbatch --export=ALL${given:+,$given} slurm/$1"
}

# begin PHASE SCRIPT: called first. PHASE names the pointer that the job leaves.
begin() {
    if [ -n "$PHASE" ]; then return; fi
    PHASE=$1
    [ -n "${SLURM_JOB_ID:-}" ] || die "this is a batch job, and there is none: sbatch --export=ALL slurm/$2"
    refuse_a_bare_export "$2"
    read_env_file .env
    if [ -f "${NANOCHAT_VENV:-.venv}/bin/activate" ]; then source "${NANOCHAT_VENV:-.venv}/bin/activate"; fi
    check_packages
    choose_base_dir
    FRESH=0 choose_places
    choose_ranks
    RUN_ID="${NANOCHAT_RUN_ID:-default}"
    trap 'asked_to_stop' USR1
    say "job $SLURM_JOB_ID (start $(( ${SLURM_RESTART_COUNT:-0} + 1 ))): phase $PHASE of run $RUN_ID, $NPROC ranks on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), base directory $NANOCHAT_BASE_DIR"
}

# compute nodes install nothing: often they have no network, and many jobs share one environment
check_packages() {
    local missing; missing=$(python -c 'import importlib.util as u; print(*(name for name in ("torch", "cyclopts", "rustbpe") if u.find_spec(name) is None))') || missing=python
    [ -z "$missing" ] || die "$(command -v python || echo 'no python') lacks $missing. On the login node: source scripts/bootstrap.sh && set_up_environment; or set NANOCHAT_VENV, or activate an environment before sbatch"
}

# the seeds' places, the first that is set: all nodes and all jobs must see it
choose_base_dir() {
    local cache="${PROJECT_CACHE_ROOT:-${SCRATCH:-}}"
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-${cache:+$cache/nanochat}}"
    default_base_dir
    if [ -n "${SLURM_TMPDIR:-}" ] && [ "${ALLOW_SLURM_TMPDIR:-0}" != 1 ]; then
        case "$NANOCHAT_BASE_DIR/" in "$SLURM_TMPDIR"/*)
            die "NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR lies in SLURM_TMPDIR, which goes with the job: choose a folder that stays, or set ALLOW_SLURM_TMPDIR=1" ;;
        esac
    fi
}

# ranks: one per GPU that Slurm gave, else one per node; NPROC_PER_NODE overrides. NPROC is their number over all nodes.
choose_ranks() {
    NPROC_PER_NODE="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
    [ "$NPROC_PER_NODE" -ge 1 ] || die "NPROC_PER_NODE=$NPROC_PER_NODE: a job needs at least one rank per node"
    NPROC=$(( NPROC_PER_NODE * SLURM_JOB_NUM_NODES ))
    local cores=$(( ${SLURM_CPUS_ON_NODE:-1} / NPROC_PER_NODE ))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores > 0 ? cores : 1 ))}"
    # the address by which Slurm itself reaches the first node: its name need not resolve
    local first; first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')}"
    export MASTER_PORT="${MASTER_PORT:-$(( 20000 + SLURM_JOB_ID % 20000 ))}"
}

# stage_name NAME: the seeds say chatsft and chatrl for the stages sft and rl
stage_name() {
    case "$1" in
        chatsft|chatrl) echo "note: stage $1 is called ${1#chat} here" >&2; echo "${1#chat}" ;;
        *) echo "$1" ;;
    esac
}

pointer() { echo "$NANOCHAT_BASE_DIR/latest_$1_$RUN_ID.json"; }

# find_parent STAGE PHASE [--parent]: sets PARENT_STAGE, PARENT_TAG and PARENT_STEP: what MODEL_TAG and STEP name, else what the pointer of PHASE in this
# run says (with --parent: the checkpoint from which that one began)
find_parent() {
    PARENT_STAGE=$(stage_name "$1") PARENT_TAG="${MODEL_TAG:-}" PARENT_STEP="${STEP:-}"
    if [ -z "$PARENT_TAG" ]; then
        local found
        found=$(python -m scripts.pointer --read="$(pointer "$2")" ${3:+"$3"}) \
            || die "phase $PHASE needs the checkpoint of phase $2 in run $RUN_ID: run that first, set NANOCHAT_RUN_ID to its run, or name a checkpoint with MODEL_TAG and STEP"
        read -r PARENT_STAGE PARENT_TAG PARENT_STEP <<<"$found"
    fi
    say "$PHASE begins from $PARENT_STAGE/$PARENT_TAG${PARENT_STEP:+ at step $PARENT_STEP}"
}

# ---------------------------------------------------------------------------------------------------------------------
# Running, stopping, going on

# on_node -m MODULE FLAGS...: what srun starts once per node. torchrun ignores the signal that its workers save at; so do they until they listen.
on_node() {
    trap '' USR1
    if [ "$NPROC" = 1 ]; then exec python "$@"; fi
    # the first node is the host of the rendezvous, whatever its name resolves to; behind -- because torchrun would take --run for a flag of its own
    exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$NPROC_PER_NODE" --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" \
        --rdzv_id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv_conf="is_host=$(( SLURM_NODEID == 0 ))" ${TORCHRUN_ARGS:-} -m -- "${@:2}"
}

# launch_training STAGE TAG -m MODULE FLAGS...: a stage that saves at USR1 and goes on with --resume, and then its pointer
launch_training() {
    STOP_WITH=USR1 RESULTS="$NANOCHAT_BASE_DIR/*_checkpoints/$2/meta_*"
    run_step "${@:3}" --resume
    python -m scripts.pointer --write="$(pointer "$PHASE")" --stage="$1" --model-tag="$2" || die "no pointer could be written for phase $PHASE"
}

# launch RESULTS -m MODULE FLAGS...: what writes down each answer in the files RESULTS as it comes, and may end at any moment
launch() {
    STOP_WITH=TERM RESULTS=$1
    run_step "${@:2}"
}

asked_to_stop() {
    say "asked to stop: the time limit is near, or somebody has sent USR1"
    ASKED=1
    tell_ranks
}

# again and again: a rank that has not begun to listen does not hear it
tell_ranks() {
    if [ -z "$ASKED" ] || [ -z "$SRUN" ]; then return; fi
    (while kill -0 "$SRUN" 2>/dev/null; do scancel --signal="$STOP_WITH" "$SLURM_JOB_ID" || true; sleep 3; done) &
}

# run_step -m MODULE FLAGS...: one srun over all nodes. A job that is asked to stop meanwhile goes back to the queue.
run_step() {
    local status=0 before; before=$(results)
    say "$*"
    export NPROC NPROC_PER_NODE
    if [ -z "$ASKED" ]; then
        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
            bash -c "$(declare -f on_node); on_node \"\$@\"" on_node "$@" &
        SRUN=$!
        tell_ranks  # if the signal came just now
        wait "$SRUN" || status=$?
        while kill -0 "$SRUN" 2>/dev/null; do status=0; wait "$SRUN" || status=$?; done  # a signal ends the wait, not the step
        SRUN=
        if [ "$status" = 0 ]; then return; fi
    fi
    if [ -n "$ASKED" ] || [ "$status" = 75 ]; then go_on_later "$before"; fi
    die "phase $PHASE failed with status $status: the lines above say why. The same sbatch goes on from the last checkpoint"
}

# results: changes whenever what RESULTS names grows
results() { { compgen -G "$RESULTS" || true; } | xargs -r -d '\n' stat -c '%n %s' | cksum; }

# go_on_later BEFORE: back to the queue. Not where the job was cancelled or preempted (Slurm has decided), and not where it got nowhere.
go_on_later() {
    case "$(scontrol show job -o "$SLURM_JOB_ID")" in
        *' JobState=RUNNING '*) ;;
        *) die "the job is being ended, and not requeued from here; what is done is saved" ;;
    esac
    if [ "$(results)" = "$1" ]; then
        die "phase $PHASE was asked to stop before it had anything new to save: give the job more than $(squeue -h -j "$SLURM_JOB_ID" -o %l), with --time, or save earlier (SAVE_EVERY)"
    fi
    say "back to the queue; the next start goes on from here"
    scontrol requeue "$SLURM_JOB_ID" || die "Slurm does not requeue this job; what is done is saved, and the same sbatch goes on from here"
    sleep 600  # Slurm ends this start of the script
    die "Slurm has not ended this job within 10 minutes of its requeue"
}
