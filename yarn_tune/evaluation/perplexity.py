"""Negative log-likelihood by position, kept as (sum, count) pairs until the last line.

Shapes: a document is `[T]` token ids; its nats are `[T - 1]`, entry i for predicting token i + 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..models import exact_nats, hidden_states, logit_transform


@dataclass(frozen=True)
class NllSum:
    """A sum of nats and the number of tokens it is over; adds up over documents and buckets."""

    total: float
    count: int

    def __add__(self, other: "NllSum") -> "NllSum":
        return NllSum(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.count if self.count else float("nan")


@torch.no_grad()
def full_nats(model: PreTrainedModel, document: Tensor, chunk: int | None = None) -> Tensor:
    """Every token predicted from all tokens before it: the `truncate` protocol. CPU `[T - 1]`.

    In one forward; or, for documents whose activations do not fit, `chunk` tokens at a time over a KV cache.
    """
    ids = document.to(model.device)
    read, following = ids[:-1], ids[1:]
    head, transform = model.get_output_embeddings(), logit_transform(model.config)
    if chunk is None or chunk >= len(read):
        return exact_nats(hidden_states(model, read[None])[0], following, head, transform).cpu()
    cache = DynamicCache(config=model.config)
    parts = []
    for begin in range(0, len(read), chunk):
        end = min(begin + chunk, len(read))
        positions = torch.arange(begin, end, device=ids.device)[None]
        hidden = hidden_states(model, read[None, begin:end], positions, cache=cache)[0]
        parts.append(exact_nats(hidden, following[begin:end], head, transform).cpu())
    return torch.cat(parts)


@torch.no_grad()
def slid_nats(
    model: PreTrainedModel, document: Tensor, native: int, stride: int, prefix: tuple[int, ...] = ()
) -> Tensor:
    """The native window slid over the document: the `sliding` protocol, and the honest baseline. CPU `[T - 1]`.

    Up to the native window this is `full_nats`; beyond, every token is predicted from between
    `native - stride` and `native - 1` tokens before it, at native positions. The first of these are `prefix`.
    """
    if len(document) <= native:
        return full_nats(model, document)
    stride = min(stride, native - 1)  # a window's first token is never predicted
    parts = [full_nats(model, document[:native])]
    done = native
    while done < len(document):
        end = min(done + stride, len(document))
        ids = document[end - native : end].clone()
        ids[: len(prefix)] = ids.new_tensor(prefix)
        window = full_nats(model, ids)
        parts.append(window[-(end - done) :])
        done = end
    return torch.cat(parts)


def bucket_edges(length: int, buckets: int) -> list[int]:
    """`buckets` equal ranges of positions from 0 to `length`."""
    return [round(length * b / buckets) for b in range(buckets + 1)]


def by_position(nats: Tensor, edges: list[int]) -> list[NllSum]:
    """Nats of the predicted tokens at positions `edges[b]` to `edges[b + 1] - 1`; position 0 has none."""
    return [span_nats(nats, max(low, 1), high) for low, high in zip(edges, edges[1:], strict=False)]


def span_nats(nats: Tensor, low: int, high: int) -> NllSum:
    """Nats of the predicted tokens at positions `low` (at least 1) to `high - 1`."""
    span = nats[low - 1 : high - 1].double()
    return NllSum(span.sum().item(), span.numel())
