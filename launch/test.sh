#!/usr/bin/env bash
# Lint, types and tests, from an empty machine with Python 3.12.
#   bash launch/test.sh [any option of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
make_venv demo,dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
unset PYTHONDONTWRITEBYTECODE  # tests start the program a hundred times: it must not be compiled every time
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1  # what the program sets for itself on a CPU
exec .venv/bin/python -m pytest "$@"
