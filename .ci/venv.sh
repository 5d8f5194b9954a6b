#!/bin/sh
# Makes an environment from the locks in .ci/locks, or brings it up to them: sh .ci/venv.sh [run|dev|newest]
#   run     what the package needs
#   dev     that, and what its tests and checks need
#   newest  without a lock, from nothing: the newest releases that pyproject.toml allows, tests and checks included
# VENV=DIR               the environment's folder (.venv; for newest .venv-newest)
# PYTHON=python3.13      its interpreter (the one that it has; python3)
# TORCH=cpu|cuda         torch's build. auto: the one that it has; else CUDA's where there is an NVIDIA GPU, or where the other is not to be had
# TORCH_INDEX=URL        any other build (ROCm, another CUDA): the version is the lock's, what it brings is not
# Where the environment has another Python or build than is asked for, it is made anew.
set -eu
cd "$(dirname -- "$0")/.."
what=${1:-run}
default=.venv
[ "$what" != newest ] || default=.venv-newest
VENV=${VENV:-$default}
PYTHON=${PYTHON:-}
TORCH=${TORCH:-auto}
TORCH_INDEX=${TORCH_INDEX:-}
CPU_INDEX=https://download.pytorch.org/whl/cpu
LOCKS=.ci/locks
started=$(date +%s)

say() { echo "$VENV: $*"; }
fail() {
    echo "$VENV: $*" >&2
    exit 2
}
# What pip warns of is for those whose installation fails: a flaky or missing network, say. That an index of many lacks a package, never.
pip() {
    said=$("$VENV/bin/python" -m pip install -q --no-input --no-user --disable-pip-version-check --no-warn-script-location \
        --progress-bar off "$@" 2>&1) && return 0
    echo "$said" | grep -v "^WARNING: Location " >&2
    return 1
}
locked() { pip --no-deps --require-hashes --only-binary :all: "$@"; }
count() { echo $(($(sed -n 's,^\([a-z0-9][^=]*\)=.*,\1,p' "$@" | sort -u | wc -l))); }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_fit() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; }
ended() {
    code=$?
    [ $code != 0 ] || return 0
    [ "$what" = newest ] || echo "$VENV: not complete, for the reason above; the same command goes on from here" >&2
    exit $code
}

case $what in run | dev | newest) ;; *) fail "'$what' is no environment. Use run, dev or newest." ;; esac
case $TORCH in auto | cpu | cuda) ;; *) fail "TORCH=$TORCH is no build of torch. Use cpu, cuda or auto, or name an index: TORCH_INDEX=URL." ;; esac
[ "${TORCH_INDEX%/}" != "$CPU_INDEX" ] || { TORCH=cpu TORCH_INDEX=; }
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    # What the environment was made from: it may have to be made anew.
    ! is_fit "$VENV/bin/python" || PYTHON=$("$VENV/bin/python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
fi
is_fit "$PYTHON" || fail "Python 3.11 to 3.14 is needed; $PYTHON is $("$PYTHON" --version 2>&1). Name another one: make PYTHON=python3.12 ..."
trap ended EXIT

# The build: the one asked for, the one that the environment has, the one for this machine.
had=$(cat "$VENV/.torch" 2>/dev/null || true)
build=${TORCH_INDEX:-$TORCH}
[ "$build" != auto ] || build=${had:-auto}
if nvidia-smi -L >/dev/null 2>&1; then
    [ "$build" != auto ] || build=cuda
    [ "$build" != cpu ] || [ "$TORCH" = cpu ] || say "torch stays for CPUs, as this environment has it; for this machine's GPU: TORCH=cuda"
fi

if [ "$what" = newest ]; then
    rm -rf "$VENV"
elif [ -n "$had" ] && [ "$had" != "$build" ]; then
    say "another build of torch than before"
    rm -rf "$VENV"
elif [ -e "$VENV/bin/python" ] && [ "$(version_of "$VENV/bin/python")" != "$(version_of "$PYTHON")" ]; then
    say "another Python than before"
    rm -rf "$VENV"
fi
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "a new environment of $("$PYTHON" --version)"
    rm -rf "$VENV"
    # Debian's python3 comes without ensurepip unless python3-venv is installed: then pip is fetched from PyPI.
    "$PYTHON" -m venv "$VENV" >/dev/null 2>&1 || {
        rm -rf "$VENV"
        "$PYTHON" -m venv --without-pip "$VENV"
        "$VENV/bin/python" .ci/get_pip.py
    }
fi
locked --requirement "$LOCKS/pip.txt"
version=$(sed -n 's/^torch===\([^ ]*\).*/\1/p' "$LOCKS/torch-cuda.txt")

# torch by itself and first: a bare `torch` that some other package asks for would be PyPI's newest build, CUDA and all.
if [ "$what" = newest ]; then
    say "the newest torch that pyproject.toml allows (1 of 2)"
    case $build in
        cuda) set -- ;;
        auto | cpu) set -- --extra-index-url "$CPU_INDEX" --retries 2 --timeout 20 ;;
        *) set -- --index-url "$build" ;;
    esac
    pip "$@" "$(sed -n 's/^ *"\(torch[^"]*\)".*/\1/p' pyproject.toml | head -n 1)"
    say "the newest of everything else (2 of 2)"
    pip --editable ".[dev]"
else
    case $build in
        auto | cpu)
            say "torch $version for CPUs (1 of 3)"
            words=$(locked --extra-index-url "$CPU_INDEX" --retries 2 --timeout 20 --requirement "$LOCKS/torch-cpu.txt" 2>&1) || {
                # Only a build that is not to be had is a reason to take another: not one with another hash, not a full disk.
                case $build:$words in
                    auto:*"No matching distribution"* | auto:*ResolutionImpossible*) build=cuda ;;
                    *) echo "$words" >&2 && exit 1 ;;
                esac
                say "it is not to be had from $CPU_INDEX: PyPI's instead"
            }
            [ "$build" != auto ] || build=cpu
            ;;
        cuda) ;;
        *)
            say "torch $version from $build, by no lock's hashes (1 of 3)"
            pip --index-url "$build" "torch==$version"
            ;;
    esac
    if [ "$build" = cuda ]; then
        say "torch $version with CUDA, some 3 GB (1 of 3)"
        locked --requirement "$LOCKS/torch-cuda.txt"
    fi
    echo "$build" >"$VENV/.torch"
    set -- "$LOCKS/run.txt"
    [ "$what" = run ] || set -- "$@" "$LOCKS/dev.txt"
    say "$(count "$@") packages (2 of 3)"
    locked --requirement "$1" ${2:+--requirement "$2"}
    say "most_ray, editable (3 of 3)"
    pip --no-deps --no-build-isolation --editable .
fi
touch "$VENV/.installed" "$VENV/.installed-$what"
say "ready after $(($(date +%s) - started)) s"
