#!/bin/sh
# Trains one of the shipped configurations, on this machine or on the cluster that RAY_ADDRESS names.
set -eu

usage() {
    cat >&2 <<END
usage: $0 single|dp|ep|large [flags of most-ray train, as --dry_run or --max_steps 100]
  single  one worker: spoken digits, on a GPU or a CPU    jobs/configs/digits.yaml
  dp      data parallel, 8 GPUs                           jobs/configs/deepseek-v2-lite-dp.yaml
  ep      expert parallel, 8 GPUs                         jobs/configs/deepseek-v2-lite-ep.yaml
  large   data and expert parallel, 64 GPUs               jobs/configs/large.yaml
CONFIG=FILE uses another configuration. Relative paths of data and models are taken from the current folder.
END
    exit 2
}

[ $# -gt 0 ] || usage
jobs=$(dirname -- "$0")
case $1 in
    single) config=digits ;;
    dp | ep) config=deepseek-v2-lite-$1 ;;
    large) config=large ;;
    *) usage ;;
esac
kind=$1
shift
[ "$kind" != single ] || set -- --num_workers 1 "$@"
set -- train --config "${CONFIG:-$jobs/configs/$config.yaml}" "$@"

program=$jobs/../.venv/bin/most-ray
if [ ! -x "$program" ] && ! program=$(command -v most-ray); then
    echo "$0: most-ray is neither in .venv/bin nor on PATH; set up .venv (make .venv/.installed) or install it (pip install .)" >&2
    exit 2
fi

shown=
for word in "$program" "$@"; do
    case $word in
        *[!A-Za-z0-9_./:=,+@%-]* | '') word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    shown="$shown${shown:+ }$word"
done
printf '%s\n' "$shown"
exec "$program" "$@"
