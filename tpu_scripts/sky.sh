#!/usr/bin/env bash
# A managed job of SkyPilot for each expert of a RUN that is not trained yet.
#
#   tpu_scripts/sky.sh [--dry-run] BUCKET RUN [OPTIONS OF SKY JOBS LAUNCH...]
#   tpu_scripts/sky.sh --dry-run gs://my-runs family --gpus A100:1
#
# RUN is its path in the bucket, which is also mounted here, at XELM_MOUNT (by default /runs), to see
# which experts are left. The machines are those of tpu_scripts/sky.yaml, unless an option says
# otherwise.
set -euo pipefail

dry_run=
[[ ${1:-} == --dry-run ]] && dry_run=yes && shift
[[ $# -ge 2 ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bucket=$1 run=$2
shift 2
left=$(xelm status "${XELM_MOUNT:-/runs}/$run" --unfinished)
read -ra names <<<"${left//$'\n'/ }"
for name in "${names[@]}"; do
  command=(sky jobs launch --yes --detach-run --name "xelm-$name" --env "XELM_RUN=$run")
  command+=(--env "XELM_NAME=$name" --env "XELM_BUCKET=$bucket" "$@" "$(dirname "$0")/sky.yaml")
  if [[ $dry_run ]]; then printf '%q ' "${command[@]}"; printf '\n'; else "${command[@]}"; fi
done
