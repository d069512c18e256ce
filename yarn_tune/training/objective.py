"""What a step minimises: the nats of next tokens, or the distance from the base's own predictions.

    objective       a token's loss
    next-token      its nats
    distill         KL(base || model): the base reads with its native window slid along the row

`guard` adds KL(base || model) inside the native window, whatever the objective. Answers to planted questions
(`needles.py`) are learned by their nats under each objective, times `answer_weight`: no near judge knows them.

Shapes: b rows, n tokens a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models import HAS_FUSED, IGNORED, Reader, hidden_states
from ..recipe import Recipe
from ..tunable import TunableRotary
from .teacher import divergence, teacher_states


@dataclass(frozen=True)
class ObjectiveConfig:
    """The settings of an objective."""

    objective: str = "next-token"
    short_context_kl: float = 0.0
    answer_weight: float = 1.0
    native: int = 1
    stride: int = 1
    """Of the slid native window."""
    prefix: tuple[int, ...] = ()
    """Tokens that begin every text the base reads."""

    @classmethod
    def of(cls, recipe: Recipe, native: int, prefix: tuple[int, ...] = ()) -> "ObjectiveConfig":
        """Those of a recipe."""
        train = recipe.train
        stride = min(max(1, native // 2), native - 1)
        return cls(train.objective, train.short_context_kl, train.answer_weight, native, stride, prefix)

    @property
    def taught(self) -> bool:
        """Whether the base is asked."""
        return self.objective != "next-token" or self.short_context_kl > 0


class Objective(Reader):
    """The module that is trained, and spread over processes."""

    def __init__(
        self, model: PreTrainedModel, rotary: TunableRotary, config: ObjectiveConfig, fused: bool = HAS_FUSED
    ) -> None:
        super().__init__(model, fused)
        self.config = config
        # In a tuple, for the reason `tunable.RotaryProxy` gives.
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
        answers: Tensor | None = None,
    ) -> Tensor:
        """(what is minimised, nats), each summed over the targets of a batch `[b, n]`; float32, shape (2,).

        Args:
            input_ids: whole rows.
            position_ids: of their tokens.
            labels: the next token, or -100 where that does not count.
            answers: true where the label is an answer to a planted question.
        """
        hidden = hidden_states(self.model, input_ids, position_ids)
        counted = labels != IGNORED
        asked = torch.zeros_like(counted) if answers is None else answers & counted
        nats = self.nats(hidden[counted], labels[counted])
        loss = self._loss(nats, hidden, input_ids, labels, position_ids, asked)
        return torch.stack([loss, nats.detach().sum()])

    def _loss(
        self, nats: Tensor, hidden: Tensor, input_ids: Tensor, labels: Tensor, position_ids: Tensor, asked: Tensor
    ) -> Tensor:
        """The sum that is minimised; `nats` are those of the counted tokens."""
        config, counted = self.config, labels != IGNORED
        weights = torch.where(asked[counted], config.answer_weight, 1.0)
        inside = position_ids[counted] < config.native
        if not config.taught or (config.objective == "next-token" and not bool(inside.any())):
            return (weights * nats).sum()
        taught = self._taught(input_ids)[counted]
        if config.objective == "distill":
            weights = torch.where(asked[counted], weights, 0.0)
        pulls = inside * config.short_context_kl + (1.0 if config.objective == "distill" else 0.0)
        pulls = torch.where(asked[counted], 0.0, pulls)
        pulled = pulls > 0
        head = self.model.get_output_embeddings()
        assert head is not None
        apart = divergence(hidden[counted][pulled], taught[pulled], head, self.transform)
        return (weights * nats).sum() + (pulls[pulled] * apart).sum()

    def _taught(self, input_ids: Tensor) -> Tensor:
        """The base's hidden states of each row, `[b, n, h]`."""
        length, native, prefix = input_ids.shape[1], self.config.native, self.config.prefix
        if self.config.objective == "next-token" and length > native:
            # The guard alone: the base is asked inside its window only, and never slid.
            inside = teacher_states(self.model, self.rotary, input_ids[:, :native], native, 1, prefix)
            return torch.nn.functional.pad(inside, (0, 0, 0, length - native))
        return teacher_states(self.model, self.rotary, input_ids, native, self.config.stride, prefix)
