#!/usr/bin/env bash
# Submits a Slurm job for each expert of a RUN that is not trained yet, as an array.
#
#   tpu_scripts/slurm.sh [--dry-run] RUN [OPTIONS OF SBATCH...]
#   tpu_scripts/slurm.sh RUN --gres=gpu:1 --time=24:00:00
#   tpu_scripts/slurm.sh RUN --nodes=2 --ntasks-per-node=4 --gres=gpu:4      # eight GPUs an expert
#
# Two minutes before a job reaches its time limit or is preempted, it saves a checkpoint, ends with
# code 75 and is queued again. The tasks of a job train its expert together. XELM_SETTINGS changes
# settings, such as "experts.runtime.mesh_fsdp=4 experts.runtime.dtype=bfloat16".
set -euo pipefail

run_or_print() {
  if [[ $dry_run ]]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

if [[ ${XELM_NAMES:-} ]]; then # the job itself
  read -ra names <<<"$XELM_NAMES"
  name=${names[$SLURM_ARRAY_TASK_ID]}
  options=()
  for setting in ${XELM_SETTINGS:-}; do options+=(--set "$setting"); done
  [[ ${SLURM_NTASKS:-1} -gt 1 ]] && options+=(--hosts)
  code=0
  srun xelm train "$XELM_RUN" "$name" "${options[@]}" || code=$?
  # 143: it was terminated between trainings, with nothing to save.
  [[ $code == 75 || $code == 143 ]] && exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
  exit "$code"
fi

dry_run=
[[ ${1:-} == --dry-run ]] && dry_run=yes && shift
[[ $# -ge 1 ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
run=$(realpath "$1")
shift
left=$(xelm status "$run" --unfinished)
read -ra names <<<"${left//$'\n'/ }"
[[ ${#names[@]} -gt 0 ]] || { echo "every expert of $run is trained" >&2; exit 0; }
mkdir -p "$run/train"
export XELM_RUN=$run XELM_NAMES="${names[*]}"
run_or_print sbatch --job-name=xelm --array="0-$((${#names[@]} - 1))" --requeue --open-mode=append \
  --signal=TERM@120 --output="$run/train/slurm-%A-%a.log" --export=ALL "$@" "$0"
