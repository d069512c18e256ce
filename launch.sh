#!/usr/bin/env bash
# yarn_tune in one command.
#
#   ./launch.sh                         set up on first use, then run the demo
#   ./launch.sh RECIPE [key=value ...]  run a recipe: train, compare, export, report
#   ./launch.sh test                    run all tests (20 to 30 minutes on two cores)
#   ./launch.sh test --fast             run the tests listed in tests/fast.txt (about two minutes)
#   ./launch.sh test [pytest options]   run some tests
#
# NUM_PROCESSES  number of processes on all machines together (default: the number of visible GPUs, or 1)
# NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT
#                for several machines: their number, the number of this one (from 0), and the address of the first; run
#                the same command on each (recipes/accelerate/slurm.sbatch is an example)
# VENV           folder of the virtual environment (default: .venv)
# ENGINES        folder of the serving engines that tests/engines/install.sh installs (default: .engines)
# PYTHON         interpreter that creates the environment (default: python3)
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv}
ENGINES=${ENGINES:-.engines}
PYTHON=${PYTHON:-python3}

cards() { nvidia-smi --list-gpus 2>/dev/null | wc -l; }

# The number of GPUs that CUDA_VISIBLE_DEVICES leaves visible.
gpus() {
  case ${CUDA_VISIBLE_DEVICES-all} in
    all) cards ;;
    "" | -1* | NoDevFiles) echo 0 ;;
    *) [ "$(cards)" -eq 0 ] && echo 0 || tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . ;;
  esac
}

setup() {
  local stamp
  stamp="$VENV/.ready-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$PYTHON is $("$PYTHON" --version 2>&1); yarn_tune needs Python 3.11 or later. Set PYTHON to another." >&2
    exit 2
  }
  echo "Setting up $VENV (first use; a few minutes) ..." >&2
  "$PYTHON" -m venv "$VENV"
  local torch
  torch=$(grep '^torch==' constraints.txt)
  if [ "$(cards)" -gt 0 ]; then
    "$VENV/bin/python" -m pip install --quiet "$torch"
  else
    # The CPU build is a tenth of the size of the default one, but only some package indexes have it.
    "$VENV/bin/python" -m pip install --quiet "$torch+cpu" 2>/dev/null || {
      echo "No CPU build of torch found; installing the default one. (For a smaller download set" \
        "PIP_EXTRA_INDEX_URL to PyTorch's CPU index.)" >&2
      "$VENV/bin/python" -m pip install --quiet "$torch"
    }
  fi
  "$VENV/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[trackers,dev]'
  rm -f "$VENV"/.ready-*
  touch "$stamp"
}

launch() {
  local processes=${NUM_PROCESSES:-$(gpus)} machines=${NUM_MACHINES:-1} rank=${MACHINE_RANK:-0}
  local ip=${MAIN_PROCESS_IP:-127.0.0.1} port=${MAIN_PROCESS_PORT:-29500}
  [ "$processes" -gt 0 ] || processes=1
  # Pass the expected process count, so that a launcher that silently starts fewer is detected.
  local run=(-m yarn_tune run "$@" "runtime.processes=$processes")
  # exec: signals and the exit code pass through.
  if [ "$processes" -eq 1 ]; then
    # One process communicates with no other, but without its launcher accelerate refuses consumer GPUs that lack P2P.
    export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} exec "$VENV/bin/python" "${run[@]}"
  fi
  # After SIGTERM a process finishes its step; by default the launcher kills it after 30 seconds.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
  local launcher=("$VENV/bin/python" recipes/accelerate/launcher.py)
  if [ "$(gpus)" -gt 0 ]; then
    exec "${launcher[@]}" accelerate --config_file recipes/accelerate/gpus.yaml --num_processes "$processes" \
      --num_machines "$machines" --machine_rank "$rank" --main_process_ip "$ip" --main_process_port "$port" "${run[@]}"
  fi
  # `accelerate launch --cpu` always starts one process; torchrun starts the given number.
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "${launcher[@]}" torchrun --nnodes "$machines" --node-rank "$rank" \
    --nproc-per-node $((processes / machines)) --master-addr "$ip" --master-port "$port" "${run[@]}"
}

tests() {
  export YARN_TUNE_ENGINES="${YARN_TUNE_ENGINES:-$ENGINES}"
  local parallel=(--numprocesses "$(nproc)" --dist loadfile)  # one process per core; the tests of a file share one
  if [ $# -eq 0 ]; then
    export OMP_NUM_THREADS=1
    set -- "${parallel[@]}"
  elif [ "$1" = --fast ]; then
    export OMP_NUM_THREADS=1
    local listed
    mapfile -t listed < <(grep -v '^\(#\|$\)' tests/fast.txt)
    set -- "${parallel[@]}" "${@:2}" "${listed[@]}"
  fi
  exec "$VENV/bin/python" -m pytest "$@"
}

setup
case "${1:-}" in
  test) shift; tests "$@" ;;
  "") launch recipes/tiny-demo.yaml ;;
  *) launch "$@" ;;
esac
