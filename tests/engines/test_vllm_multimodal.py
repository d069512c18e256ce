"""Exports of multimodal models, served by the real vLLM on text: the same log-probabilities as transformers.

vLLM runs the language model with its positions per axis, without the vision tower: its processors need a torchvision
that imports beside a CPU build of torch, in whose place `without_torchvision` has an empty one (and an empty numba).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import finished_run
from wrapped import SIZES, THETA_ONLY_SIZES, axes, save_wrapped, wrapped_config
from yarn_tune.engines.agreement import TEXT_ONLY, agreement, random_prompts
from yarn_tune.engines.vllm_runner import QUIET, Job, vllm_logprobs
from yarn_tune.export.checkpoint import export
from yarn_tune.serving.conformance import frequency_error
from yarn_tune.serving.stacks import reading

NATIVE, WINDOW, TOLERANCE = 128, 1024, 1e-4
TEXT = {
    "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": NATIVE,
}  # fmt: skip
"""Sizes that vLLM's CPU kernels run."""
YARN = SIZES["kimi_k25"]["text_config"]["rope_parameters"]
GEMMA_4 = {"global_head_dim": 128, "sliding_window": 64}
WRAPPED = {
    "gemma3": {"query_pre_attn_scalar": 64, "sliding_window": 64},
    "gemma4": {**GEMMA_4, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gemma4_unified": GEMMA_4,
    "kimi_k25": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": NATIVE // 2},
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
    "mistral3": {},
    "qwen3_vl": axes(12, 10, 10, mrope_interleaved=True),
}  # fmt: skip
"""With a scale (Gemma 4: another theta), and gains per pair in the weights."""
WIDTHS = {"out_hidden_size", "mm_embed_dim", "output_proj_dims"}
"""Keys of vision configs that hold the hidden size of the language model."""


def exported(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    vision = (SIZES | THETA_ONLY_SIZES)[name]["vision_config"]
    for key in WIDTHS & vision.keys():
        monkeypatch.setitem(vision, key, TEXT["hidden_size"])
    base = save_wrapped(folder / "base", name, **{**TEXT, **WRAPPED[name]})
    settings = ("rope.query_gains=pair", "export.tolerance=1e-3")  # the comparison with vLLM is the test here
    if name in THETA_ONLY_SIZES:
        settings, offsets = (*settings, "rope.init=ntk"), {"log_temperature": 0.0}
        return export(finished_run(folder, "fixed", window=WINDOW, base=base, settings=settings, **offsets))
    return export(finished_run(folder, "scale", window=WINDOW, base=base, settings=settings))


def test_vllm_computes_what_transformers_does(tmp_path, vllm_python, monkeypatch):
    jobs = {}
    for name in WRAPPED:
        target = exported(tmp_path / name, name, monkeypatch)
        window = json.loads((target / "config.json").read_text())["text_config"]["max_position_embeddings"]
        jobs[name] = Job(str(target), random_prompts(100, NATIVE, window), TEXT_ONLY)  # 120 to 123 stand for images
    stub = str(Path(__file__).with_name("without_torchvision"))
    answers = vllm_logprobs(list(jobs.values()), vllm_python, stub)
    for (name, job), answer in zip(jobs.items(), answers, strict=True):
        found = agreement(job, answer)
        assert found.max_model_len >= WINDOW, name
        assert found.worst < TOLERANCE, (name, found.differences)
        assert len(found.differences) == 5


TABLE = """
import json, sys, torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
section, window, factor = json.loads(sys.argv[1])
with set_current_vllm_config(VllmConfig()):
    torch.set_default_dtype(torch.float32)
    rope = get_rope(64, max_position=window, rope_parameters=section, mrope_positions_factor=factor)
print(json.dumps(rope.cos_sin_cache[1].tolist()))
"""


@pytest.mark.parametrize(("name", "factor"), [("qwen2_5_vl", 4), ("qwen3_vl", 1)])
def test_the_ramp_under_axes_is_read_as_vllm_computes_it(name, factor, vllm_python):
    """In models that do not ask for another length, vLLM multiplies O by 4 before it computes the ramp."""
    more = {"mrope_interleaved": True} if factor == 1 else {}
    section = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "rope_theta": 1e4,
               "beta_fast": 8.0, "beta_slow": 1.0, "truncate": False, "mrope_section": [8, 12, 12], **more}  # fmt: skip
    config = wrapped_config(name, **{**TEXT, "rope_parameters": section}).to_dict()
    found = reading("vllm", config).tables[""][0]
    asked = [vllm_python, "-c", TABLE, json.dumps([section, 1024, factor])]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, env=os.environ | QUIET)
    row = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    angles = torch.cat([found.inv_freq.cos(), found.inv_freq.sin()])
    torch.testing.assert_close(angles * found.multiplier, row, rtol=0, atol=1e-6)
    differs = frequency_error(found.inv_freq, reading("transformers", config).tables[""][0].inv_freq) > 0.1
    assert differs == (factor == 4)
