# Sourced by quickstart.sh and test.sh: `make_venv EXTRAS` makes .venv and installs jaxllm with these extras into it.
# Does nothing where pyproject.toml has not changed since the last time.

find_python() {
  local candidate
  for candidate in python3.12 python3.13 python3.14 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "jaxllm needs Python 3.12 or newer, and none was found; install python3.12 (or uv) and run this again" >&2
  return 1
}

make_venv() {
  local extras=$1 stamp python
  stamp=".venv/.jaxllm-$extras-$(cksum < pyproject.toml | tr -d ' ')"
  [ -e "$stamp" ] && return
  echo "Installing jaxllm[$extras] into $PWD/.venv" >&2
  if command -v uv > /dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
    uv pip install --quiet --python .venv/bin/python -e ".[$extras]"
  else
    python=$(find_python)
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
  fi
  touch "$stamp"
}
