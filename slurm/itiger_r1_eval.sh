#!/usr/bin/env bash
#SBATCH --job-name=itiger_r1_eval
#SBATCH --output=%x-%j.out --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
# Phase 4: what became of the run. Evaluates the checkpoint of each phase of this run that has left a pointer (EVAL_PHASES names phases, EVAL_SOURCE takes
# those of one stage), or with MODEL_TAG (and STEP) that one of stage EVAL_SOURCE; then the report.
source "${NANOCHAT_ROOT:-${SLURM_SUBMIT_DIR:-.}}/slurm/common.sh"
begin eval itiger_r1_eval.sh

TASKS="${TASKS:-ARC-Easy|ARC-Challenge|MMLU|GSM8K|MATH|BBH|HumanEval|MBPP}"
case "$(stage_name "${EVAL_SOURCE:-}")" in
    sft) phases="ot_sft rs_sft" ;;
    rl) phases=grpo ;;
    *) phases="ot_sft grpo rs_sft" ;;
esac
evaluated=0
for phase in ${EVAL_PHASES:-$phases}; do
    if [ -n "${EVAL_PHASES:-}${MODEL_TAG:-}" ] || [ -e "$(pointer "$phase")" ]; then
        find_parent "${EVAL_SOURCE:-rl}" "$phase"
        source slurm/chat_eval.sh
        evaluated=1
    fi
    if [ -n "${MODEL_TAG:-}" ]; then break; fi
done
[ "$evaluated" = 1 ] || die "run $RUN_ID has left no pointer in $NANOCHAT_BASE_DIR: run a phase first, set NANOCHAT_RUN_ID, or name a checkpoint with EVAL_SOURCE, MODEL_TAG and STEP"
python -m nanochat.report generate
