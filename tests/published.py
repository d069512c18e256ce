"""Shapes of the bases that the recipes name, as published in their config.json: enough to count memory and time."""

from transformers import AutoConfig, PreTrainedConfig

LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3 = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "rope_theta": 500000.0,
}  # fmt: skip
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
OLMO = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 100352, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_3_5 = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 248320, "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_3_5_27B = {
    **QWEN_3_5, "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64, "num_attention_heads": 24,
    "linear_num_value_heads": 48,
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, object]]] = {
    "llama-2-7b-32k": ("llama", LLAMA_7B),
    "llama-2-7b-128k": ("llama", LLAMA_7B),
    "llama-2-13b-32k": (
        "llama",
        {**LLAMA_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
         "num_attention_heads": 40},
    ),
    "llama-3-8b-64k": ("llama", LLAMA_3),
    "llama-3.1-8b-256k": ("llama", {**LLAMA_3, "max_position_embeddings": 131072}),
    "mistral-7b-v0.3-128k": (
        "mistral",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None,
         "tie_word_embeddings": False},
    ),
    "qwen2.5-7b-128k": (
        "qwen2",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
         "tie_word_embeddings": False},
    ),
    "qwen3-8b-128k": (
        "qwen3",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
         "tie_word_embeddings": False},
    ),
    "gpt-neox-20b-16k": (
        "gpt_neox",
        {"hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
         "vocab_size": 50432, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    ),
    "pythia-1.4b-16k": (
        "gpt_neox",
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16,
         "vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    ),
    "phi-4-mini-256k": (
        "phi3",
        {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24,
         "num_key_value_heads": 8, "vocab_size": 200064, "max_position_embeddings": 131072, "sliding_window": None,
         "tie_word_embeddings": True, "partial_rotary_factor": 0.75},
    ),
    "gemma-3-1b-128k": (
        "gemma3_text",
        {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
         "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 32768,
         "sliding_window": 512},
    ),
    "gemma-3-12b-256k": (
        "gemma3_text",
        {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072,
         "sliding_window": 1024},
    ),
    "gemma-4-e4b-256k": (
        "gemma4_text",
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 18,
         "hidden_size_per_layer_input": 256, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
         "max_position_embeddings": 131072, "sliding_window": 512},
    ),
    "command-r-256k": (
        "cohere",
        {"hidden_size": 8192, "intermediate_size": 24576, "num_hidden_layers": 40, "num_attention_heads": 64,
         "num_key_value_heads": 8, "vocab_size": 256000, "max_position_embeddings": 131072},
    ),
    "olmo-2-7b-32k": ("olmo2", {**OLMO, "max_position_embeddings": 4096}),
    "olmo-3-7b-128k": ("olmo3", {**OLMO, "vocab_size": 100278, "max_position_embeddings": 65536}),
    "smollm2-135m-16k": ("llama", SMOLLM2),
    "smollm2-135m-32k": ("llama", SMOLLM2),
    "smollm3-3b-128k": (
        "smollm3",
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
         "num_key_value_heads": 4, "vocab_size": 128256, "max_position_embeddings": 65536},
    ),
    "deepseek-v2-lite-160k": (
        "deepseek_v2",
        {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
         "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
         "num_experts_per_tok": 6, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
         "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1, "vocab_size": 102400,
         "n_group": 1, "topk_group": 1, "max_position_embeddings": 163840},
    ),
    "glm-4.5-air-256k": (
        "glm4_moe",
        {"hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46,
         "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128,
         "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
         "vocab_size": 151552, "attention_bias": True, "use_qk_norm": False, "max_position_embeddings": 131072},
    ),
    "minimax-m2-384k": (
        "minimax_m2",
        {"hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62, "num_attention_heads": 48,
         "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 256, "num_experts_per_tok": 8,
         "vocab_size": 200064, "rotary_dim": 64, "max_position_embeddings": 196608},
    ),
    "kimi-k2-256k": (
        "deepseek_v3",
        {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
         "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "n_shared_experts": 1,
         "num_experts_per_tok": 8, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
         "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1, "vocab_size": 163840,
         "n_group": 1, "topk_group": 1, "max_position_embeddings": 131072},
    ),
    "qwen3.5-9b-512k": ("qwen3_5_text", QWEN_3_5),
    "qwen3.5-27b-512k": ("qwen3_5_text", QWEN_3_5_27B),
    "qwen3.5-27b-1m": ("qwen3_5_text", QWEN_3_5_27B),
    "ministral-3-8b-512k": (
        "ministral3",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 262144},
    ),
}  # fmt: skip


def published(stem: str) -> PreTrainedConfig:
    """The config of a recipe's base."""
    family, sizes = PUBLISHED[stem]
    return AutoConfig.for_model(family, **sizes)
