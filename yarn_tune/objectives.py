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

from .families import logit_transform
from .positions import IGNORED

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

    pairs = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return torch.cat([checkpoint(nats, part, targets, use_reentrant=False) for part, targets in pairs])
    return torch.cat([nats(part, targets) for part, targets in pairs])


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
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states `[b, n, h]`, without a KV cache, or after and into the one given.

    Document borders are detected from `position_ids` only if no mask and no cache are given.
    """
    body = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    states: Tensor = body.last_hidden_state
    return states


class NextToken(nn.Module):
    """Next-token loss of a model: the module that is trained, wrapped and distributed."""

    def __init__(self, model: PreTrainedModel, fused: bool = HAS_FUSED) -> None:
        super().__init__()
        self.model = model
        self.transform = logit_transform(model.config)
        self.fused = fused and self.transform is None

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Sum of nats over the targets of a batch `[b, n]`, float32, shape ()."""
        hidden = hidden_states(self.model, input_ids, position_ids, attention_mask)
        counted = labels != IGNORED
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        if self.fused:
            return fused_nats(hidden[counted], labels[counted], head).sum()
        return exact_nats(hidden[counted], labels[counted], head, self.transform).sum()
