"""Tiny random multimodal models of every wrapper that can be tuned."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import DELTA, EXPERTS, HYBRID, LATENT, SLIDING, SMALL, THETA_ONLY, tiny_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

IMAGE, VIDEO, START, END = 120, 121, 122, 123
"""Token ids around and in place of images."""
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2}
VISION_2 = {**PATCHES, "depth": 1, "embed_dim": 32, "hidden_size": 64, "in_channels": 3, "mlp_ratio": 2}
VISION_2_5 = {
    **PATCHES, "depth": 1, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32, "window_size": 16,
    "fullatt_block_indexes": [0],
}  # fmt: skip
VISION_3 = {
    **PATCHES, "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip


def axes(*sections: int, **more: object) -> dict[str, object]:
    """A plain rope section whose pairs belong to time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections], **more}}


INTERLEAVED = axes(6, 5, 5, mrope_interleaved=True)
QUARTER = axes(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.25)
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
GROWING = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
        "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }
}  # fmt: skip
MISTRAL = {"vision_config": {**TOWER, "head_dim": 16, "model_type": "pixtral"}, "image_token_index": IMAGE}
SIZES: dict[str, dict[str, object]] = {
    "gemma3": {
        "text_config": {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING}, "vision_config": TOWER,
        "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
    },
    "kimi_k25": {
        "text_config": {
            **SMALL, **LATENT, "model_type": "deepseek_v3", "q_lora_rank": 24,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 5e4, "factor": 2.0, "original_max_position_embeddings": 32,
                "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8,
        },
        "projection_hidden_size": 32, "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_start_token_id": START, "vision_end_token_id": END, "tie_word_embeddings": False,
    },
    "mistral3": {
        "text_config": {**SMALL, "model_type": "mistral", "head_dim": 16, "sliding_window": None}, **MISTRAL,
    },
    "mistral3:ministral3": {
        "text_config": {**SMALL, "model_type": "ministral3", "head_dim": 16, "sliding_window": None, **GROWING},
        **MISTRAL,
    },
    "mistral3:mistral4": {
        # Without mscale_all_dim, whose gain on all logits stays the base's, while stock YaRN's would grow.
        "text_config": {
            **SMALL, **LATENT, "model_type": "mistral4", "q_lora_rank": 24,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
                "attention_factor": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
        **MISTRAL,
    },
    "qwen2_vl": {"text_config": {**SMALL, **axes(2, 3, 3)}, "vision_config": VISION_2, **QWEN},
    "qwen2_5_vl": {"text_config": {**SMALL, **axes(2, 3, 3)}, "vision_config": VISION_2_5, **QWEN},
    "qwen3_5": {
        "text_config": {**SMALL, **HYBRID, **DELTA, "head_dim": 32, **QUARTER}, "vision_config": VISION_3, **QWEN,
    },
    "qwen3_5_moe": {
        "text_config": {
            **SMALL, **EXPERTS, **HYBRID, **DELTA, "head_dim": 32, "shared_expert_intermediate_size": 32, **QUARTER,
        },
        "vision_config": VISION_3, **QWEN,
    },
    "qwen3_vl": {"text_config": {**SMALL, "head_dim": 32, **INTERLEAVED}, "vision_config": VISION_3, **QWEN},
    "qwen3_vl_moe": {
        "text_config": {**SMALL, **EXPERTS, "head_dim": 32, **INTERLEAVED}, "vision_config": VISION_3, **QWEN,
    },
}  # fmt: skip
"""The config of a small model of each wrapper. A name may end in a variant after a colon."""
THETA_ONLY_SIZES: dict[str, dict[str, object]] = {
    "gemma4": {
        "text_config": {**SMALL, **THETA_ONLY["gemma4_text"]},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        "audio_config": None, "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 124,
        "boi_token_id": START, "eoi_token_id": END,
    },
    "gemma4_unified": {
        "text_config": {**SMALL, **THETA_ONLY["gemma4_unified_text"]},
        "vision_config": {
            "patch_size": 4, "pooling_kernel_size": 1, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64,
        },
        "audio_config": None, "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 124,
        "boi_token_id": START, "eoi_token_id": END,
    },
}  # fmt: skip
"""The same for wrappers of language models whose configs carry only another theta."""


def wrapped_config(name: str, **text: object):
    """The config of a small wrapper; `text` replaces keys of its language model."""
    given = copy.deepcopy((SIZES | THETA_ONLY_SIZES)[name])
    given["text_config"] |= text
    return AutoConfig.for_model(name.partition(":")[0], **given)


def wrapped_model(name: str, dtype: torch.dtype = torch.float32, **text: object) -> PreTrainedModel:
    """A small random model whose attention is sharp enough for positions to matter."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(wrapped_config(name, **text), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:  # norms and biases
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.use_cache = False
    return model.eval()


RELEASED = {
    "kimi_k25": {
        "language_model.model.blocks.": "language_model.model.layers.", "model.mm_projector.": "mm_projector.",
        "vision_tower.encoder.patch_embed.": "vision_tower.patch_embed.",
    },
}  # fmt: skip
"""Prefixes under which transformers saves tensors, and those of released checkpoints where they differ."""
PROCESSOR = {
    "kimi_k25": {
        "media_proc_cfg": {
            "patch_size": 4, "merge_kernel_size": 2, "temporal_merge_kernel_size": 4, "num_frames_per_chunk": 4,
            "in_patch_limit": 64, "in_patch_limit_each_frame": 16, "in_patch_limit_video": 64,
            "patch_limit_on_one_side": 64, "fixed_output_tokens": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        },
    },
}  # fmt: skip
"""Configs of image processors that vLLM needs even to serve text."""


def save_wrapped(folder: Path, name: str, **text: object) -> Path:
    """A checkpoint folder with model and tokenizer, its tensors under the names that released checkpoints have."""
    wrapped_model(name, **text).save_pretrained(folder)
    if name in RELEASED:
        tensors = load_file(folder / "model.safetensors")
        for saved, released in RELEASED[name].items():
            tensors = {key.replace(saved, released): tensor for key, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"  # vLLM and others know the model by the name in released configs
    config.write_text(config.read_text().replace("Kimi_K25ForConditional", "KimiK25ForConditional"))
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR.get(name, {"patch_size": 4})))
    return folder


def image_inputs(name: str) -> dict[str, torch.Tensor]:
    """A prompt with one image, as the wrapper's processor would prepare it."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(1, 100, (40,), generator=generator).tolist()
    if name == "kimi_k25":
        image = [IMAGE] * 8  # a token holds 2 x 2 of 4 x 8 patches
        given = {
            "pixel_values": torch.randn(32, 3, 4, 4, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 8]]),
        }  # fmt: skip
    elif name.startswith("gemma4"):
        image, side = [IMAGE] * 4, 2 if name == "gemma4_unified" else 4  # patches, merged already or 2 x 2 per token
        pixels = torch.rand(1, side * side, 3 * 4 * 4, generator=generator)
        at = [[column, row] for row in range(side) for column in range(side)]
        given = {"pixel_values": pixels, "image_position_ids": torch.tensor([at])}
    elif name.startswith("qwen"):
        rows, columns = 4, 8  # patches; a token holds 2 x 2 of them
        image = [START, *[IMAGE] * (rows * columns // 4), END]
        pixels = torch.randn(rows * columns, 3 * 2 * 4 * 4, generator=generator)
        given = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])}
    else:
        side = 4 if name.startswith("gemma3") else 4
        image = [IMAGE] * side
        given = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
        if name.startswith("mistral3"):
            given["image_sizes"] = torch.tensor([[16, 16]])
    ids = torch.tensor([[*words[:10], *image, *words[10:]]])
    types = (ids == IMAGE).long()
    if name.startswith(("mistral3", "kimi")):
        return {"input_ids": ids, **given}
    key = "token_type_ids" if name.startswith("gemma3") else "mm_token_type_ids"
    return {"input_ids": ids, key: types, **given}
