"""The untouched base as a teacher: what it says of every token from at most its native window before it.

Inside the native window these are the base's own predictions, which the tuned model should keep; beyond, they are those
of the native window slid over the row, which is what is hard to beat on text without far structure.

Shapes: b rows, T tokens a row, h hidden size, v vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..models import Transform, by_chunks, hidden_states
from ..tunable import TunableRotary, base_model_active


def windows(length: int, native: int, stride: int) -> list[tuple[int, int]]:
    """(end, tokens kept at the end) of the windows whose kept tokens are all of `length`, in order.

    Every window is `min(native, length)` long; a token has at least `native - stride` tokens before it in its window,
    or all there are.
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

    Windows are read several at a time, up to as many tokens as the rows have. In each, the
    first tokens are replaced by `prefix`, which begins every text that the base was trained on.
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


def divergence(hidden: Tensor, taught: Tensor, head: nn.Module, transform: Transform) -> Tensor:
    """KL(teacher || model) in nats of each token, float32 `[tokens]`, from states `[tokens, h]`, chunk by chunk."""

    def logs(states: Tensor) -> Tensor:
        logits = head(states).float()
        return F.log_softmax(transform(logits) if transform else logits, -1)

    def nats(part: Tensor, wanted: Tensor) -> Tensor:
        said = logs(wanted)
        return (said.exp() * (said - logs(part))).sum(-1)

    if not len(hidden):
        return torch.zeros(0, device=hidden.device)
    return by_chunks(nats, hidden, taught)
