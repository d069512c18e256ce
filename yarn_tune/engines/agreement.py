"""Comparison of vLLM with transformers: log-probabilities of the same prompts, as token ids."""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckFailed
from ..models import (
    WRAPPERS,
    config_json,
    exact_nll,
    hidden_states,
    language_model,
    load_model,
    logit_transform,
    to_device,
)
from .vllm_runner import Job, vllm_logprobs

TOLERANCE = 1e-3
"""Largest difference of a float32 log-probability between two engines that compute the same model. On random tokens
the rounding of float32 causes up to 1e-4, and a wrong RoPE 0.1 or more."""


TEXT_ONLY = {"language_model_only": True}
"""Option of vLLM to run a multimodal model without its vision tower, and so without a processor."""


@dataclass(frozen=True)
class Agreement:
    """Largest difference of a log-probability by prompt length."""

    differences: dict[int, float]
    max_model_len: int

    @property
    def worst(self) -> float:
        """The largest difference over all lengths; NaN counts as infinite."""
        return max(math.inf if math.isnan(d) else d for d in self.differences.values())


@torch.no_grad()
def transformers_logprobs(checkpoint: str, prompts: list[list[int]]) -> list[Tensor]:
    """Log-probabilities from transformers in float32, of each token but the first: `[n - 1]` per prompt."""
    model = to_device(load_model(checkpoint, dtype="float32"))
    head, transform = model.get_output_embeddings(), logit_transform(model.config)
    answers = []
    for prompt in prompts:
        ids = torch.tensor(prompt, device=model.device)
        # Read the whole prompt at once, as the engine does, since a table may depend on its length.
        hidden = hidden_states(model, ids[None])[0, :-1]
        answers.append(-exact_nll(hidden, ids[1:], head, transform).cpu())
    return answers


def random_prompts(
    vocabulary: int, native: int, window: int, left_out: frozenset[int] = frozenset()
) -> list[list[int]]:
    """Random token ids with lengths below, around and far above `native`, up to the last position of `window`.

    Token 1 replaces those of `left_out`: tokens that stand for images in a multimodal model.
    """
    generator = torch.Generator().manual_seed(5)
    lengths = sorted({n for n in (native // 2, native, native + 7, 2 * native, window - 1) if 2 <= n < window})
    drawn = [torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [[1 if token in left_out else token for token in prompt] for prompt in drawn]


def agreement(job: Job, reported: dict[str, Any]) -> Agreement:
    """Compare both engines on one job.

    Raises:
        CheckFailed: if the engine reported an error.
    """
    if "error" in reported:
        raise CheckFailed(f"vLLM does not serve {job.checkpoint}: {reported['error']}")
    ours = transformers_logprobs(job.checkpoint, job.prompts)
    pairs = zip(job.prompts, ours, reported["logprobs"], strict=True)
    differences = {len(p): (a - torch.tensor(b)).abs().max().item() for p, a, b in pairs}
    return Agreement(differences, reported["max_model_len"])


def compare_with_transformers(checkpoint: str, python: str | None = None) -> Agreement:
    """Serve a checkpoint with the real vLLM in float32 and compare it with transformers.

    Raises:
        UserError: if the interpreter has no vLLM.
        CheckFailed: if vLLM does not load the checkpoint.
    """
    whole = config_json(checkpoint)
    config, _ = language_model(whole)
    window = config["max_position_embeddings"]
    fidelity = Path(checkpoint) / "fidelity.json"
    section = config.get("rope_scaling") or config.get("rope_parameters") or {}
    native = section.get("original_max_position_embeddings") or window
    if fidelity.is_file():
        native = json.loads(fidelity.read_text(encoding="utf-8"))["learned"]["native"]
    wrapped = whole.get("model_type") in WRAPPERS
    images = {value for key, value in whole.items() if key.endswith(("token_id", "token_index"))} if wrapped else ()
    prompts = random_prompts(config["vocab_size"], native, window, frozenset(images))
    job = Job(checkpoint, prompts, TEXT_ONLY if wrapped else {})
    return agreement(job, vllm_logprobs([job], python or os.environ.get("YARN_TUNE_VLLM_PYTHON", sys.executable))[0])
