#!/usr/bin/env bash
# One run in N processes on this machine, as on N machines: to try out a job, or for one GPU a process.
#   bash launch/local.sh N CONFIG [any option of jaxllm run]     e.g.  bash launch/local.sh 2 configs/tiny.yaml --cpu-devices 1
# Running it again resumes. SIGTERM and Ctrl-C stop all processes at the same step, with everything
# saved and status 0. With restarts after failures:
#   bash launch/restart.sh runs/tiny bash launch/local.sh 2 configs/tiny.yaml
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash launch/local.sh N CONFIG [any option of jaxllm run]" >&2
  exit 2
fi
count=$1
shift
here=$(dirname "${BASH_SOURCE[0]}")/..
python=${PYTHON:-$here/.venv/bin/python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count

pids=()
trap 'kill -s TERM "${pids[@]}" 2> /dev/null || true' TERM INT
for ((number = 0; number < count; number++)); do
  # A process takes the GPU of its number; on a CPU the variable means nothing.
  JAX_PROCESS_ID=$number JAX_LOCAL_DEVICE_IDS=$number "$python" -m jaxllm run "$@" --distributed &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2> /dev/null; do # a trap interrupts wait
    code=0
    wait "$pid" || code=$?
  done
  [ "$status" -ne 0 ] || status=$code
done
exit "$status"
