"""The base as a teacher: its prediction of every token from at most a native window of tokens before it.

Inside the native window these are the base's own predictions, which tuning should preserve. Beyond it they are those
of the native window slid along the row, a strong baseline on text without long-range structure.

Shapes: b rows, T tokens per row, h hidden size, v vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..models import Transform, by_chunks, hidden_states
from ..tunable import TunableRotary, base_model_active


def windows(length: int, native: int, stride: int) -> list[tuple[int, int]]:
    """The windows that cover `length` tokens, in order, as (end of the window, tokens kept at its end).

    Every window has `min(native, length)` tokens; a kept token has at least `native - stride` tokens before it in its
    window, or all that there are.
    """
    done = min(native, length)
    found = [(done, done)]
    while done < length:
        end = min(done + stride, length)
        found.append((end, end - done))
        done = end
    return found


@torch.no_grad()
def teacher_states(
    model: PreTrainedModel,
    rotary: TunableRotary,
    input_ids: Tensor,
    native: int,
    stride: int,
    prefix: tuple[int, ...] = (),
) -> Tensor:
    """The base's last hidden states for rows `[b, T]`: `[b, T, h]`.

    Several windows are read at a time, with at most as many tokens as the rows have. In each window the first
    tokens are replaced by `prefix`, which begins every text that the base was trained on.
    """
    rows, length = input_ids.shape
    size = min(native, length)
    planned = windows(length, native, stride)
    most = max(1, length // size)
    parts = []
    with base_model_active(rotary):
        for at in range(0, len(planned), most):
            group = planned[at : at + most]
            ids = torch.cat([input_ids[:, end - size : end] for end, _ in group])
            ids[:, : len(prefix)] = ids.new_tensor(prefix)
            hidden = hidden_states(model, ids).split(rows)
            parts += [states[:, -kept:] for states, (_, kept) in zip(hidden, group, strict=True)]
    return torch.cat(parts, 1)


def divergence(hidden: Tensor, base_hidden: Tensor, head: nn.Module, transform: Transform) -> Tensor:
    """KL(base || model) of each token in nats, float32 `[tokens]`, chunk by chunk.

    Args:
        hidden: states of the model, `[tokens, h]`.
        base_hidden: states of the base, `[tokens, h]`.
        head: the output embeddings, from states to logits.
        transform: function applied to the logits (a softcap or a scale); None: none.
    """

    def logs(states: Tensor) -> Tensor:
        logits = head(states).float()
        return F.log_softmax(transform(logits) if transform else logits, -1)

    def kl(part: Tensor, base: Tensor) -> Tensor:
        base_logs = logs(base)
        return (base_logs.exp() * (base_logs - logs(part))).sum(-1)

    if not len(hidden):
        return torch.zeros(0, device=hidden.device)
    return by_chunks(kl, hidden, base_hidden)
