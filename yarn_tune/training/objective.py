"""The loss of a batch: the weighted sum of the NLL and of the KL divergence from the base over all targets.

The weights come from the terms of the run (`terms.py`).

Shapes: b rows, n tokens per row, h hidden size.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models import HAS_FUSED, IGNORED, Reader, hidden_states
from ..recipe import Train
from ..tunable import TunableRotary
from .teacher import divergence, teacher_states
from .terms import ANSWERS, OBJECTIVES, SHORT_CONTEXT, BaseReads, Targets, Term, Weights


@dataclass(frozen=True)
class ObjectiveConfig:
    """The settings of an objective."""

    objective: str = "next-token"
    short_context_kl: float = 0.0
    answer_weight: float = 1.0
    native: int = 1
    """Native window of the base."""
    stride: int = 1
    """Tokens by which the native window is moved when it slides along a row."""
    prefix: tuple[int, ...] = ()
    """The tokens that begin every text that the base reads."""

    @classmethod
    def of(cls, train: Train, native: int, prefix: tuple[int, ...] = ()) -> "ObjectiveConfig":
        """The settings of a recipe; the native window is slid by half its length."""
        stride = min(max(1, native // 2), native - 1)
        return cls(train.objective, train.short_context_kl, train.answer_weight, native, stride, prefix)

    @property
    def terms(self) -> list[tuple[Term, float]]:
        """The terms of the loss with their weights."""
        terms = [(OBJECTIVES[self.objective], 1.0), (ANSWERS, self.answer_weight)]
        return [*terms, (SHORT_CONTEXT, self.short_context_kl)] if self.short_context_kl > 0 else terms

    @property
    def base_reads(self) -> BaseReads:
        """What the base reads of each row: the most that one of the terms needs."""
        needed = {term.base_reads for term, _ in self.terms}
        return "slid" if "slid" in needed else "native" if "native" in needed else "nothing"

    def weights(self, targets: Targets) -> Weights:
        """The weights of the targets, summed over all terms."""
        return reduce(add, (term.weights(targets, weight) for term, weight in self.terms))


class Objective(Reader):
    """The module whose forward pass is the loss; `distributed.spread` runs it on all processes."""

    def __init__(
        self, model: PreTrainedModel, rotary: TunableRotary, config: ObjectiveConfig, fused: bool = HAS_FUSED
    ) -> None:
        super().__init__(model, fused)
        self.config = config
        # In a tuple, for the reason that `tunable.RotaryProxy` gives.
        self._rotary = (rotary,)

    @property
    def rotary(self) -> TunableRotary:
        """The module with the learned numbers."""
        return self._rotary[0]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        answers: Tensor | None = None,
    ) -> Tensor:
        """Return (loss, NLL), each summed over the targets of a batch `[b, n]`; float32, shape (2,).

        Args:
            input_ids: whole rows.
            position_ids: positions of their tokens.
            labels: the next token, or -100 where there is no target.
            answers: True where the label belongs to an answer to a planted question.
        """
        counted = labels != IGNORED
        hidden = hidden_states(self.model, input_ids, position_ids)[counted]
        is_answer = torch.zeros_like(counted) if answers is None else answers
        weights = self.config.weights(Targets(is_answer[counted], position_ids[counted] < self.config.native))
        nll = self.nll(hidden, labels[counted])
        loss = (weights.nll * nll).sum()
        if self.config.base_reads != "nothing":
            loss = loss + self._kl(hidden, self._base_states(input_ids)[counted], weights.kl)
        return torch.stack([loss, nll.detach().sum()])

    def _kl(self, hidden: Tensor, base_hidden: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over targets of the KL divergence of the model from the base, given their states."""
        head = self.model.get_output_embeddings()
        assert head is not None
        used = weights > 0
        return (weights[used] * divergence(hidden[used], base_hidden[used], head, self.transform)).sum()

    def _base_states(self, input_ids: Tensor) -> Tensor:
        """The last hidden states of the base for each row, `[b, n, h]`; zeros for tokens that it does not read."""
        length, native, prefix = input_ids.shape[1], self.config.native, self.config.prefix
        if self.config.base_reads == "native" and length > native:
            states = teacher_states(self.model, self.rotary, input_ids[:, :native], native, 1, prefix)
            return torch.nn.functional.pad(states, (0, 0, 0, length - native))
        return teacher_states(self.model, self.rotary, input_ids, native, self.config.stride, prefix)
