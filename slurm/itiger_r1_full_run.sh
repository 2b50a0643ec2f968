#!/usr/bin/env bash
#SBATCH --job-name=itiger_r1_full_run
#SBATCH --output=%x-%j.out --ntasks=1
# All phases of R1-style training, each after the one before has ended well; when one fails, those behind it are cancelled.
#
#   bash slurm/itiger_r1_full_run.sh --gres=gpu:8 --time=24:00:00       or sbatch; what stands behind is passed to every phase's sbatch
#
# It begins from MODEL_TAG (and STEP) of stage SFT_SOURCE, else from this run's mid_train.sh. Prints the run's name and one "phase job" per line.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
refuse_a_bare_export itiger_r1_full_run.sh

PHASES=(ot_sft grpo rs_generate rs_sft eval)
export NANOCHAT_RUN_ID="${NANOCHAT_RUN_ID:-r1-$(date +%Y%m%d-%H%M%S)}"
for variable in "${!SLURM_@}"; do  # of the job that this may be: the phases are not its steps
    if [ "$variable" != SLURM_CONF ]; then unset "$variable"; fi
done

ids=()
submit() {
    local phase=$1 export=ALL after=(); shift
    if [ "${#ids[@]}" -gt 0 ]; then
        after=(--dependency="afterok:${ids[-1]}" --kill-on-invalid-dep=yes)
        export=ALL,MODEL_TAG=,STEP=  # they name where the run begins: later phases follow the pointers
    fi
    local id
    id=$(sbatch --parsable --export="$export" "${after[@]}" "$@" "slurm/itiger_r1_$phase.sh") || {
        if [ "${#ids[@]}" -gt 0 ]; then scancel "${ids[@]}"; fi
        die "sbatch refused phase $phase; the phases submitted before it are cancelled: ${ids[*]:-none}"
    }
    ids+=("${id%%;*}")
    echo "$phase ${ids[-1]}"
}

echo "run $NANOCHAT_RUN_ID"
for phase in "${PHASES[@]}"; do submit "$phase" "$@"; done
