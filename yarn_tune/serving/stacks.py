"""All known serving stacks: one row per range of versions that read a config in the same way.

The facts were read from the pinned sources in each row; `readers.py` documents the fields. Model types
listed as `unscaled` are run by that stack without any RoPE scaling, whatever the config has, and without a warning.
"""

from dataclasses import replace
from typing import Any

from ..errors import UserError
from .readers import EffectiveRope, Stack, read
from .rules import (
    lmdeploy_sections,
    old_vllm_window,
    parameters_first,
    scaling_first,
    sglang_sections,
    sglang_window,
    v4_sections,
    v5_sections,
    vllm_rows,
    vllm_sections,
    vllm_v4_sections,
    vllm_window,
)
from .tables import (
    Longrope,
    Yarn,
    attention_factor_only,
    deepseek_multiplier,
    genai_multiplier,
    hf_multiplier,
    lmdeploy_multiplier,
    mscale_multiplier,
    old_hf_multiplier,
    old_vllm_multiplier,
    own_multiplier,
    sglang_multiplier,
    turbomind_multiplier,
)

HF = "https://github.com/huggingface/transformers/blob"
VLLM = "https://github.com/vllm-project/vllm/blob"

VLLM_MODELLING = frozenset(
    {"arcee", "glm", "gpt_neox", "olmo", "olmo2", "olmo3", "phi", "seed_oss",
     "smollm3", "starcoder2"}
)  # fmt: skip
SGLANG_UNSCALED = frozenset(
    {"baichuan", "chatglm", "dbrx", "gemma", "gemma2", "gemma3_text", "gpt_j", "granitemoe", "mixtral", "olmo",
     "persimmon", "phi", "stablelm", "starcoder2"}
)  # fmt: skip
LLAMA_CPP_UNSCALED = frozenset(
    {"cohere", "cohere2", "dbrx", "deepseek", "falcon", "gemma", "gemma2", "glm", "gpt_neox", "mpt", "nemotron",
     "orion", "phi", "phi3", "stablelm"}
)  # fmt: skip
MLX_UNSCALED = frozenset(
    {"cohere", "cohere2", "gemma", "gemma2", "glm", "glm4", "gpt_neox", "mixtral", "olmo", "phi", "phi3", "qwen3_moe",
     "stablelm", "starcoder2"}
)  # fmt: skip
HF_LATENT = frozenset(
    {"axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
     "hy_v4", "longcat_flash", "minicpm3", "mistral4", "mistral_large4_text", "youtu"}
)  # fmt: skip
"""Model types whose modules in transformers 5.23 multiply the logits by a gain of mscale_all_dim."""
DEEPSEEK_TYPES = frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"})
"""Model types that vLLM, SGLang and LMDeploy run with latent attention of their own (DeepSeek); the first two build
their RoPE from the mscale keys."""
DEEPSEEK = Yarn(mscale_multiplier, betas="strict", truncate="always")
OLD_DEEPSEEK = Yarn(deepseek_multiplier, betas="strict", truncate="always")
SGLANG_DEEPSEEK = replace(OLD_DEEPSEEK, any_type=True)
VLLM_OTHER = frozenset({"ntk", "mllama4", "bailing_mrope", "openpangu", "telechat3-yarn", "xdrope"})
OLD_VLLM_OWN = {"gpt_oss": Yarn(own_multiplier, betas="named"), **dict.fromkeys(DEEPSEEK_TYPES, OLD_DEEPSEEK)}
VLLM_OWN = OLD_VLLM_OWN | dict.fromkeys(DEEPSEEK_TYPES, DEEPSEEK)
"""Model types whose RoPE vLLM builds itself; for gpt-oss it reads four keys and applies no attention factor."""
AFTER_4_57 = frozenset(
    {"afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "cosmos3_edge_text", "cwm",
     "deepseek_ocr2_text", "deepseek_v32", "deepseek_v4", "diffusion_gemma_text", "dots3_note_text",
     "emu3_text_model", "ernie4_5_vl_moe_text", "exaone_moe", "flint", "gemma4_text", "gemma4_unified_text",
     "glm4_moe_lite", "glm_moe_dsa", "glm_ocr_text", "granite4_vision_text", "granite_docling_text", "granite_swa",
     "granitemoe_swa", "hrm_text", "hunyuan_vl_text", "hy_v3", "hy_v4", "hyperclovax", "internlm3", "iquestcoder",
     "jais2", "kimi_k25", "kolibri1", "laguna", "lfm2_moe", "lfm3", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2",
     "minimax_m3_vl_text", "ministral3", "mistral4", "mistral_large4_text", "molmo2_text", "muse_glimmer_text",
     "muse_spark_text", "nanochat", "olmo_hybrid", "paddleocr_vl_text", "qwen3_5_moe_text", "qwen3_5_text",
     "qwen4_exp_text", "solar_open", "step3p5", "t5gemma2_decoder", "unlimited_ocr_text", "youtu", "zaya"}
)  # fmt: skip
"""Types of language models in transformers 5.23 that 4.57.6 does not have, and of wrappers of older ones."""
AFTER_4_55 = AFTER_4_57 | frozenset(
    {"apertus", "blt", "flex_olmo", "glm4v_moe_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "longcat_flash",
     "ministral", "olmo3", "qwen3_next", "qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen3_vl_text", "seed_oss",
     "vaultgemma"}
)  # fmt: skip
AFTER_4_50 = AFTER_4_55 | frozenset(
    {"arcee", "bitnet", "deepseek_v2", "deepseek_v3", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "evolla",
     "exaone4", "falcon_h1", "gemma3n_text", "glm4", "glm4_moe", "glm4v_text", "gpt_oss", "granitemoehybrid", "lfm2",
     "llama4_text", "minimax", "modernbert-decoder", "phi4_multimodal", "qwen3", "qwen3_moe", "smollm3"}
)  # fmt: skip
VLLM_FOREIGN = frozenset({"chatglm", "internlm2", "kimi_k2", "minicpm", "orion"})
"""Model types that vLLM runs and transformers lacks."""
HF_TYPES = frozenset({"default", "linear", "llama3", "dynamic"})
VLLM_TYPES = frozenset({"default", "linear", "llama3", "vllm dynamic"})
GEMMA_4 = frozenset({"gemma4_text", "gemma4_unified_text"})
SGLANG_TYPES = frozenset({"default", "llama3", "sglang linear", "sglang dynamic", "unscaled proportional"})
VLLM_MROPE_RAMP = frozenset({"qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text"})
"""Model types for which vLLM 0.32 stores cos and sin for O x s positions under mrope. For others, and in older releases
for all, it makes the table 4 times as long by multiplying O, which moves the ramp of YaRN too."""
HF_MROPE = frozenset({"default", "linear", "llama3", "dynamic", "yarn", "longrope"})
"""Rope types under which transformers' modules read mrope_section: all."""
HF_LONG = Longrope("attention_factor", ratio="key")

HF_SERVE = "python -c \"from transformers import pipeline; pipeline('text-generation', 'EXPORT')\""
VLLM_SERVE = "vllm serve EXPORT --max-model-len WINDOW"
TURBOMIND_SERVE = "lmdeploy serve api_server EXPORT --backend turbomind --session-len WINDOW"

VLLM_BIASES = frozenset(
    {"gemma2", "gemma3_text", "glm4", "granite", "llama", "nemotron", "qwen3", "qwen3_moe", "stablelm"}
)
"""Model types whose biases of queries and keys vLLM reads, by its model files. Its projections for cohere, ernie4_5,
gemma and granitemoe have no biases."""
LMDEPLOY_BIASES = frozenset({"gemma", "gemma2", "gemma3_text", "glm4", "llama", "qwen3", "qwen3_moe"})
"""Model types whose biases of queries and keys LMDeploy's PyTorch engine reads, by its model files of 0.18.0."""

STACKS: dict[str, Stack] = {
    stack.name: stack
    for stack in (
        Stack(
            "transformers", ">= 5.0", f"{HF}/v5.23.0/src/transformers/modeling_rope_utils.py#L346", "run: 5.23",
            v5_sections, Yarn(hf_multiplier, null_factor=True, nested_truncate=False), HF_LONG,
            nested=True, latent=HF_LATENT,
            others_plain=True, types=HF_TYPES | {"proportional"}, mrope=True, mrope_types=HF_MROPE,
            query_growth="section",
            biases=None,
            current_config=True, serve=HF_SERVE, default=True,
        ),
        Stack(
            "transformers-4.57", "4.56 to 4.57", f"{HF}/v4.57.6/src/transformers/modeling_rope_utils.py#L268",
            "run: 4.57.6", v4_sections, Yarn(hf_multiplier),
            Longrope("attention_factor", original="top", ratio="key without top"), top_partial=True, nested=True,
            latent=frozenset({"deepseek_v3", "longcat_flash"}), types=HF_TYPES, mrope=True,
            mrope_types=HF_MROPE, lacks=AFTER_4_57,
            ignores_mscale=frozenset({"deepseek_v2"}),
            biases=None,
            foreign=frozenset({"*"}), serve=HF_SERVE, default=True,
        ),
        Stack(
            "transformers-4.55", "4.51 to 4.55", f"{HF}/v4.55.4/src/transformers/modeling_rope_utils.py#L194",
            "run: 4.51.3, 4.55.4", v4_sections, Yarn(hf_multiplier, factor="ratio", truncate="by release"),
            Longrope("attention_factor", original="top", ratio="key without top"), top_partial=True,
            types=HF_TYPES, lacks=AFTER_4_55,
            biases=None,
            foreign=frozenset({"*"}), serve=HF_SERVE,
        ),
        Stack(
            "transformers-4.50", "4.45 to 4.50", f"{HF}/v4.50.3/src/transformers/modeling_rope_utils.py#L161",
            "run: 4.45.2, 4.50.3", v4_sections, Yarn(old_hf_multiplier, ramp_over="longest", truncate="always"),
            Longrope("attention_factor", original="top", ratio="key without top", selects="by release"),
            top_partial=True, types=HF_TYPES, lacks=AFTER_4_50,
            biases=None,
            foreign=frozenset({"*"}), serve=HF_SERVE,
        ),
        Stack(
            "vllm", ">= 0.30", f"{VLLM}/v0.32.0/vllm/model_executor/layers/rotary_embedding/__init__.py#L243",
            "run: 0.32.0", vllm_sections, Yarn(hf_multiplier, betas="strict"),
            Longrope("mscale", selects="by window"), vllm_window, vllm_rows, nested=True,
            modelling=VLLM_MODELLING, interleaved_longrope=False, hardwired=VLLM_OWN, latent=DEEPSEEK_TYPES,
            softmax_key="attention_factor", softmax_off=1.0, current_config=True, lacks=frozenset({"lfm3"}),
            lacks_alone=frozenset({"gemma4_unified_text"}),
            types=VLLM_TYPES | {"unscaled proportional"}, mrope=True, mrope_ramp=VLLM_MROPE_RAMP,
            query_growth="top level", biases=VLLM_BIASES,
            overrides=True, foreign=VLLM_FOREIGN, other_types=VLLM_OTHER,
            deepseek=DEEPSEEK, serve=VLLM_SERVE, default=True,
        ),
        Stack(
            "vllm-0.29", "0.20 to 0.29, on transformers 5",
            f"{VLLM}/v0.28.0/vllm/model_executor/layers/rotary_embedding/__init__.py#L243", "run: 0.28.0",
            vllm_sections, Yarn(old_vllm_multiplier, betas="strict"),
            Longrope("mscale", selects="by window"), old_vllm_window, vllm_rows, nested=True,
            interleaved_longrope=False, hardwired=OLD_VLLM_OWN,
            latent=DEEPSEEK_TYPES, softmax_key="apply_yarn_scaling", softmax_off=False,
            current_config=True, lacks=frozenset({"lfm3"}),
            lacks_alone=frozenset({"gemma4_unified_text"}),
            types=VLLM_TYPES, mrope=True, mrope_ramp=frozenset(), query_growth="top level",
            biases=VLLM_BIASES | {"arcee"},
            overrides=True, foreign=VLLM_FOREIGN, other_types=VLLM_OTHER,
            deepseek=OLD_DEEPSEEK, serve=VLLM_SERVE, default=True,
        ),
        Stack(
            "vllm-0.19", "0.12 to 0.19, on transformers 4",
            # patch_rope_parameters, read in a public copy of this file; no release of this range was run.
            f"{VLLM}/v0.16.0/vllm/transformers_utils/config.py", "source",
            vllm_v4_sections, Yarn(old_vllm_multiplier, betas="strict"),
            Longrope("mscale", selects="by window"), old_vllm_window, vllm_rows, top_partial=True,
            interleaved_longrope=False, hardwired=OLD_VLLM_OWN,
            latent=DEEPSEEK_TYPES - AFTER_4_57 | {"deepseek_v32"}, softmax_key="apply_yarn_scaling", softmax_off=False,
            # It has config classes of its own for these, in the last releases for kimi_k25.
            lacks=AFTER_4_57 - {"deepseek_v32", "kimi_k25"},
            types=frozenset({"default", "linear", "llama3"}), mrope=True, mrope_ramp=frozenset(),
            biases=frozenset({"llama"}),
            foreign=VLLM_FOREIGN, other_types=VLLM_OTHER,
            deepseek=OLD_DEEPSEEK, serve=VLLM_SERVE, default=True,
        ),
        Stack(
            "vllm-0.11", "0.6 to 0.11", f"{VLLM}/v0.11.0/vllm/model_executor/layers/rotary_embedding/__init__.py",
            "source", v4_sections, Yarn(old_vllm_multiplier, truncate="always"),
            Longrope("mscale", selects="by length"), old_vllm_window, vllm_rows, top_partial=True,
            interleaved_longrope=False, lacks=AFTER_4_57,
            biases=frozenset({"llama"}),
            serve=VLLM_SERVE,
        ),
        Stack(
            "sglang", "0.5.23",
            "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/layers/rotary_embedding/factory.py",
            "run: its rotary modules of 0.5.23", sglang_sections, Yarn(sglang_multiplier, betas="strict"),
            Longrope("mscale"), sglang_window,
            modelling=frozenset({"gpt_neox", "falcon"}), unscaled=SGLANG_UNSCALED, interleaved_longrope=False,
            types=SGLANG_TYPES, type_only=GEMMA_4, lacks_alone=frozenset({"gemma4_unified_text"}), current_config=True,
            hardwired=dict.fromkeys(DEEPSEEK_TYPES, SGLANG_DEEPSEEK), latent=DEEPSEEK_TYPES, mrope=True,
            softmax_key="apply_yarn_scaling", softmax_off=False, deepseek=SGLANG_DEEPSEEK,
            biases=frozenset({"llama"}),
            serve="python -m sglang.launch_server --model-path EXPORT --context-length WINDOW", default=True,
        ),
        Stack(
            "lmdeploy", "0.14 to 0.18, PyTorch engine",
            "https://github.com/InternLM/lmdeploy/blob/v0.18.0/lmdeploy/pytorch/nn/rotary_embedding.py",
            "run: its rotary modules of 0.18.0", lmdeploy_sections, Yarn(lmdeploy_multiplier, betas="strict"),
            Longrope("formula"), unscaled=frozenset({"cogvlm", "minicpm3", "phimoe"}), current_config=True,
            latent=DEEPSEEK_TYPES,  # and kimi_k25 from 0.17 on
            biases=LMDEPLOY_BIASES,
            serve="lmdeploy serve api_server EXPORT --backend pytorch --session-len WINDOW", default=True,
        ),
        Stack(
            "turbomind", "LMDeploy 0.14 to 0.18, TurboMind engine",
            "https://github.com/InternLM/lmdeploy/blob/v0.18.0/lmdeploy/turbomind/models/utils.py#L75",
            "run: its parse_rope_param of 0.18.0; the C++ side from source", lmdeploy_sections,
            Yarn(turbomind_multiplier, factor="ratio", ramp_over="longest", betas="strict", truncate="always"),
            "RuntimeError: Unsupported rope type: longrope",
            current_config=True, serve=TURBOMIND_SERVE,
        ),
        Stack(
            "turbomind-0.13", "LMDeploy 0.9 to 0.13, TurboMind engine",
            "https://github.com/InternLM/lmdeploy/blob/v0.9.2/lmdeploy/turbomind/deploy/source_model/llama.py",
            "source", v4_sections, Yarn(attention_factor_only, factor="ratio", truncate="always"),
            "Unsupported rope type: longrope", top_partial=True,
            serve=TURBOMIND_SERVE,
        ),
        Stack(
            "tgi", "last (January 2026)",
            "https://github.com/huggingface/text-generation-inference/blob/main/server/text_generation_server/layers/rotary.py",
            "source", v4_sections, Yarn(mscale_multiplier, betas="fixed", truncate="always"),
            Longrope("formula", original="needs top"), top_partial=True,
            serve="text-generation-launcher --model-id EXPORT --max-total-tokens WINDOW "
            "--max-input-tokens $((WINDOW - 1))",
        ),
        Stack(
            "llama.cpp", "as vendored in llama-cpp-python 0.3.36, from a converted config alone",
            "https://github.com/ggml-org/llama.cpp/blob/0c1e57098/src/llama-context.cpp#L173", "source",
            parameters_first, Yarn(own_multiplier, betas="fixed", truncate="always"),
            "its converter writes no longrope factors for this model type, which then runs unscaled; "
            "`yarn-tune export --gguf` carries them for Llama-type models",
            unscaled=LLAMA_CPP_UNSCALED,
            biases=frozenset({"llama"}),
            serve="yarn-tune export RUN --gguf model.gguf && llama-server -m model.gguf -c WINDOW",
        ),
        Stack(
            "mlx-lm", "0.32.2", "https://github.com/ml-explore/mlx-lm/blob/v0.32.2/mlx_lm/models/rope_utils.py#L126",
            "source", v4_sections, Yarn(mscale_multiplier, truncate="always"), Longrope("formula", selects="long"),
            unscaled=MLX_UNSCALED, top_partial=True, refused={"nemotron": "it takes linear scaling only"},
            latent=DEEPSEEK_TYPES - {"glm_moe_dsa"}, deepseek=Yarn(mscale_multiplier, truncate="always"),
            biases=frozenset({"llama"}),
            serve="mlx_lm.server --model EXPORT",
        ),
        Stack(
            "tensorrt-llm", "1.x, PyTorch backend",
            "https://github.com/NVIDIA/TensorRT-LLM/blob/main/tensorrt_llm/_torch/attention_backend/interface.py",
            "source", v4_sections, Yarn(mscale_multiplier, truncate="always"), Longrope("formula"),
            rows=lambda view: view.longest, top_partial=True,
            serve="trtllm-serve EXPORT --max_seq_len WINDOW",
        ),
        Stack(
            "exllamav2", "0.3.2", "https://github.com/turboderp-org/exllamav2/blob/v0.3.2/exllamav2/rope.py#L80",
            "source", v4_sections, Yarn(own_multiplier, ramp_over="longest", betas="fixed", truncate="always"),
            Longrope("formula", selects="by window", original="needs top"), top_partial=True,
            serve="python test_inference.py -m EXPORT -l WINDOW",
        ),
        Stack(
            "exllamav3", "1.6.5", "https://github.com/turboderp-org/exllamav3/blob/v1.6.5/exllamav3/util/rope.py#L279",
            "source", scaling_first, Yarn(attention_factor_only, factor="ratio"),
            Longrope("formula", selects="by window"),
            serve="python examples/chat.py -m EXPORT -cs WINDOW",
        ),
        Stack(
            "onnx-genai", "0.9", "https://github.com/microsoft/onnxruntime-genai/blob/main/src/python/py/models/builder.py",
            "source", parameters_first, Yarn(genai_multiplier, truncate="never", needs_beta=True, whole_head=True),
            "outside Phi-3 and Phi-MoE its builder drops longrope without a warning", rows=lambda view: view.longest,
            serve="python -m onnxruntime_genai.models.builder -i EXPORT -o onnx -p int4 -e cpu",
        ),
        Stack(
            "ctranslate2", "4.x", "https://github.com/OpenNMT/CTranslate2/blob/master/python/ctranslate2/converters/transformers.py",
            "source", v4_sections, "NotImplementedError: YaRN is not supported",
            "which multiplier its runtime applies was not established",
            unscaled=frozenset({"falcon", "gemma", "gemma2", "gemma3_text", "gpt_neox", "phi"}), top_partial=True,
            serve="ct2-transformers-converter --model EXPORT --output_dir ct2",
        ),
        Stack(
            "openvino", "optimum-intel 1.2x (traces transformers' modules)",
            f"{HF}/v5.23.0/src/transformers/modeling_rope_utils.py#L346", "source", v5_sections,
            Yarn(hf_multiplier, null_factor=True, nested_truncate=False), HF_LONG, nested=True,
            latent=HF_LATENT, others_plain=True, current_config=True,
            biases=None,
            serve="optimum-cli export openvino --model EXPORT openvino",
        ),
    )
}  # fmt: skip


def default_stacks() -> tuple[str, ...]:
    """The stacks that an export serves unless the recipe names others."""
    return tuple(name for name, stack in STACKS.items() if stack.default)


def reading(name: str, config: dict[str, Any]) -> EffectiveRope:
    """What a stack computes from a config.json.

    Raises:
        UserError: if there is no such stack, or the config is not that of a model with RoPE.
    """
    if name not in STACKS:
        raise UserError(f"no stack {name!r}; known: {', '.join(STACKS)}")
    return read(STACKS[name], config, STACKS["transformers"])
