#!/usr/bin/env bash
# A command in the background of a machine one logs out of, restarted after failures (restart.sh):
#   bash launch/daemon.sh start RUN_DIR COMMAND...    does nothing where it runs already
#   bash launch/daemon.sh stop                        SIGTERM, and waits until everything is saved
#   bash launch/daemon.sh status                      "running", "ended with status N", or "not started"
# Output goes to daemon.log in the current directory.
set -euo pipefail
usage() {
  echo "usage: bash launch/daemon.sh start RUN_DIR COMMAND... | stop | status" >&2
  exit 2
}
running() { [ -e daemon.pid ] && kill -0 "$(cat daemon.pid)" 2> /dev/null; }

case ${1:-} in
  start)
    [ $# -ge 3 ] || usage
    if running; then
      echo "running already"
      exit
    fi
    rm -f daemon.status
    # A process group of its own: it outlives this shell, and `stop` reaches all of it.
    # shellcheck disable=SC2016 # these are the inner shell's
    setsid bash -c 'trap : TERM; status=0; bash launch/restart.sh "$@" || status=$?; echo "$status" > daemon.status' \
      daemon "${@:2}" >> daemon.log 2>&1 < /dev/null &
    echo $! > daemon.pid
    echo "started"
    ;;
  stop)
    if running; then kill -s TERM -- "-$(cat daemon.pid)"; fi
    while running; do sleep 0.2; done
    ;;
  status)
    if running; then
      echo "running"
    elif [ -e daemon.status ]; then
      echo "ended with status $(cat daemon.status)"
    else
      echo "not started"
    fi
    ;;
  *) usage ;;
esac
