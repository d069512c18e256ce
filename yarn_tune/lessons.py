"""What a step minimises: next tokens, weighted by what far context is worth, or the base's own predictions.

    objective       a token's loss
    next-token      its nats
    far-weighted    its nats, times p / p_near between 1 and 5: p is the probability the model gives it now, p_near
                    what the base gives it from its native window alone. LongCE (arXiv:2410.23771) but for the 1: with
                    few numbers to learn, tokens that may weigh less are given up (3.54 nats instead of 3.14)
    distill         KL(base || model): the base reads with its native window slid along the row

`guard` adds KL(base || model) inside the native window, whatever the objective. Answers to planted questions
(`needles.py`) are learned by their nats under each objective, times `answer_weight`: no near judge knows them.

Shapes: b rows, n tokens a row of which the last `tail` are trained (all of them, where there is no tail).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .objectives import HAS_FUSED, Reader, hidden_states
from .positions import IGNORED
from .prefix import tail_states
from .sections import Recipe
from .teacher import divergence, teacher_states
from .tunable import TunableRotary

MOST = 5.0
"""Largest weight of a token under `far-weighted`, as published."""


@dataclass(frozen=True)
class Lesson:
    """The settings of an objective."""

    objective: str = "next-token"
    guard: float = 0.0
    answer_weight: float = 1.0
    native: int = 1
    stride: int = 1
    """Of the slid native window."""
    spans: int = 1
    """Spans of a skip row; the teacher reads each alone."""
    bos: int | None = None
    """Token that what the base reads begins with."""

    @classmethod
    def of(cls, recipe: Recipe, native: int, bos: int | None = None) -> "Lesson":
        """Those of a recipe."""
        train, spans = recipe.train, recipe.data.spans if recipe.data.positions == "skip" else 1
        stride = train.teacher_stride or max(1, native // 2)
        return cls(train.objective, train.guard, train.answer_weight, native, min(stride, native - 1), spans, bos)

    @property
    def taught(self) -> bool:
        """Whether the base is asked."""
        return self.objective != "next-token" or self.guard > 0


class Objective(Reader):
    """The module that is trained, and spread over processes."""

    def __init__(self, model: PreTrainedModel, rotary: TunableRotary, lesson: Lesson, fused: bool = HAS_FUSED) -> None:
        super().__init__(model, fused)
        self.lesson = lesson
        # In a tuple, for the reason `tunable.Attached` gives.
        self._rotary = (rotary,)

    @property
    def rotary(self) -> TunableRotary:
        """With the numbers that are learned."""
        return self._rotary[0]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        answers: Tensor | None = None,
        tail: int | None = None,
    ) -> Tensor:
        """(what is minimised, nats), each summed over the targets of a batch `[b, n]`; float32, shape (2,).

        Args:
            input_ids: whole rows.
            position_ids: of their tokens.
            labels: the next token, or -100 where that does not count.
            attention_mask: ones, for rows whose spans see each other.
            answers: true where the label is an answer to a planted question.
            tail: tokens at the end of each row to train; the rest is read without a gradient.
        """
        if tail is None:
            hidden = hidden_states(self.model, input_ids, position_ids, attention_mask)
        else:
            hidden = tail_states(self.model, self.rotary, input_ids, tail)
            position_ids, labels = position_ids[:, -tail:], labels[:, -tail:]
            answers = None if answers is None else answers[:, -tail:]
        counted = labels != IGNORED
        asked = torch.zeros_like(counted) if answers is None else answers & counted
        nats = self.nats(hidden[counted], labels[counted])
        loss = self._loss(nats, hidden, input_ids, labels, position_ids, asked)
        return torch.stack([loss, nats.detach().sum()])

    def _loss(
        self, nats: Tensor, hidden: Tensor, input_ids: Tensor, labels: Tensor, position_ids: Tensor, asked: Tensor
    ) -> Tensor:
        """The sum that is minimised; `nats` are those of the counted tokens."""
        lesson, counted = self.lesson, labels != IGNORED
        weights = torch.where(asked[counted], lesson.answer_weight, 1.0)
        inside = position_ids[counted] < lesson.native
        if not lesson.taught or (lesson.objective == "next-token" and not bool(inside.any())):
            return (weights * nats).sum()
        taught = self._taught(input_ids, labels.shape[1])[counted]
        if lesson.objective == "far-weighted":
            with torch.no_grad():
                gain = (self.nats(taught, labels[counted]) - nats.detach()).exp().clamp(1.0, MOST)
            weights = torch.where(asked[counted], weights, gain)
        if lesson.objective == "distill":
            weights = torch.where(asked[counted], weights, 0.0)
        pulls = inside * lesson.guard + (1.0 if lesson.objective == "distill" else 0.0)
        pulls = torch.where(asked[counted], 0.0, pulls)
        pulled = pulls > 0
        head = self.model.get_output_embeddings()
        assert head is not None
        apart = divergence(hidden[counted][pulled], taught[pulled], head, self.transform)
        return (weights * nats).sum() + (pulls[pulled] * apart).sum()

    def _taught(self, input_ids: Tensor, last: int) -> Tensor:
        """The base's hidden states of the last tokens of each row, `[b, last, h]`; each span of a row by itself."""
        rows, length = input_ids.shape
        spans, native, bos = self.lesson.spans, self.lesson.native, self.lesson.bos
        if self.lesson.objective == "next-token" and spans == 1 and last == length > native:
            # The guard alone: the base is asked inside its window only, and never slid.
            inside = teacher_states(self.model, self.rotary, input_ids[:, :native], native, 1, native, bos)
            return torch.nn.functional.pad(inside, (0, 0, 0, length - native))
        ids = input_ids.reshape(rows * spans, length // spans)
        last = min(last, ids.shape[1])
        states = teacher_states(self.model, self.rotary, ids, native, self.lesson.stride, last, bos)
        return states.reshape(rows, spans * last, -1)
