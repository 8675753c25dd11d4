# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: `make_venv EXTRAS` creates .venv and installs jaxllm with these extras into it.
# Does nothing if pyproject.toml has not changed since the last install; finishes one that was interrupted.

find_python() {
  local candidate
  for candidate in python3.12 python3.13 python3.14 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "jaxllm needs Python 3.12 or newer, and none was found; install python3.12 (or uv) and run this again" >&2
  return 1
}

# Names each package as pip reaches it, on one line that is rewritten; silent if stderr is not a terminal.
show_progress() {
  local line
  while IFS= read -r line; do
    case $line in
      Collecting* | Installing* | Building*) [ ! -t 2 ] || printf '\r\033[K%.70s' "$line" >&2 ;;
    esac
  done
  [ ! -t 2 ] || printf '\r\033[K' >&2
}

make_venv() {
  local extras=$1 stamp python
  stamp=".venv/.jaxllm-$extras-$(cksum < pyproject.toml | tr -d ' ')"
  [ -e "$stamp" ] && return
  echo "Installing jaxllm[$extras] into $PWD/.venv (1 to 3 minutes)" >&2
  if command -v uv > /dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --allow-existing --python 3.12 .venv
    uv pip install --quiet --python .venv/bin/python -e ".[$extras]"
  else
    # A .venv from uv, or from an interrupted start, has no working pip: create it again.
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
      python=$(find_python)
      "$python" -m venv --clear .venv
    fi
    .venv/bin/python -m pip install --disable-pip-version-check --no-compile -e ".[$extras]" | show_progress
  fi
  # Only what jaxllm imports is compiled to bytecode: 4 s, where all packages would take half a minute. Without it each
  # start compiles again wherever Python may not write.
  env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c 'import jaxllm.plan.planning, jaxllm.chat, jaxllm.stages.reinforce, jaxllm.report.report'
  touch "$stamp"
}
