"""Real serving engines: log-probabilities of a checkpoint, compared with those of transformers."""

from .agreement import TOLERANCE, Agreement, compare_with_transformers, random_prompts
from .vllm_runner import QUIET, Job, vllm_logprobs

__all__ = ["QUIET", "TOLERANCE", "Agreement", "Job", "compare_with_transformers", "random_prompts", "vllm_logprobs"]
