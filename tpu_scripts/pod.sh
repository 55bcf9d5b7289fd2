#!/usr/bin/env bash
# Trains one expert on a TPU pod slice of its own, as a queued resource. If a spot slice is preempted,
# another is requested and the training resumes from its newest checkpoint.
#
#   tpu_scripts/pod.sh [--dry-run] [--on-demand] [--delete] RUN NAME ZONE [TYPE] [RUNTIME]
#   tpu_scripts/pod.sh --dry-run /mnt/runs/family uralic europe-west4-b v5litepod-16
#
# RUN is a path that every worker of the slice can read. XELM_SETUP is run on each worker first: mount
# the disk there, and install (default: pip install "xelm[tpu]"). XELM_SETTINGS changes settings for
# this training, such as "experts.runtime.mesh_fsdp=16 experts.runtime.dtype=bfloat16".
#
# --delete deletes the slices that this command made, once the expert is trained. Without it they are
# kept and cost money, and the commands that delete them are printed.
set -euo pipefail

dry_run='' spot=--spot delete='' trained=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --on-demand) spot='' ;;
    --delete) delete=yes ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
[[ $# -ge 3 ]] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
run=$1 name=$2 zone=$3 type=${4:-v5litepod-16} runtime=${5:-v2-alpha-tpuv5-lite}
setup=${XELM_SETUP:-pip install -q \"xelm[tpu]\"}
tries=${XELM_TRIES:-20}
train="xelm train $(printf '%q %q' "$run" "$name")"
for setting in ${XELM_SETTINGS:-}; do train+=" --set $(printf '%q' "$setting")"; done
made=()

run_or_print() {
  if [[ $dry_run ]]; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

state() {
  gcloud compute tpus queued-resources describe "$1" --zone="$zone" --format='value(state.state)'
}

still_there() { # SLICE: whether it still exists; a preemption is reported some minutes late
  local look
  for look in 1 2 3 4 5; do
    [[ $(state "$1" || true) == ACTIVE ]] || return 1
    ((look == 5)) || sleep 60
  done
}

on_all_workers() { # SLICE COMMAND
  run_or_print gcloud compute tpus tpu-vm ssh "$1" --zone="$zone" --worker=all --command="$2"
}

request() { # SLICE: returns when it is active
  local command=(gcloud compute tpus queued-resources create "$1" --node-id="$1" --zone="$zone")
  command+=(--accelerator-type="$type" --runtime-version="$runtime")
  [[ $spot ]] && command+=("$spot")
  run_or_print "${command[@]}" || exit 1
  made+=("$1")
  [[ $dry_run ]] && return
  local found unknown=0
  while ((unknown < 10)); do
    found=$(state "$1" || true)
    case $found in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING) return 1 ;;
      '') ((++unknown)) ;;
    esac
    sleep 30
  done
  echo "gcloud does not describe $1; see its messages above" >&2
  exit 1
}

# shellcheck disable=SC2329  # by the trap below
clean_up() {
  local slice command
  for slice in "${made[@]}"; do
    command=(gcloud compute tpus queued-resources delete "$slice" --zone="$zone" --force --quiet)
    if [[ $delete && $trained ]]; then run_or_print "${command[@]}"; else echo "to delete it: ${command[*]}" >&2; fi
  done
}
trap clean_up EXIT

stamp=$(date +%m%d%H%M%S)
for ((try = 1; try <= tries; try++)); do
  # A preempted slice keeps its name until it is deleted.
  slice="xelm-${name//[^a-z0-9]/-}-$stamp-$try"
  request "$slice" || { echo "$name: $slice was preempted before the training began" >&2; continue; }
  on_all_workers "$slice" "$setup"
  failed=0
  while true; do
    code=0
    on_all_workers "$slice" "$train --hosts" || code=$?
    [[ $code == 0 ]] && trained=yes && exit 0
    # 75: the training saved a checkpoint and must be resumed; 255: the connection broke. Either may
    # come some minutes before the slice is reported as preempted.
    ((++failed))
    if still_there "$slice"; then
      [[ $code == 75 || $code == 255 ]] && ((failed < 5)) && continue
      exit "$code"
    fi
    break
  done
  echo "$name: slice $slice was preempted; requesting another ($try of $tries)" >&2
done
exit 1
