#!/usr/bin/env bash
# Launches a managed job of SkyPilot for each expert of a RUN that is not trained yet.
#
#   tpu_scripts/sky.sh [--dry-run] BUCKET RUN [OPTIONS OF SKY JOBS LAUNCH...]
#   tpu_scripts/sky.sh --dry-run gs://my-runs family --gpus A100:1
#
# RUN is a path in the bucket. The bucket must also be mounted here, at XELM_MOUNT (default: /runs), to
# find out which experts are left. tpu_scripts/sky.yaml describes the machines; options change them.
set -euo pipefail

dry_run=
[[ ${1:-} == --dry-run ]] && dry_run=yes && shift
[[ $# -ge 2 ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bucket=$1 run=$2
shift 2
left=$(xelm status "${XELM_MOUNT:-/runs}/$run" --unfinished)
read -ra names <<<"${left//$'\n'/ }"
for name in "${names[@]}"; do
  command=(sky jobs launch --yes --detach-run --name "xelm-$name" --env "XELM_RUN=$run")
  command+=(--env "XELM_NAME=$name" --env "XELM_BUCKET=$bucket" "$@" "$(dirname "$0")/sky.yaml")
  if [[ $dry_run ]]; then printf '%q ' "${command[@]}"; printf '\n'; else "${command[@]}"; fi
done
