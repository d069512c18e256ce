"""The real vLLM, run by the interpreter that it is installed in: prompt log-probabilities of a checkpoint."""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
"""Environment of vLLM: one process and no usage report; the settings for CPUs have no effect on a GPU."""


@dataclass(frozen=True)
class Job:
    """A checkpoint and the prompts to score."""

    checkpoint: str
    prompts: list[list[int]]
    options: dict[str, Any]
    """Further arguments of vLLM's `LLM`, such as `kv_cache_dtype`."""


def vllm_logprobs(jobs: list[Job], python: str, extra_path: str | None = None) -> list[dict[str, Any]]:
    """Run vLLM on each job; returns what `vllm_worker.py` describes, one entry per job.

    Args:
        jobs: checkpoints and prompts; one process runs them all.
        python: an interpreter with vLLM.
        extra_path: value of PYTHONPATH, for another release unpacked beside the installed one.

    Raises:
        UserError: if that interpreter has no vLLM.
    """
    child = Path(__file__).with_name("vllm_worker.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        order = {"jobs": [vars(job) for job in jobs], "output": str(output)}
        environment = os.environ | QUIET | ({"PYTHONPATH": extra_path} if extra_path else {})
        try:
            done = subprocess.run(
                [python, str(child)], input=json.dumps(order), text=True, capture_output=True, env=environment
            )
        except OSError as error:
            raise UserError(f"--engine-python: {python!r} cannot be run: {error}") from error
        if output.is_file():
            results: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))
            if any(result.get("error", "").endswith("No module named 'vllm'") for result in results):
                raise UserError(
                    f"--engine: {python!r} has no vLLM; run `pip install vllm` in an environment of its own, and name "
                    "its interpreter with --engine-python or YARN_TUNE_VLLM_PYTHON"
                )
            if len(results) == len(jobs):
                return results
        reason = (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
        raise UserError(f"--engine-python: {python!r} could not run vLLM: {reason}")
