"""The sizes of a base model that time and memory depend on."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from ..models import empty_model, family_of, has_sliding_layers, head_dim_of, language_tower, rope_facts
from ..tunable import NO_LORA, LoraSize


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one model; widths are numbers per token.

    Every layer is counted as a pre-norm decoder layer with a gated MLP. Other layouts (parallel attention, linear
    attention) are counted as if they were this one, except that of experts only those that a token is sent to are
    computed, and that layers of a hybrid without softmax attention attend to no pairs of tokens.
    """

    native: int
    """Native window by the config; `rope.native` of a recipe takes precedence."""
    parameters: int
    active: int
    """Parameters that a token of text is multiplied with: without `unread`, and without experts it is not sent to."""
    unread: int
    """Parameters of a multimodal model outside its language model, which text does not pass through."""
    embedding: int
    """Parameters of the input embedding that are not the output's too."""
    layers: int
    attending: int
    """Layers that attend to the tokens before: of a hybrid, those with softmax attention."""
    hidden: int
    queries: int
    """Width of the queries, over all heads."""
    keys: int
    """Width of the keys, over all heads; the values have the same width."""
    inner: int
    """Inner width of the MLP."""
    rotary: int
    """Head size."""
    vocabulary: int
    sliding: bool
    """Whether some layers have a sliding window."""
    theta_only: bool
    """Whether its configs carry only another theta, so that few search-free methods are measured."""
    lora: LoraSize

    @classmethod
    def of(cls, config: PreTrainedConfig, lora: LoraSize = NO_LORA, native: int | None = None) -> "Shape":
        """The sizes of a model by its config; no weights are created.

        Args:
            config: config of the model.
            lora: size of the adapters that are trained.
            native: the native window, if it is known already.
        """
        model = empty_model(config)
        head: nn.Module = model.get_output_embeddings()
        embedding: nn.Module = model.get_input_embeddings()
        read = {*language_tower(model).parameters(), *head.parameters()}
        parameters, inside = model.num_parameters(), sum(parameter.numel() for parameter in read)
        native = native or rope_facts(config).native
        tied, config = config.tie_word_embeddings, config.get_text_config()
        heads, width, rotary = config.num_attention_heads, config.hidden_size, head_dim_of(config, full=True)
        head_dim = rotary + (getattr(config, "qk_nope_head_dim", None) or 0)  # of latent attention, with both parts
        return cls(
            native=native,
            parameters=parameters,
            active=inside - _idle(model, config),
            unread=parameters - inside,
            embedding=0 if tied else sum(parameter.numel() for parameter in embedding.parameters()),
            layers=config.num_hidden_layers,
            attending=_attending(config),
            hidden=width,
            queries=heads * head_dim,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            inner=_inner(config) or 4 * width,
            rotary=rotary,
            vocabulary=config.vocab_size,
            sliding=has_sliding_layers(config),
            theta_only=family_of(config.model_type).theta_only,
            lora=lora,
        )


CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k")
"""Config keys of the number of experts that a token is sent to."""
LINEAR = frozenset({"linear_attention", "conv", "mamba", "recurrent"})
"""Kinds of layers whose cost does not grow with the square of the row."""


def _idle(model: nn.Module, config: PreTrainedConfig) -> int:
    """Parameters of the experts that a token is not sent to; experts are stacked in the first dimension."""
    chosen = next((getattr(config, key) for key in CHOSEN if getattr(config, key, None)), None)
    if chosen is None:
        return 0
    stacked = [p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    return sum(p.numel() // len(p) * max(0, len(p) - chosen) for p in stacked)


def _attending(config: PreTrainedConfig) -> int:
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return sum(kind not in LINEAR for kind in kinds)


def _inner(config: PreTrainedConfig) -> int:
    """The inner width of the MLP, the largest where layers differ (Gemma 3n); 0 if the config has none."""
    found = getattr(config, "intermediate_size", None) or 0
    return int(max(found) if isinstance(found, list) else found)
