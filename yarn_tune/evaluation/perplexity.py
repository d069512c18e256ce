"""Per-token negative log-likelihood of a document, with full attention or with a sliding window, and sums by position.

Shapes: a document is `[T]` token ids; its NLL is `[T - 1]` in nats, entry i for predicting token i + 1. Sums are kept
as (total, count) pairs until they are printed, so that means are weighted by tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..models import exact_nll, hidden_states, logit_transform


@dataclass(frozen=True)
class NllSum:
    """A sum of NLL and the number of tokens in it; sums of documents and of position buckets can be added."""

    total: float
    count: int

    def __add__(self, other: "NllSum") -> "NllSum":
        return NllSum(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """NLL per token; NaN where there is no token."""
        return self.total / self.count if self.count else float("nan")


@torch.no_grad()
def full_nll(model: PreTrainedModel, document: Tensor, chunk: int | None = None) -> Tensor:
    """NLL with every token predicted from all tokens before it (the `truncate` protocol), on the CPU, `[T - 1]`.

    Args:
        model: the model as it is.
        document: token ids, `[T]`.
        chunk: tokens per forward pass over a KV cache, for documents whose activations do not fit; None: one pass.
    """
    ids = document.to(model.device)
    read, following = ids[:-1], ids[1:]
    head, transform = model.get_output_embeddings(), logit_transform(model.config)
    if chunk is None or chunk >= len(read):
        return exact_nll(hidden_states(model, read[None])[0], following, head, transform).cpu()
    cache = DynamicCache(config=model.config)
    parts = []
    for begin in range(0, len(read), chunk):
        end = min(begin + chunk, len(read))
        positions = torch.arange(begin, end, device=ids.device)[None]
        hidden = hidden_states(model, read[None, begin:end], positions, cache=cache)[0]
        parts.append(exact_nll(hidden, following[begin:end], head, transform).cpu())
    return torch.cat(parts)


@torch.no_grad()
def slid_nll(
    model: PreTrainedModel, document: Tensor, native: int, stride: int, prefix: tuple[int, ...] = ()
) -> Tensor:
    """NLL with the native window slid over the document (the `sliding` protocol), on the CPU, `[T - 1]`.

    Inside the native window this is `full_nll`. Every later token is predicted from between `native - stride` and
    `native - 1` tokens before it, at positions inside the native window.

    Args:
        model: the model as it is.
        document: token ids, `[T]`.
        native: tokens per window.
        stride: tokens scored per window.
        prefix: tokens that replace the first ones of every window, for models that need them.
    """
    if len(document) <= native:
        return full_nll(model, document)
    stride = min(stride, native - 1)  # a window's first token is never predicted
    parts = [full_nll(model, document[:native])]
    done = native
    while done < len(document):
        end = min(done + stride, len(document))
        ids = document[end - native : end].clone()
        ids[: len(prefix)] = ids.new_tensor(prefix)
        window = full_nll(model, ids)
        parts.append(window[-(end - done) :])
        done = end
    return torch.cat(parts)


def bucket_edges(length: int, buckets: int) -> list[int]:
    """Edges of `buckets` equal position ranges from 0 to `length`."""
    return [round(length * b / buckets) for b in range(buckets + 1)]


def by_position(nll: Tensor, edges: list[int]) -> list[NllSum]:
    """Sums over predicted tokens at positions `edges[b]` to `edges[b + 1] - 1`; position 0 is never predicted."""
    return [span_nll(nll, max(low, 1), high) for low, high in zip(edges, edges[1:], strict=False)]


def span_nll(nll: Tensor, low: int, high: int) -> NllSum:
    """Sum over predicted tokens at positions `low` (at least 1) to `high - 1`."""
    span = nll[low - 1 : high - 1].double()
    return NllSum(span.sum().item(), span.numel())
