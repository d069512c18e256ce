"""All facts about Hugging Face model classes that tuning RoPE depends on: one row per family.

To add a family, add a row here and a small config to the tests. A model type without a row is refused.

In all supported families one `*RotaryEmbedding` module below the base model computes cos and sin for every layer.
Most compute them from one `inv_freq` buffer, which sliding layers share where there are any. Where layers differ by
kind (Gemma 3, OLMo 3), the module holds one table per kind, and only that of the full-attention layers is tuned: the
others attend within a sliding window, which no change of RoPE extends.
"""

from dataclasses import dataclass
from typing import Literal

FULL = "full_attention"
"""The kind of layer that is tuned where a model has several."""


Rows = Literal["separate", "per_head", "shared", "falcon", "latent"]


@dataclass(frozen=True)
class Place:
    """Tensors in which queries can be scaled before they are rotated."""

    pattern: str
    """Matches tensor names; group 1 is the layer, group `head` (if there is one) the head."""
    rows: Rows
    """How the rows of the heads are arranged in these tensors; see `query_layout.ROWS`."""


BIAS = "attention_bias"
Q_PROJ = Place(r"layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)$", "separate")
Q_NORM = Place(r"layers\.(\d+)\.self_attn\.q_norm\.weight$", "shared")
Q_NORM_ACROSS = Place(Q_NORM.pattern, "separate")
Q_LAYERNORM = Place(r"layers\.(\d+)\.self_attn\.q_layernorm\.(weight|bias)$", "shared")
Q_LATENT = Place(r"layers\.(\d+)\.(?:self_attn|attention)\.q(_b)?_proj\.weight$", "latent")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Every fact about one model type."""

    model_type: str
    note: str = ""
    """Note in the table of docs/families.md."""
    refused: str = ""
    """The reason why models of this type cannot be tuned; empty where they can."""
    alone: bool = True
    """Whether transformers has a causal class for it; else it is tuned only inside the wrappers of `wrappers.py`."""
    since: tuple[int, int] = (5, 0)
    """First release of transformers that reads the rope sections of its exports correctly in tests."""

    queries: Place | None = None
    """Where queries are scaled; None if this is not known, or if a norm follows the rotation."""
    query_norm: Place | None = None
    """Where queries are scaled if one of `norm_keys` enables a norm of the queries."""
    norm_keys: tuple[str, ...] = ("use_qk_norm", "qk_layernorm")
    norm_shift: float = 0.0
    """1 where the query norm multiplies by 1 + weight."""
    biased: bool = False
    """Whether releases have biases on queries and keys, so that every stack that runs them reads these."""
    bias_key: str = ""
    """Config key that switches biases of the attention projections on or off; empty where none is known."""
    twin: str = ""
    """Model type whose class computes the same with the same tensors, without a sliding window; empty if none does."""
    gated: bool = False
    """Whether the query projection holds an output gate after the query of each head."""
    interleaved: bool = False
    """Whether the pairs are neighbours (2i, 2i + 1); elsewhere pair i is (i, i + d/2)."""
    interleaved_key: str = ""
    """Config key that switches `interleaved` off."""
    latent: bool = False
    """Whether keys and values are compressed together, and only a part of each head, the last, is rotated."""
    indexed: bool = False
    """Whether an indexer selects the tokens that a layer attends to; the choice has no gradient."""
    query_growth: bool = False
    """Whether queries are multiplied by 1 + beta ln(1 + floor(p / O)) at position p (llama_4_scaling_beta)."""
    theta_only: bool = False
    """Whether stock configs carry only another theta: its rope_type (proportional) rotates a first share of the pairs
    of the whole head, with exponents over the whole head, and no type that scales pairs leaves the others unrotated."""
    scaled_only: bool = False
    """Whether transformers runs it with a scaled table only: its unscaled one has the size of the whole head."""
    tuned_kind: str = ""
    """Entry of `layer_types` that layers rotated with the tuned table have; empty if all layers are."""
    tuned_key: str = ""
    """Config key with one number per layer, 0 where the layer has no positions."""
    sliding_needed: bool = False
    """Whether full-attention layers have no positions as soon as other layers slide."""

    theta_key: str = "rope_theta"
    """Top-level key of theta in configs written by transformers 4."""
    share_key: str = "partial_rotary_factor"
    """Top-level key of the rotated share of each head."""
    local_theta_key: str = ""
    """Top-level key of theta for layers that are not tuned."""
    theta_everywhere: bool = False
    """Whether the top-level theta is that of all kinds of layers."""
    longrope_only: bool = False
    """Whether the config class turns YaRN into longrope, and declares the original window at the top level."""

    logit_scale_key: str = ""
    """Config key that multiplies the product of hidden states and vocabulary matrix."""
    logit_divisor_key: str = ""
    """Config key that divides the product of hidden states and vocabulary matrix."""
    gguf: str = ""
    """Architecture name of the family in GGUF, where factors per pair can be stored there."""
    gguf_flags: bool = False
    """Whether llama.cpp serves a learned scale with command line flags only."""


def _rows(*rows: Family) -> dict[str, Family]:
    return {row.model_type: row for row in rows}


def _plain(*model_types: str) -> dict[str, Family]:
    """Families with a plain query projection and default values for all other facts."""
    return {each: Family(model_type=each, queries=Q_PROJ) for each in model_types}


def _refused(reason: str, *model_types: str) -> dict[str, Family]:
    return {each: Family(model_type=each, refused=reason) for each in model_types}


_WORKING = {
    **_plain("aria_text", "diffllama", "internlm3", "iquestcoder", "jais2", "solar_open"),
    **_rows(
        Family(model_type="arcee", queries=Q_PROJ, bias_key=BIAS),
        Family(model_type="gemma", queries=Q_PROJ, bias_key=BIAS),
        Family(model_type="qwen2_moe", queries=Q_PROJ, biased=True, bias_key="qkv_bias"),
        Family(model_type="seed_oss", queries=Q_PROJ, biased=True, bias_key=BIAS),
        Family(model_type="apertus", bias_key=BIAS, queries=Q_NORM),
        Family(model_type="axk1", note="as deepseek_v2", latent=True, interleaved=True,
               interleaved_key="rope_interleave", queries=Q_LATENT),
        Family(model_type="axk2", note="as deepseek_v32; queries and gate are one matrix in memory: frequencies only",
               latent=True, interleaved=True, indexed=True, queries=None),
        Family(model_type="bailing_hybrid", note="as deepseek_v2; only full-attention layers have positions",
               latent=True, interleaved=True, queries=Q_LATENT, tuned_kind=FULL),
        Family(model_type="bamba", note="only attention layers have positions", queries=Q_PROJ, tuned_kind=FULL),
        Family(model_type="bitnet", note="ternary weights: frequencies only", queries=None),
        Family(model_type="cohere", bias_key=BIAS, note="pairs are interleaved", interleaved=True, queries=Q_PROJ,
               query_norm=Q_NORM_ACROSS, logit_scale_key="logit_scale"),
        Family(model_type="cwm", note="sliding layers share the table", queries=Q_PROJ),
        Family(model_type="deepseek_v2", note="latent attention; served in DeepSeek's own YaRN keys", latent=True,
               interleaved=True, queries=Q_LATENT),
        Family(model_type="deepseek_v3", note="as deepseek_v2", latent=True, interleaved=True,
               interleaved_key="rope_interleave", queries=Q_LATENT),
        Family(model_type="deepseek_v32", note="as deepseek_v2; the indexer, which chooses tokens, is rotated alike",
               latent=True, interleaved=True, indexed=True, queries=Q_LATENT),
        Family(model_type="doge", queries=Q_NORM),
        Family(model_type="dots1", note="sliding layers, if there are any, share the table", queries=Q_NORM),
        Family(model_type="ernie4_5", bias_key="use_bias",
               note="pairs are interleaved", interleaved=True, queries=Q_PROJ),
        Family(model_type="ernie4_5_moe", note="as ernie4_5", interleaved=True, queries=Q_PROJ),
        Family(model_type="exaone4", note="releases without a sliding window (1.2B)", queries=Q_NORM,
               sliding_needed=True),
        Family(model_type="falcon_h1", queries=Q_PROJ, logit_scale_key="lm_head_multiplier"),
        Family(model_type="flex_olmo", queries=Q_NORM_ACROSS),
        Family(model_type="falcon", note="releases with RoPE, not ALiBi",
               queries=Place(r"h\.(\d+)\.self_attention\.query_key_value\.(weight|bias)$", "falcon")),
        Family(model_type="gemma2", bias_key=BIAS, note="sliding layers share the table", queries=Q_PROJ),
        Family(model_type="gemma3_text", bias_key=BIAS,
               note="only full-attention layers are tuned", since=(5, 19), queries=Q_NORM,
               norm_shift=1.0, tuned_kind=FULL, local_theta_key="rope_local_base_freq"),
        Family(model_type="gemma3n_text", bias_key=BIAS, note="only full-attention layers are tuned", since=(5, 19),
               queries=Q_NORM, tuned_kind=FULL, local_theta_key="rope_local_base_freq"),
        Family(model_type="gemma4_text", since=(5, 23), note="only full-attention layers; its configs carry theta only",
               queries=Q_NORM, tuned_kind=FULL, theta_only=True),
        Family(model_type="gemma4_unified_text", since=(5, 23), note="as gemma4_text", queries=Q_NORM, tuned_kind=FULL,
               theta_only=True),
        Family(model_type="glm", biased=True, bias_key=BIAS,
               note="pairs are interleaved, half of each head is rotated", interleaved=True,
               queries=Q_PROJ),
        Family(model_type="glm4", bias_key=BIAS, note="as glm", interleaved=True, queries=Q_PROJ),
        Family(model_type="glm4_moe", note="half of each head is rotated", queries=Q_PROJ, query_norm=Q_NORM),
        Family(model_type="glm4_moe_lite", note="as deepseek_v2", latent=True, interleaved=True,
               interleaved_key="rope_interleave", queries=Q_LATENT),
        Family(model_type="glm_moe_dsa", note="as deepseek_v32", latent=True, interleaved=True, indexed=True,
               queries=Q_LATENT),
        Family(model_type="gpt_neox", biased=True, bias_key=BIAS,
               note="a quarter of each head is rotated", theta_key="rotary_emb_base",
               share_key="rotary_pct",
               queries=Place(r"layers\.(\d+)\.attention\.query_key_value\.(weight|bias)$", "per_head")),
        Family(model_type="gpt_neox_japanese", note="as gpt_neox, all of each head is rotated", queries=Place(
            r"layers\.(\d+)\.attention\.query_key_value\.weight$", "per_head"), theta_key="rotary_emb_base",
            share_key="rotary_pct"),
        Family(model_type="gpt_oss", biased=True, bias_key=BIAS,
               note="continues its own YaRN; sliding layers share the table", queries=Q_PROJ),
        Family(model_type="granite", bias_key=BIAS, queries=Q_PROJ, logit_divisor_key="logits_scaling", gguf="granite"),
        Family(model_type="granitemoe", bias_key=BIAS, queries=Q_PROJ, logit_divisor_key="logits_scaling"),
        Family(model_type="granitemoehybrid", note="releases with RoPE in their attention layers", queries=Q_PROJ,
               tuned_kind=FULL, logit_divisor_key="logits_scaling"),
        Family(model_type="granitemoeshared", queries=Q_PROJ, logit_divisor_key="logits_scaling"),
        Family(model_type="helium", note="pairs are interleaved", interleaved=True, queries=Q_PROJ),
        Family(model_type="hy_v3", queries=Q_NORM),
        Family(model_type="hy_v4", note="as deepseek_v32, pairs are halves", latent=True, indexed=True,
               queries=Q_LATENT),
        Family(model_type="hyperclovax", queries=Q_PROJ, logit_scale_key="logits_scaling"),
        Family(model_type="jetmoe", note="experts project the queries: frequencies only", queries=None),
        Family(model_type="lfm2", note="only attention layers have positions", queries=Q_LAYERNORM, tuned_kind=FULL),
        Family(model_type="lfm2_moe", note="as lfm2", queries=Q_LAYERNORM, tuned_kind=FULL),
        Family(model_type="lfm3", since=(5, 23), note="as gemma4_text, beside convolutions", queries=Q_NORM,
               tuned_kind=FULL, theta_only=True),
        Family(model_type="llama", bias_key=BIAS, queries=Q_PROJ, gguf="llama"),
        Family(model_type="longcat_flash", note="two attentions per layer: frequencies only", latent=True,
               interleaved=True, queries=None),
        Family(model_type="minimax", note="only full-attention layers have positions", queries=Q_PROJ,
               tuned_kind=FULL),
        Family(model_type="minimax_m2", note="half of each head is rotated", queries=Q_NORM_ACROSS),
        Family(model_type="ministral", note="sliding layers share the table", queries=Q_PROJ),
        Family(model_type="ministral3", note="queries grow with the position (llama_4_scaling_beta), as in the base",
               query_growth=True, queries=Q_PROJ),
        Family(model_type="mistral", note="releases without a sliding window (v0.2 and later)", queries=Q_PROJ,
               gguf="llama", twin="llama"),
        Family(model_type="mistral4", note="latent attention; queries grow as in ministral3", alone=False, latent=True,
               interleaved=True, interleaved_key="rope_interleave", query_growth=True, scaled_only=True,
               queries=Q_LATENT),
        Family(model_type="mixtral", queries=Q_PROJ, gguf="llama"),
        Family(model_type="nemotron", bias_key=BIAS, note="half of each head is rotated", queries=Q_PROJ),
        Family(model_type="olmo", bias_key=BIAS, note="query gains only in releases without clip_qkv", queries=Q_PROJ),
        Family(model_type="olmo2", bias_key=BIAS, queries=Q_NORM_ACROSS),
        Family(model_type="olmo3", bias_key=BIAS,
               note="only full-attention layers are tuned", since=(5, 19), queries=Q_NORM_ACROSS,
               tuned_kind=FULL, theta_everywhere=True),
        Family(model_type="olmo_hybrid", note="only full-attention layers have positions", queries=Q_NORM_ACROSS,
               tuned_kind=FULL),
        Family(model_type="olmoe", note="query gains only in releases without clip_qkv", queries=Q_NORM_ACROSS),
        Family(model_type="persimmon", biased=True, note="half of each head is rotated", query_norm=Q_LAYERNORM,
               queries=Place(r"layers\.(\d+)\.self_attn\.query_key_value\.(weight|bias)$", "per_head")),
        Family(model_type="phi", biased=True,
               note="half of each head is rotated", queries=Q_PROJ, query_norm=Q_LAYERNORM),
        Family(model_type="phi3", longrope_only=True, queries=Place(
            r"layers\.(\d+)\.self_attn\.qkv_proj\.weight$", "separate"), note="Phi-3, Phi-3.5 and Phi-4, up to their "
            "sliding window; served as longrope, which the config class requires"),
        Family(model_type="qwen2", biased=True,
               note="sliding layers, if there are any, share the table", queries=Q_PROJ,
               gguf_flags=True),
        Family(model_type="qwen2_vl_text", alone=False, queries=Q_PROJ),
        Family(model_type="qwen2_5_vl_text", alone=False, queries=Q_PROJ),
        Family(model_type="qwen3_vl_text", alone=False, queries=Q_NORM),
        Family(model_type="qwen3_vl_moe_text", alone=False, queries=Q_NORM),
        Family(model_type="qwen3", bias_key=BIAS, note="as qwen2", queries=Q_NORM, gguf_flags=True),
        Family(model_type="qwen3_moe", bias_key=BIAS, since=(5, 4), queries=Q_NORM),
        Family(model_type="qwen3_next", bias_key=BIAS, gated=True,
               note="only full-attention layers have positions", queries=Q_NORM,
               norm_shift=1.0, tuned_kind=FULL),
        Family(model_type="qwen3_5_text", bias_key=BIAS, gated=True,
               note="only full-attention layers have positions", queries=Q_NORM,
               norm_shift=1.0, tuned_kind=FULL),
        Family(model_type="qwen3_5_moe_text", bias_key=BIAS, gated=True,
               note="as qwen3_5_text", queries=Q_NORM, norm_shift=1.0, tuned_kind=FULL),
        Family(model_type="smollm3", bias_key=BIAS, note="every fourth layer has no positions", queries=Q_PROJ,
               tuned_key="no_rope_layers"),
        Family(model_type="stablelm", bias_key="use_qkv_bias",
               note="a quarter of each head is rotated", queries=Q_PROJ, query_norm=Place(
            r"layers\.(\d+)\.self_attn\.q_layernorm\.norms\.(?P<head>\d+)\.weight$", "shared")),
        Family(model_type="starcoder2", biased=True, bias_key="use_bias",
               note="releases without a sliding window", queries=Q_PROJ),
        Family(model_type="vaultgemma", note="sliding layers share the table", queries=Q_PROJ),
        Family(model_type="youtu", note="as deepseek_v2", latent=True, interleaved=True,
               interleaved_key="rope_interleave", queries=Q_LATENT),
    ),
}  # fmt: skip

_NOT_WORKING = {
    **_refused("its positions are ALiBi, not RoPE", "bloom", "mpt"),
    **_refused("its positions are learned or sinusoidal embeddings, not RoPE",
               "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
               "blenderbot-small", "camembert", "cpmant", "ctrl", "data2vec-text", "electra", "ernie", "git", "gpt-sw3",
               "gpt2", "gpt_bigcode", "gpt_neo", "marian", "mbart", "megatron-bert", "musicgen", "musicgen_melody",
               "mvp", "openai-gpt", "opt", "pegasus", "plbart", "prophetnet", "reformer", "rembert", "roberta",
               "roberta-prelayernorm", "roc_bert", "trocr", "whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl",
               "xlnet", "xmod", "blip_text_model", "kosmos_2_text_model", "kosmos_2_5_text_model",
               "pix2struct_text_model", "pp_formulanet_text", "udop"),
    **_refused("it is recurrent and has no positions", "falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    **_refused("its attention layers have no positions", "glm5_next_text", "jamba", "kimi_linear", "nemotron_h",
               "zamba"),
    **_refused("its positions are relative biases in the attention, not RoPE", "inkling_text", "inkling2_text"),
    **_refused("it rotates inside its attention, from a table of its own, and no config key scales that",
               "codegen", "gptj", "roformer"),
    **_refused("its full-attention layers have no positions, and no change of RoPE extends a sliding window or chunk",
               "afmoe", "beam", "cohere2", "cohere2_moe", "cohere_compass_text", "exaone_moe", "flint", "kolibri1",
               "llama4", "llama4_text"),
    **_refused("all its attention layers attend within a sliding window, which no change of RoPE extends",
               "recurrent_gemma"),
    **_refused("it normalises queries and keys after rotating them, which undoes a temperature", "hunyuan_v1_dense",
               "hunyuan_v1_moe", "nanochat"),
    **_refused("its full-attention and its sliding layers have a rotary module each, and only one can be replaced",
               "granite_swa", "granitemoe_swa"),
    **_refused("each of its attention layers has a rotary module of its own", "idefics", "moshi"),
    **_refused("transformers has no class for its language model alone: its one class also holds an image tokenizer, "
               "and its config is flat", "chameleon"),
    **_refused("transformers has no class for its language model alone: its one class also holds a protein encoder, "
               "and its config is flat", "evolla"),
    **_refused("it predicts the actions of a robot, not tokens", "pi0"),
    **_refused("it computes its table again in each forward pass, by a rule of its own", "phimoe"),
    **_refused("it divides its hidden states before the vocabulary matrix, by a ratio of two sizes", "minicpm3"),
    **_refused("its compressors and its indexer have rotary modules of their own", "deepseek_v4"),
    **_refused("its kinds of layers have heads of different sizes, with a table each", "dots3_note_text"),
    **_refused("transformers loads it only as a part of a multimodal model, mistral_large4", "mistral_large4_text"),
    **_refused("transformers 5 rotates it with theta 10000: it does not read attn_config.rope_theta, where its "
               "checkpoints have 500000", "dbrx"),
    **_refused("it drafts tokens for another model and takes over that model's cache",
               "gemma4_assistant", "gemma4_unified_assistant"),
    **_refused("its config class drops the section of full-attention layers from an exported config", "mellum",
               "mimo_v2_flash"),
    **_refused("an indexer selects the tokens that its layers attend to", "minimax_m3_vl_text", "qwen4_exp_text"),
    **_refused("it has a further layer between its hidden states and its vocabulary matrix", "modernbert-decoder"),
    **_refused("its vision and audio encoders are part of the language model", "phi4_multimodal"),
    **_refused("it applies a convolution over tokens to its queries before the rotation", "zaya"),
    **_refused("its kinds of layers rotate different shares of each head, which not all stacks read", "laguna"),
    **_refused("it reads bytes in patches, each with RoPE of its own", "blt"),
    **_refused("it runs its layers several times per token, most of them without a gradient", "hrm_text"),
    **_refused("layers that share attention weights add adapters of their own to the queries", "zamba2"),
}  # fmt: skip

FAMILIES: dict[str, Family] = dict(sorted((_WORKING | _NOT_WORKING).items()))
"""Model type -> its row. Every row that is not refused is tested: attach, identity, gradient, export, reload, fold."""


def supported() -> list[str]:
    """Model types of language models that can be tuned alone, with YaRN or learned frequencies."""
    return [each for each, row in FAMILIES.items() if row.alone and not row.refused and not row.theta_only]


def family_of(model_type: str) -> Family:
    """The row of a model type; for an unknown type, a row that is refused as not supported."""
    row = FAMILIES.get(model_type)
    return row or Family(
        model_type=model_type, refused=f"it is not supported yet; supported model types: {', '.join(supported())}"
    )
