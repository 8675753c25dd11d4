#!/usr/bin/env bash
# Runs a command again and again until it ends with status 0: after a crash, a lost machine, a hang.
#   bash launch/restart.sh RUN_DIR COMMAND...     e.g.  bash launch/restart.sh runs/quickstart jaxllm run configs/quickstart.yaml
# Waits longer after each failure (1 s to 5 min), and gives up after MAX_STUCK (5) failures without progress: no new
# checkpoint, result, sample or ranking in RUN_DIR. Bad input (status 2) is not tried again. SIGTERM and SIGINT go to the
# command, and end the loop.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: bash launch/restart.sh RUN_DIR COMMAND..." >&2; exit 2; }
run_dir=$1
shift
# Of a run directory in a store, what it has here.
folder=$run_dir
case $run_dir in *://*) folder=${JAXLLM_SCRATCH:-${TMPDIR:-/tmp}/jaxllm-$(id -un)} ;; esac
progress() {
  find "$folder" \( -name seal.json -o -name result.json -o -name samples.jsonl -o -name rankings.jsonl \) \
    -printf '%p %s %T@\n' 2> /dev/null | sort | cksum
}
stuck=0 wait=1 child=
trap 'told=1; [ -z "$child" ] || kill -s TERM "$child" 2> /dev/null' TERM INT
told=
while :; do
  before=$(progress)
  "$@" &
  child=$!
  wait "$child"
  status=$?
  while kill -0 "$child" 2> /dev/null; do wait "$child"; status=$?; done # a trap interrupts wait
  child=
  [ "$status" -eq 0 ] && exit 0
  [ -n "$told" ] && exit "$status"
  [ "$status" -eq 2 ] && exit 2
  if [ "$(progress)" = "$before" ]; then
    stuck=$((stuck + 1))
    wait=$((wait * 2 > 300 ? 300 : wait * 2))
  else
    stuck=0 wait=1
  fi
  if [ "$stuck" -ge "${MAX_STUCK:-5}" ]; then
    echo "restart: gave up after $stuck failures without progress (the last with status $status)" >&2
    exit "$status"
  fi
  echo "restart: ended with status $status; again in $wait s" >&2
  sleep "$wait"
done
