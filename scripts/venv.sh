#!/usr/bin/env bash
# Make the virtual environment named by $1: Python 3.11 or newer, everything of the `dev` extra.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}

say() { printf 'daruma: %s\n' "$*" >&2; }

command -v "$python" >/dev/null || { say "no $python: install Python 3.11 or newer (apt-get install python3 python3-venv)"; exit 3; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { say "$python is $("$python" --version); 3.11 or newer is needed: PYTHON=python3.12 make …"; exit 3; }

if [ ! -x "$venv/bin/python" ]; then
    say "making $venv"
    # Debian splits ensurepip off; the error of `venv` would not say where it went.
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { say "python3-venv is missing: apt-get install python3-venv"; exit 3; }
        say "installing python3-venv"
        apt-get update -qq && apt-get install -y -qq python3-venv
    fi
    "$python" -m venv "$venv"
fi
[ -x "$venv/bin/uv" ] || "$venv/bin/pip" install --quiet --disable-pip-version-check 'uv>=0.5'
say "installing the project and its libraries into $venv (torch is large: 5 GB the first time)"
"$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" --constraint constraints.txt --editable '.[dev]'
