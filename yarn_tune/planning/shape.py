"""The sizes of a base model that time and memory depend on."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..models import has_sliding_layers, head_dim_of, rope_facts
from ..tunable import NO_LORA, LoraSize


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one model; widths are numbers per token.

    Every layer is counted as a pre-norm decoder layer with a gated MLP. Other layouts (experts, parallel attention) are
    counted as if they were this one.
    """

    native: int
    """Native window by the config; `rope.native` of a recipe takes precedence."""
    parameters: int
    embedding: int
    """Parameters of the input embedding that are not the output's too."""
    layers: int
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
    lora: LoraSize

    @classmethod
    def of(cls, config: PreTrainedConfig, lora: LoraSize = NO_LORA, native: int | None = None) -> "Shape":
        """The sizes of a model by its config; no weights are created.

        Args:
            config: config of the language model.
            lora: size of the adapters that are trained.
            native: the native window, if it is known already.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        heads, width, head_dim = config.num_attention_heads, config.hidden_size, head_dim_of(config)
        return cls(
            native=native or rope_facts(config).native,
            parameters=model.num_parameters(),
            embedding=0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel(),
            layers=config.num_hidden_layers,
            hidden=width,
            queries=heads * head_dim,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            inner=getattr(config, "intermediate_size", None) or 4 * width,
            rotary=head_dim,
            vocabulary=config.vocab_size,
            sliding=has_sliding_layers(config),
            lora=lora,
        )
