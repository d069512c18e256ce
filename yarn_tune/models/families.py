"""What is known about each Hugging Face model class that bears on RoPE: one row per family, and nowhere else.

To add a family, add a row here and a small config to the tests. A model type without a row is refused.

In all supported families one `*RotaryEmbedding` module below the base model computes cos and sin for every layer.
Most compute them from one `inv_freq` buffer, which sliding layers share where there are any. Where layers differ by
kind (Gemma 3, OLMo 3), the module holds one table per kind, and only that of the full-attention layers is tuned: the
others attend within a sliding window, which no change of RoPE extends.
"""

from dataclasses import dataclass

from .query_rows import RowsOf, falcon, latent, per_head, separate, shared

FULL = "full_attention"
"""The kind of layer that is tuned where a model has several."""


@dataclass(frozen=True)
class Place:
    """Tensors in which queries can be scaled before they are rotated."""

    pattern: str
    """Matches tensor names; group 1 is the layer, group `head` (if there is one) the head."""
    rows: RowsOf


Q_PROJ = Place(r"layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)$", separate)
Q_NORM = Place(r"layers\.(\d+)\.self_attn\.q_norm\.weight$", shared)
Q_NORM_ACROSS = Place(Q_NORM.pattern, separate)
Q_LAYERNORM = Place(r"layers\.(\d+)\.self_attn\.q_layernorm\.(weight|bias)$", shared)
Q_LATENT = Place(r"layers\.(\d+)\.self_attn\.q(_b)?_proj\.weight$", latent)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Every fact about one model type."""

    model_type: str
    note: str = ""
    """For the table in docs/families.md."""
    refused: str = ""
    """The reason why models of this type cannot be tuned; empty where they can."""
    since: tuple[int, int] = (5, 0)
    """First release of transformers that was seen to read the rope sections of its exports correctly."""

    queries: Place | None = None
    """Where queries are scaled; None where it was not established, or where a norm follows the rotation."""
    query_norm: Place | None = None
    """The same where one of `norm_keys` switches on a norm of the queries."""
    norm_keys: tuple[str, ...] = ("use_qk_norm", "qk_layernorm")
    norm_shift: float = 0.0
    """1 where the query norm multiplies by 1 + weight."""
    interleaved: bool = False
    """Whether the pairs are neighbours (2i, 2i + 1); elsewhere pair i is (i, i + d/2)."""
    interleaved_key: str = ""
    """Config key that switches `interleaved` off."""
    latent: bool = False
    """Whether keys and values are compressed together, and only a part of each head, the last, is rotated."""
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
    """Config key that divides it."""
    gguf: str = ""
    """Its architecture name in GGUF, where factors per pair can be stored there."""
    gguf_flags: bool = False
    """Whether llama.cpp serves a learned scale by command line flags alone."""


def _rows(*rows: Family) -> dict[str, Family]:
    return {row.model_type: row for row in rows}


def _plain(*model_types: str) -> dict[str, Family]:
    """Families with a plain query projection and nothing odd."""
    return {each: Family(model_type=each, queries=Q_PROJ) for each in model_types}


def _refused(reason: str, *model_types: str) -> dict[str, Family]:
    return {each: Family(model_type=each, refused=reason) for each in model_types}


_WORKING = {
    **_plain("arcee", "gemma", "qwen2_moe", "seed_oss"),
    **_rows(
        Family(model_type="cohere", note="pairs are interleaved", interleaved=True, queries=Q_PROJ,
               query_norm=Q_NORM_ACROSS, logit_scale_key="logit_scale"),
        Family(model_type="deepseek_v2", note="latent attention; served in DeepSeek's own YaRN keys", latent=True,
               interleaved=True, queries=Q_LATENT),
        Family(model_type="deepseek_v3", note="as deepseek_v2", latent=True, interleaved=True,
               interleaved_key="rope_interleave", queries=Q_LATENT),
        Family(model_type="ernie4_5", note="pairs are interleaved", interleaved=True, queries=Q_PROJ),
        Family(model_type="exaone4", note="releases without a sliding window (1.2B)", queries=Q_NORM,
               sliding_needed=True),
        Family(model_type="falcon", note="releases with RoPE, not ALiBi",
               queries=Place(r"h\.(\d+)\.self_attention\.query_key_value\.(weight|bias)$", falcon)),
        Family(model_type="gemma2", note="sliding layers share the table", queries=Q_PROJ),
        Family(model_type="gemma3_text", note="only full-attention layers are tuned", since=(5, 19), queries=Q_NORM,
               norm_shift=1.0, tuned_kind=FULL, local_theta_key="rope_local_base_freq"),
        Family(model_type="glm", note="pairs are interleaved, half of each head is rotated", interleaved=True,
               queries=Q_PROJ),
        Family(model_type="glm4", note="as glm", interleaved=True, queries=Q_PROJ),
        Family(model_type="gpt_neox", note="a quarter of each head is rotated", theta_key="rotary_emb_base",
               share_key="rotary_pct",
               queries=Place(r"layers\.(\d+)\.attention\.query_key_value\.(weight|bias)$", per_head)),
        Family(model_type="gpt_oss", note="continues its own YaRN; sliding layers share the table", queries=Q_PROJ),
        Family(model_type="granite", queries=Q_PROJ, logit_divisor_key="logits_scaling", gguf="granite"),
        Family(model_type="granitemoe", queries=Q_PROJ, logit_divisor_key="logits_scaling"),
        Family(model_type="llama", queries=Q_PROJ, gguf="llama"),
        Family(model_type="ministral", note="sliding layers share the table", queries=Q_PROJ),
        Family(model_type="mistral", note="releases without a sliding window (v0.2 and later)", queries=Q_PROJ,
               gguf="llama"),
        Family(model_type="mixtral", queries=Q_PROJ, gguf="llama"),
        Family(model_type="nemotron", note="half of each head is rotated", queries=Q_PROJ),
        Family(model_type="olmo", note="query gains only in releases without clip_qkv", queries=Q_PROJ),
        Family(model_type="olmo2", queries=Q_NORM_ACROSS),
        Family(model_type="olmo3", note="only full-attention layers are tuned", since=(5, 19), queries=Q_NORM_ACROSS,
               tuned_kind=FULL, theta_everywhere=True),
        Family(model_type="persimmon", note="half of each head is rotated", query_norm=Q_LAYERNORM,
               queries=Place(r"layers\.(\d+)\.self_attn\.query_key_value\.(weight|bias)$", per_head)),
        Family(model_type="phi", note="half of each head is rotated", queries=Q_PROJ, query_norm=Q_LAYERNORM),
        Family(model_type="phi3", longrope_only=True, queries=Place(
            r"layers\.(\d+)\.self_attn\.qkv_proj\.weight$", separate), note="Phi-3, Phi-3.5 and Phi-4, up to their "
            "sliding window; served as longrope, which the config class requires"),
        Family(model_type="qwen2", note="sliding layers, if there are any, share the table", queries=Q_PROJ,
               gguf_flags=True),
        Family(model_type="qwen3", note="as qwen2", queries=Q_NORM, gguf_flags=True),
        Family(model_type="qwen3_moe", since=(5, 4), queries=Q_NORM),
        Family(model_type="qwen3_next", note="only full-attention layers have positions", queries=Q_NORM,
               norm_shift=1.0, tuned_kind=FULL),
        Family(model_type="smollm3", note="every fourth layer has no positions", queries=Q_PROJ,
               tuned_key="no_rope_layers"),
        Family(model_type="stablelm", note="a quarter of each head is rotated", queries=Q_PROJ, query_norm=Place(
            r"layers\.(\d+)\.self_attn\.q_layernorm\.norms\.(?P<head>\d+)\.weight$", shared)),
        Family(model_type="starcoder2", note="releases without a sliding window", queries=Q_PROJ),
    ),
}  # fmt: skip

_NOT_WORKING = {
    **_refused("its positions are ALiBi, not RoPE", "bloom", "mpt"),
    **_refused("its positions are learned, not RoPE", "gpt2", "opt"),
    **_refused("it rotates inside its attention, from a table of its own, and no config key scales that",
               "codegen", "gptj"),
    **_refused("its full-attention layers have no positions, and no change of RoPE extends a sliding window",
               "cohere2"),
    **_refused("it normalises queries after rotating them, which undoes a temperature", "hunyuan_v1_dense"),
    **_refused("it computes its table anew in each forward, by a rule of its own", "phimoe"),
}  # fmt: skip

FAMILIES: dict[str, Family] = dict(sorted((_WORKING | _NOT_WORKING).items()))
"""Model type -> its row. Every row that is not refused is tested: attach, identity, gradient, export, reload, fold."""


def supported() -> list[str]:
    """Model types that can be tuned."""
    return [each for each, row in FAMILIES.items() if not row.refused]


def family_of(model_type: str) -> Family:
    """The row of a model type; one that says so where it has none."""
    row = FAMILIES.get(model_type)
    return row or Family(
        model_type=model_type, refused=f"it is not supported yet; supported model types: {', '.join(supported())}"
    )
