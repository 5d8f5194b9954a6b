#!/bin/sh
# Makes .venv with everything that the project needs; run by every make target, does nothing when nothing changed.
set -eu
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
VENV=${VENV:-.venv}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "Python >= 3.11 is needed; $PYTHON is $("$PYTHON" --version 2>&1). Name another one: make PYTHON=python3.12 ..." >&2
    exit 2
}
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$VENV"
    # Debian's python3 comes without ensurepip unless python3-venv is installed: then pip is fetched from PyPI.
    "$PYTHON" -m venv "$VENV" >/dev/null 2>&1 || {
        rm -rf "$VENV"
        "$PYTHON" -m venv --without-pip "$VENV"
        "$VENV/bin/python" .ci/get_pip.py
    }
fi
PIP="$VENV/bin/python -m pip install --quiet --disable-pip-version-check"
# torch by itself and first: a bare `torch` that some other package asks for would be the newest build, CUDA and all.
if [ -n "${TORCH_INDEX:-}" ]; then
    $PIP --index-url "$TORCH_INDEX" "$TORCH"
else
    $PIP "$TORCH"
fi
$PIP --editable ".[dev]"
touch "$VENV/.installed"
