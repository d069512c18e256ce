"""The commands that `yarn-tune lm-eval` prints run lm-evaluation-harness offline, on transformers and on vLLM."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from tiny import finished_run
from yarn_tune.cli.main import main
from yarn_tune.engines.vllm_runner import QUIET
from yarn_tune.export.checkpoint import export

DEMO = Path(__file__).parents[2] / "data" / "tiny-base"


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_the_printed_commands_run(backend, vllm_python, tmp_path, capsys):
    export_ = export(finished_run(tmp_path, "scale", window=1024, base=DEMO))
    assert main(["lm-eval", str(export_), "--tasks", "niah_single_1"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if f"--model {backend} " in line)
    program, *words = shlex.split(line)
    assert program == "lm_eval"
    words = [w.replace("dtype=bfloat16", "dtype=float32,enforce_eager=True" if backend == "vllm" else "dtype=float32")
             for w in words]  # fmt: skip
    # The script lm_eval names its interpreter by an absolute path, which fails where the environment has been moved.
    command = [vllm_python, "-m", program, *words, "--limit", "2"]
    command += ["--device", "cpu"] if backend == "hf" else []
    offline = {"HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    row = next(line for line in done.stdout.splitlines() if line.startswith("|niah_single_1|"))
    assert 0 <= float(row.split("|")[7]) <= 1
