"""Run by vLLM's interpreter: what its own code computes from configs (a JSON list on stdin), as JSON on stdout.

Nothing is loaded but the config; `get_rope` is called as the model files of each family call it. Inverse frequencies
and multiplier are read off the cos and sin that are served, at the first row that is not position 0.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import vllm.model_executor.layers.rotary_embedding as rotary
import vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope as common
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.model import _get_and_verify_max_len
from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as phi3
from vllm.transformers_utils.config import get_config, get_hf_text_config
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

INTERLEAVED = ("cohere", "cohere2", "glm", "glm4", "deepseek_v3")


def answer(written: dict, folder: Path) -> dict:
    """Window, and tables by kind of layer; or the text of the exception."""
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    try:
        config = get_hf_text_config(get_config(folder, trust_remote_code=False))
        length = ModelArchConfigConvertorBase(config, config).derive_max_model_len_and_key()
        window = _get_and_verify_max_len(
            hf_config=config,
            model_arch_config=SimpleNamespace(derived_max_model_len_and_key=length),
            tokenizer_config=None,
            max_model_len=None,
            disable_sliding_window=False,
            sliding_window=None,
        )
        sections = config.rope_parameters
        sections = sections if "full_attention" in sections else {"": sections}
        return {"window": window, "tables": {k: table(config, s, window) for k, s in sections.items()}}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def table(config, section: dict, window: int) -> dict:
    """One rotary module's numbers."""
    current = SimpleNamespace(model_config=SimpleNamespace(max_model_len=window))
    rotary._ROPE_DICT.clear()
    gain = deepseek_gain(section) if config.model_type == "deepseek_v3" else 1.0
    with mock.patch.object(phi3, "get_current_vllm_config", return_value=current):
        made = rotary.get_rope(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            max_position=config.max_position_embeddings,
            rope_parameters=section,
            is_neox_style=config.model_type not in INTERLEAVED,
            dtype=torch.float32,
        )
    if isinstance(made, phi3.Phi3LongRoPEScaledRotaryEmbedding):
        cache = made.long_short_cos_sin_cache
        cache = cache[made.original_max_position_embeddings :] if made.use_long_rope else cache
        multiplier = made.long_mscale if made.use_long_rope else made.short_mscale
        rows = None
    else:
        cache, multiplier = made.cos_sin_cache, getattr(made, "mscale", 1.0)
        rows = len(cache)
    cos, sin = cache[1].double().chunk(2)
    served = torch.hypot(cos, sin)
    assert torch.allclose(served, torch.full_like(served, multiplier), rtol=1e-6)
    return {"inv_freq": torch.atan2(sin, cos).tolist(), "multiplier": multiplier, "rows": rows,
            "softmax_gain": gain}  # fmt: skip


def deepseek_gain(section: dict) -> float:
    """Set the rope type and return the multiplier of all logits, as DeepseekV2Attention of models/deepseek_v2.py."""
    if section["rope_type"] == "default":
        return 1.0
    source = Path(rotary.__file__).parents[2] / "models" / "deepseek_v2.py"
    by_key = 'rope_parameters.get("apply_yarn_scaling", True)' in source.read_text(encoding="utf-8")
    scales = section.get("apply_yarn_scaling", True) if by_key else section.get("attention_factor") != 1.0
    section["rope_type"] = "deepseek_yarn" if scales else "deepseek_llama_scaling"
    if not scales:
        return 1.0
    return common.yarn_get_mscale(section["factor"], float(section.get("mscale_all_dim", False))) ** 2


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name, set_current_vllm_config(VllmConfig()):
        answers = [answer(written, Path(name)) for written in json.load(sys.stdin)]
    print("\n" + json.dumps(answers))
