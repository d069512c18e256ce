"""The sizes of a base model that time and memory depend on."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from ..models import empty_model, has_sliding_layers, head_dim_of, language_tower, rope_facts
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
    unread: int = 0
    """Parameters of a multimodal model outside its language model, which text does not pass through."""
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
            config: config of the model.
            lora: size of the adapters that are trained.
            native: the native window, if it is known already.
        """
        model = empty_model(config)
        head: nn.Module = model.get_output_embeddings()
        embedding: nn.Module = model.get_input_embeddings()
        read = {*language_tower(model).parameters(), *head.parameters()}
        parameters = model.num_parameters()
        native = native or rope_facts(config).native
        tied, config = config.tie_word_embeddings, config.get_text_config()
        heads, width, head_dim = config.num_attention_heads, config.hidden_size, head_dim_of(config)
        return cls(
            native=native,
            parameters=parameters,
            unread=parameters - sum(parameter.numel() for parameter in read),
            embedding=0 if tied else sum(parameter.numel() for parameter in embedding.parameters()),
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
