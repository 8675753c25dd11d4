#!/usr/bin/env bash
# Random faults in real processes, for a while; prints a table and fails where a result is not the undisturbed one.
#   bash tests/faults/soak.sh --minutes 60 [--seed N] [--processes 1 2] [--faults N]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
exec "${PYTHON:-.venv/bin/python}" -m tests.faults.harness "$@"
