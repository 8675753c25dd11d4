#!/usr/bin/env bash
# The whole life of a small model, from an empty machine with Python 3.12. Running it again resumes.
#   bash launch/quickstart.sh [any option of jaxllm run]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
make_venv demo,web
exec .venv/bin/jaxllm run configs/quickstart.yaml "$@"
