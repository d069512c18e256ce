"""Real serving engines: log-probabilities of a checkpoint, compared with those of transformers."""

from .agreement import TOLERANCE, Agreement, ask_vllm, random_prompts
from .vllm_runner import QUIET, Job, vllm_logprobs

__all__ = ["QUIET", "TOLERANCE", "Agreement", "Job", "ask_vllm", "random_prompts", "vllm_logprobs"]
