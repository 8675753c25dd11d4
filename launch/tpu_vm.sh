#!/usr/bin/env bash
# A run on one or several slices of TPU VMs from a queued resource. JOB.yaml: see launch/example.yaml.
#   bash launch/tpu_vm.sh up JOB.yaml        ask for the slice and wait for it; install this working tree; start the run
#   bash launch/tpu_vm.sh logs JOB.yaml      follow the first worker's output
#   bash launch/tpu_vm.sh status JOB.yaml    state of the queued resource, and of the run on every worker
#   bash launch/tpu_vm.sh stop JOB.yaml      SIGTERM to the run: it saves and ends
#   bash launch/tpu_vm.sh down JOB.yaml      delete slice and queued resource
# `up` can be repeated at any time: it uses a slice that exists, asks again for one that was preempted, and leaves a running
# run alone.
set -euo pipefail
if [[ $# -ne 2 || ! $1 =~ ^(up|logs|status|stop|down)$ ]]; then
  echo "usage: bash launch/tpu_vm.sh up|logs|status|stop|down JOB.yaml" >&2
  exit 2
fi
job=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
described=$("${PYTHON:-.venv/bin/python}" launch/render.py shell "$job")
name='' project='' zone='' type='' topology='' runtime='' slices='' spot='' prepare='' environment='' run_dir='' arguments='' # render.py says
eval "$described"

queue() { # VERB ARGUMENTS...
  gcloud alpha compute tpus queued-resources "$@" --project="$project" --zone="$zone"
}
on() { # WORKERS COMMAND: in the copy of the working tree there; WORKERS are all, or 0
  queue ssh "$name" --node="$1" --worker="$1" --command="cd jaxllm && $2"
}
state() {
  queue describe "$name" --format='value(state.state)' 2> /dev/null || echo ABSENT
}

ask() {
  local kind=(--type="$type" --topology="$topology" --runtime-version="$runtime")
  local nodes=(--node-id="$name")
  [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
  [ -z "$spot" ] || kind+=(--spot)
  queue create "$name" "${kind[@]}" "${nodes[@]}"
}

wait_for_slice() {
  local now last=''
  while now=$(state) && [ "$now" != ACTIVE ]; do
    [ "$now" = "$last" ] || echo "$name: $now" >&2
    last=$now
    case $now in
      ABSENT) ask ;;
      FAILED | SUSPENDED) queue delete "$name" --force --quiet ;; # preempted, or never come: ask anew
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

going_on() { # on every worker
  local said
  said=$(on all "bash launch/daemon.sh status" 2> /dev/null) && ! grep -qvx running <<< "$said"
}

install_tree() {
  local tree
  tree=$(mktemp --suffix=.tar.gz)
  git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -czf "$tree" -T -
  queue scp "$tree" "$name:jaxllm.tar.gz" --node=all --worker=all
  rm "$tree"
  # The VMs' own Python may be too old; uv brings one.
  # shellcheck disable=SC2016 # $HOME is theirs
  queue ssh "$name" --node=all --worker=all --command='set -e
    export PATH="$HOME/.local/bin:$PATH"
    mkdir -p jaxllm && tar -xzf jaxllm.tar.gz -C jaxllm && cd jaxllm
    command -v uv > /dev/null || python3 -m pip install --quiet --user uv
    source launch/venv.sh && make_venv tpu,data'
}

case $1 in
  up)
    wait_for_slice
    if going_on; then # its code stays as it is
      echo "$name: running already"
      exit
    fi
    install_tree
    on all "$prepare"
    on all "env $environment bash launch/daemon.sh start $(printf %q "$run_dir") .venv/bin/jaxllm run $arguments --distributed"
    ;;
  logs) on 0 "tail -n 100 -F daemon.log" ;;
  status)
    echo "$name: $(state)"
    on all "bash launch/daemon.sh status"
    ;;
  stop) on all "bash launch/daemon.sh stop" ;;
  down) queue delete "$name" --force --quiet ;;
esac
