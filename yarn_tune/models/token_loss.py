"""The negative log-likelihood (NLL) of tokens, in nats, without a tensor of all logits `[tokens, vocab]`.

Shapes: b rows, n tokens per row, h hidden size. Labels are already shifted: `labels[i]` is the token after
`input_ids[i]`, or -100 where its prediction does not count.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from .families import family_of
from .wrappers import wrapper_of

CHUNK = 512
"""Tokens per chunk; only the logits of one chunk exist at a time."""

Transform = Callable[[Tensor], Tensor] | None


def logit_transform(config: PreTrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """The family's transform of the product of hidden states and vocabulary matrix; None if it has none."""
    config = config.get_text_config()
    family = family_of(config.model_type)
    if family.logit_scale_key:
        return lambda logits: logits * getattr(config, family.logit_scale_key)
    if family.logit_divisor_key:
        return lambda logits: logits / getattr(config, family.logit_divisor_key)
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None else lambda logits: torch.tanh(logits / cap) * cap


def exact_nll(hidden: Tensor, labels: Tensor, head: nn.Module, transform: Transform) -> Tensor:
    """NLL of each token in nats, float32 `[tokens]`, from hidden states `[tokens, h]`, chunk by chunk.

    Logits are converted to float32 before the softmax, so the values are exact for a bfloat16 model too. With gradients
    enabled, the logits of each chunk are recomputed in the backward pass.
    """

    def nll(part: Tensor, targets: Tensor) -> Tensor:
        logits = head(part).float()
        return F.cross_entropy(transform(logits) if transform else logits, targets, reduction="none")

    return by_chunks(nll, hidden, labels)


def by_chunks(each: Callable[..., Tensor], *parts: Tensor, size: int | None = None, dim: int = 0) -> Tensor:
    """Apply `each` to chunks of `size` tokens (`CHUNK`) of all parts, and join the results along `dim`.

    With gradients enabled, each chunk is recomputed in the backward pass.
    """
    groups = zip(*(part.split(size or CHUNK, dim) for part in parts), strict=True)
    if torch.is_grad_enabled() and parts[0].requires_grad:
        return torch.cat([checkpoint(each, *group, use_reentrant=False) for group in groups], dim)
    return torch.cat([each(*group) for group in groups], dim)


def fused_nll(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """`exact_nll` by the fused operator of torch 2.13, which needs less memory and time.

    In bfloat16 its own reduction would round the sum to 8 bits, so it returns one value per token.
    """
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    nll: Tensor = F.linear_cross_entropy(
        hidden, head.weight, labels, linear_bias=head.bias, reduction="none", options=options
    )
    return nll.float()


HAS_FUSED = hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states `[b, n, h]` of the language model.

    With `cache`, the tokens follow those in the cache and are appended to it. transformers detects document borders
    from `position_ids` only without a cache.
    """
    row = wrapper_of(model.config)
    tower = model.get_submodule(row.module) if row else model.base_model
    if row and row.axes and position_ids is not None:
        position_ids = position_ids.expand(row.axes, *position_ids.shape)
    body = tower(
        input_ids=input_ids,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    states: Tensor = body.last_hidden_state
    return states


class Reader(nn.Module):
    """A model and its NLL; subclasses define which tokens of a batch count, and with what weight."""

    def __init__(self, model: PreTrainedModel, fused: bool = HAS_FUSED) -> None:
        super().__init__()
        self.model = model
        self.transform = logit_transform(model.config)
        self.fused = fused and self.transform is None

    def nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """NLL of each label, float32 `[tokens]`, from the hidden states `[tokens, h]` that predict them."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return fused_nll(hidden, labels, head) if self.fused else exact_nll(hidden, labels, head, self.transform)


class NextToken(Reader):
    """Next-token loss of a model."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """Sum of the NLL over the targets of a batch `[b, n]`, float32, shape ()."""
        hidden = hidden_states(self.model, input_ids, position_ids)
        counted = labels != IGNORED
        return self.nll(hidden[counted], labels[counted]).sum()


IGNORED = -100
"""Label of a token whose successor is not its continuation; PyTorch's `ignore_index`."""
