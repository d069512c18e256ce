"""What training minimises, and the one way nats are computed, without ever holding `[tokens, vocab]` logits.

Shapes: b rows, n tokens a row, h hidden size, v vocabulary. Labels are already shifted: `labels[i]` is the token
after `input_ids[i]`, or -100 where that does not count.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from .rope_config import logit_transform

CHUNK = 512
"""Tokens whose logits exist at one time."""

Transform = Callable[[Tensor], Tensor] | None


def exact_nats(hidden: Tensor, labels: Tensor, head: nn.Module, transform: Transform) -> Tensor:
    """Cross entropy of each token in nats, float32 `[tokens]`, from `[tokens, h]`, chunk by chunk.

    Logits are taken to float32 before the softmax, so the values are exact in a bfloat16 model too. With
    gradients enabled each chunk's logits are computed again in the backward pass instead of being kept.
    """

    def nats(part: Tensor, targets: Tensor) -> Tensor:
        logits = head(part).float()
        return F.cross_entropy(transform(logits) if transform else logits, targets, reduction="none")

    return by_chunks(nats, hidden, labels)


def by_chunks(each: Callable[..., Tensor], *parts: Tensor, size: int | None = None, dim: int = 0) -> Tensor:
    """`each` of `size` tokens (`CHUNK`) of every part at a time, joined along `dim`.

    With gradients, what it computes is computed again in the backward pass, not kept.
    """
    groups = zip(*(part.split(size or CHUNK, dim) for part in parts), strict=True)
    if torch.is_grad_enabled() and parts[0].requires_grad:
        return torch.cat([checkpoint(each, *group, use_reentrant=False) for group in groups], dim)
    return torch.cat([each(*group) for group in groups], dim)


def fused_nats(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """`exact_nats` by torch's fused operator (torch >= 2.13), which is leaner and faster.

    In bfloat16 its reductions round the whole sum to 8 bits, so tokens are reduced here, in float32.
    """
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
    nats: Tensor = F.linear_cross_entropy(
        hidden, head.weight, labels, linear_bias=head.bias, reduction="none", options=options
    )
    return nats.float()


HAS_FUSED = hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states `[b, n, h]`, without a KV cache, or after and into the one given.

    Document borders are detected from `position_ids` only if no cache is given.
    """
    body = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    states: Tensor = body.last_hidden_state
    return states


class Reader(nn.Module):
    """A model and the way its nats are computed; subclasses say which tokens of a batch count, and how much."""

    def __init__(self, model: PreTrainedModel, fused: bool = HAS_FUSED) -> None:
        super().__init__()
        self.model = model
        self.transform = logit_transform(model.config)
        self.fused = fused and self.transform is None

    def nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of each label, float32 `[tokens]`, from the hidden states `[tokens, h]` before them."""
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return fused_nats(hidden, labels, head) if self.fused else exact_nats(hidden, labels, head, self.transform)


class NextToken(Reader):
    """Next-token loss of a model."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """Sum of nats over the targets of a batch `[b, n]`, float32, shape ()."""
        hidden = hidden_states(self.model, input_ids, position_ids)
        counted = labels != IGNORED
        return self.nats(hidden[counted], labels[counted]).sum()


IGNORED = -100
"""Label of a token whose successor is not its continuation; PyTorch's `ignore_index`."""
