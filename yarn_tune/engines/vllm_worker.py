"""Log-probabilities of prompts from vLLM; run by the interpreter that vLLM is installed in.

Reads one JSON object on stdin, `{"jobs": [{"checkpoint", "prompts", "options"}], "output": path}`, and writes to
`output` a list with, for each job, `{"max_model_len", "logprobs": [[...], ...]}` or `{"error": text}`. It imports
nothing from yarn_tune, so that it needs vLLM alone.
"""

import gc
import json
import sys
from typing import Any


def main() -> None:
    """Run all jobs in one process, since importing vLLM takes longer than loading a small model."""
    order = json.load(sys.stdin)
    results: list[dict[str, Any]] = []
    for job in order["jobs"]:
        try:
            results.append(run(job))
        except Exception as error:  # an error in one checkpoint must not lose the results of the others
            results.append({"error": f"{type(error).__name__}: {error}"})
        with open(order["output"], "w", encoding="utf-8") as file:
            json.dump(results, file)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Log-probability of each token of each prompt but the first, given those before it."""
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found, unused-ignore]
    from vllm.distributed.parallel_state import (  # type: ignore[import-not-found, unused-ignore]
        cleanup_dist_env_and_memory,
    )

    options = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, **job.get("options", {})}
    llm = None
    try:
        # No tokenizer is loaded: prompts are token ids, and a tiny test model may have no tokenizer.
        llm = LLM(job["checkpoint"], skip_tokenizer_init=True, max_num_batched_tokens=4096, **options)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        answers = llm.generate(prompts, sampling)
        logprobs = [
            [answer.prompt_logprobs[i][token].logprob for i, token in enumerate(ids) if i > 0]
            for answer, ids in zip(answers, job["prompts"], strict=True)
        ]
        return {"max_model_len": llm.llm_engine.model_config.max_model_len, "logprobs": logprobs}
    finally:
        # Also after an error: what a model has set up for the process must not reach the next one.
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    main()
