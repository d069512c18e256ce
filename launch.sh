#!/usr/bin/env bash
# yarn_tune in one command.
#
#   ./launch.sh                         set up on first use, then run the demo
#   ./launch.sh RECIPE [key=value ...]  run a recipe: train, compare, export, report
#   ./launch.sh test [pytest options]   run the tests
#
# NUM_PROCESSES  processes to start (default: all visible GPUs, or 1)
# VENV           where the environment goes (default: .venv)
# PYTHON         interpreter to make it with (default: python3)
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

gpus() { nvidia-smi --list-gpus 2>/dev/null | wc -l; }

setup() {
  local stamp
  stamp="$VENV/.ready-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  echo "Setting up $VENV (first use; a few minutes) ..." >&2
  "$PYTHON" -m venv "$VENV"
  local torch
  torch=$(grep '^torch==' constraints.txt)
  if [ "$(gpus)" -gt 0 ]; then
    "$VENV/bin/pip" install --quiet "$torch"
  else
    # The CPU build is a tenth of the default one. It is taken wherever pip is configured to find it.
    "$VENV/bin/pip" install --quiet "$torch+cpu" 2>/dev/null || {
      echo "No CPU build of torch found; installing the default one. (Point PIP_EXTRA_INDEX_URL at PyTorch's" \
        "CPU index for a smaller download.)" >&2
      "$VENV/bin/pip" install --quiet "$torch"
    }
  fi
  "$VENV/bin/pip" install --quiet --constraint constraints.txt --editable '.[trackers,dev]'
  rm -f "$VENV"/.ready-*
  touch "$stamp"
}

launch() {
  local processes=${NUM_PROCESSES:-$(gpus)}
  [ "$processes" -gt 0 ] || processes=1
  if [ "$(gpus)" -eq 0 ] && [ "$processes" -gt 1 ]; then
    # `accelerate launch --cpu` starts one process whatever number it is given; torchrun starts them all.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$VENV/bin/torchrun" --nproc-per-node "$processes" -m yarn_tune run "$@"
    return
  fi
  local options=(--num_processes "$processes" --num_machines 1 --mixed_precision no --dynamo_backend no)
  [ "$(gpus)" -gt 0 ] || options+=(--cpu --num_cpu_threads_per_process "${OMP_NUM_THREADS:-$(nproc)}")
  "$VENV/bin/accelerate" launch "${options[@]}" -m yarn_tune run "$@"
}

setup
case "${1:-}" in
  test) shift; exec "$VENV/bin/python" -m pytest "$@" ;;
  "") launch recipes/tiny-demo.yaml ;;
  *) launch "$@" ;;
esac
