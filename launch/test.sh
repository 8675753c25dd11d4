#!/usr/bin/env bash
# Lint, types and tests, from an empty machine with Python 3.12. Each tier contains the one before it:
#   bash launch/test.sh [any option of pytest]           units and one life; 15 to 25 minutes on 2 cores
#   bash launch/test.sh --life [any option of pytest]    and whole lives, several processes, more meshes and variants
#   bash launch/test.sh --slow [any option of pytest]    everything
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in # the last -m wins: it replaces the one in pyproject.toml
  --life) set -- -m "not slow" "${@:2}" ;;
  --slow) set -- -m "" "${@:2}" ;;
esac
# shellcheck source=launch/venv.sh
source launch/venv.sh
make_venv demo,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
unset PYTHONDONTWRITEBYTECODE  # tests start the program many times: Python must not compile it each time
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1  # jaxllm sets it for itself on a CPU
exec .venv/bin/python -m pytest "$@"
