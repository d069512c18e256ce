#!/usr/bin/env bash
# Everything that a CPU could not measure, in one command on one GPU, without a network.
#
#   bash benchmarks/gpu.sh OUT_FOLDER [--minutes 8] [--base FOLDER | --gguf FILE] [--documents FOLDER]
#   bash benchmarks/gpu.sh --smoke            every part in miniature, also on a CPU
#
# PYTHON names the interpreter (default: python3). It needs torch, transformers >= 5, accelerate, peft and safetensors;
# parts that need deepspeed are skipped by name where it is missing. benchmarks/gpu/ holds the parts.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m gpu "$@"
