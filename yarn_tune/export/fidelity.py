"""Compare the logits of the tuned model in memory with those of the checkpoint as stock transformers loads it.

The prompts are random tokens, shorter than, as long as and longer than the native window, up to the served window.
"""

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ..errors import CheckFailed
from ..files import read_checked, unreadable
from ..models import CHUNK, EXTRA_KEYS, BaseModel, hidden_states, load_model, load_tokenizer, logit_transform, to_device
from ..serving import RopeEncoding
from ..tunable import Folded, Learned, attach_fixed, detach, fold_parameters, set_parameters, with_lora
from .warnings import rope_warnings

FIDELITY = "fidelity.json"

SHORT = 1024
"""Tokens of the comparison in float64, whose attention needs memory for every pair of tokens."""

QUICK = 5.0
"""Seconds after which a comparison shows its progress."""

ByLength = dict[int, float]
"""Tokens of a prompt -> largest absolute difference of a logit at any position."""


@dataclass(frozen=True)
class RoundingCost:
    """Mean NLL on held-out documents with rounded and with exact folded weights, both computed in float32."""

    dtype: str
    """Dtype of the checkpoint."""
    tokens: int
    """Predicted tokens."""
    exact: float
    rounded: float

    def text(self) -> str:
        """The cost in words."""
        return (
            f"rounding the folded weights to {self.dtype} changes the NLL by {self.rounded - self.exact:+.4f} "
            f"({self.exact:.4f} to {self.rounded:.4f} on {self.tokens:,} held-out tokens)"
        )


@dataclass(frozen=True)
class Fidelity:
    """The content of fidelity.json: how closely an export computes what was learned, and what it must compute."""

    max_abs_logit_difference: ByLength
    """Largest difference of the files as they are, in float32."""
    carrier: str
    """How the learned values are written into the config."""
    rope_parameters: dict[str, Any]
    window: int
    inv_freq: list[float]
    """Radians per token, of each pair."""
    attention_factor: float
    """Multiplier of cos and sin, including what is folded into the weights."""
    softmax_gain: float
    """Multiplier of all logits of latent attention, as in the base."""
    learned: dict[str, Any]
    """`Learned.as_json()`."""
    dtype: str = "float32"
    max_abs_logit_difference_before_rounding: ByLength = field(default_factory=dict)
    """Difference with folded weights in float32; empty if rounding them to the base's dtype changed little."""
    float32_noise_of_the_fold: ByLength = field(default_factory=dict)
    """Difference between multiplying queries and multiplying their weights; empty if it is within the tolerance."""
    max_abs_logit_difference_float64: ByLength = field(default_factory=dict)
    fold: Folded | None = None
    rounding_cost: RoundingCost | None = None
    """None if nothing was rounded, or no held-out documents were there."""

    def as_json(self) -> dict[str, Any]:
        """The object for fidelity.json, without empty values."""
        return {key: value for key, value in asdict(self).items() if value not in ({}, None)}

    @classmethod
    def read(cls, export: Path) -> "Fidelity":
        """Read an export's fidelity.json; raises `UserError` if it is missing, damaged or of another version."""
        path, remedy = export / FIDELITY, "run `yarn-tune export` again"
        written = read_checked(path, remedy)
        try:
            by_length = {
                key: {int(length): float(value) for length, value in written[key].items()}
                for key in written
                if key.startswith(("max_abs", "float32"))
            }
            folded = Folded(**written["fold"]) if "fold" in written else None
            cost = RoundingCost(**written["rounding_cost"]) if "rounding_cost" in written else None
            return cls(**written | by_length | {"fold": folded, "rounding_cost": cost})
        except (TypeError, ValueError, AttributeError) as error:
            raise unreadable(path, error, remedy) from error

    @property
    def folded_gain(self) -> float:
        """The factor by which query weights are multiplied; 1 if nothing is folded."""
        return self.fold.gain if self.fold else 1.0


def difference_text(fidelity: Fidelity) -> str:
    """The largest logit difference of an export, and how much of it is rounding of folded weights."""
    text = f"{max(fidelity.max_abs_logit_difference.values()):.1e}"
    if exact := fidelity.max_abs_logit_difference_before_rounding:
        text += f" ({max(exact.values()):.1e} before what is folded was rounded to the dtype of the base's weights)"
    return text


def compare_with_memory(compared: "Comparison") -> Fidelity:
    """Compare the tuned model in memory with the checkpoint as stock transformers loads it, in float32.

    Rounding the folded weights to the dtype of the base's weights is reported but not limited; `tolerance` limits
    everything else. Multiplying queries and multiplying their weights round differently, which on a real model and a
    long prompt may exceed it. Then two comparisons without that noise must hold instead: the same lengths with the
    weights in memory folded too, and a short prompt in float64.

    Args:
        compared: the two models.

    Raises:
        CheckFailed: on a larger difference, or if transformers warns about the rope section.
    """
    learned, served, tolerance = compared.learned, compared.served, compared.tolerance
    lengths = prompt_lengths(learned.native, learned.window)
    found = _up_to_the_first_excess(compared, lengths)
    noise, double = ByLength(), ByLength()
    if served.folds(learned) and not found.worst <= tolerance:
        noise = found.exact
        noisy = [length for length in lengths if not noise.get(length, math.inf) <= tolerance]
        kept = {length: value for length, value in found.rounded.items() if length not in noisy}
        found = replace(found, rounded=kept).merged(compared.measure(noisy, folded=True))
        double = compared.measure([min(SHORT, learned.window)], dtype="float64").exact
    _check(found, double, tolerance)
    return Fidelity(
        max_abs_logit_difference=found.exact | found.rounded,
        max_abs_logit_difference_before_rounding=found.exact if found.rounded else {},
        float32_noise_of_the_fold=noise,
        max_abs_logit_difference_float64=double,
        learned=learned.as_json(),
        carrier=served.name,
        rope_parameters=served.rope_parameters,
        window=learned.window,
        inv_freq=learned.inv_freq().tolist(),
        attention_factor=learned.attention_factor,
        softmax_gain=learned.facts.softmax_gain,
    )


@dataclass(frozen=True)
class Measured:
    """Logit differences by length."""

    exact: ByLength
    """Differences without the rounding of folded weights."""
    rounded: ByLength
    """Differences of the files as they are, if they exceed the tolerance because of that rounding."""

    @property
    def worst(self) -> float:
        """The largest difference without rounding; NaN if any is NaN."""
        return largest(list(self.exact.values()))

    def merged(self, more: "Measured") -> "Measured":
        """Add the differences of more lengths; for a length in both, those of `more` are kept."""
        return Measured(self.exact | more.exact, self.rounded | more.rounded)


def largest(values: list[float]) -> float:
    """The largest of some differences; NaN if any is NaN."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def _up_to_the_first_excess(compared: "Comparison", lengths: list[int]) -> Measured:
    """Measure the shortest length first: where the fold's noise exceeds the tolerance already, skip the others."""
    if not compared.served.folds(compared.learned):
        return compared.measure(lengths)
    first = compared.measure(lengths[:1])
    return first.merged(compared.measure(lengths[1:])) if first.worst <= compared.tolerance else first


def _check(found: Measured, double: ByLength, tolerance: float) -> None:
    worst = largest([*found.exact.values(), *double.values()])
    if not worst <= tolerance:
        raise CheckFailed(
            f"export: logits of the reloaded checkpoint differ by {worst:.2e} from the tuned model's, more than "
            f"export.tolerance ({tolerance:.0e}); no checkpoint was written. By length: {found.exact}"
            + (f", in float64: {double}" if double else "")
        )


@dataclass(frozen=True)
class Comparison:
    """The tuned model in memory and the checkpoint on disk, which are compared."""

    base: BaseModel
    learned: Learned
    """The parameters that were learned, in natural units."""
    served: RopeEncoding
    """Encoding of the parameters in the config and the weights."""
    folder: Path
    """Folder of the checkpoint."""
    tolerance: float
    """Largest absolute difference of a logit."""
    exact: dict[str, Tensor] = field(default_factory=dict)
    """The weights that the export changes, before they are rounded, in float32; filled by `measure`."""

    @torch.no_grad()
    def measure(self, lengths: list[int], dtype: str = "float32", folded: bool = False) -> Measured:
        """Logit differences on prompts of these lengths.

        Args:
            lengths: tokens of each prompt.
            dtype: dtype of both models; float64 models stay on the CPU, which has enough memory.
            folded: whether the model in memory has folded weights instead of gains on its queries.
        """
        prompts = _prompts(self.base.text_config.vocab_size, lengths)
        expected, changed, device = self._in_memory(prompts, dtype, folded)
        stock = self._reloaded(dtype).to(device)  # type: ignore[arg-type]
        differences = _differences(stock, prompts, expected, f"the files, {dtype}")
        if not changed or max(differences.values()) <= self.tolerance:
            return Measured(differences, {})
        # The files have rounded weights, whose difference is reported; with exact weights it must be small.
        set_parameters(stock, changed)
        return Measured(_differences(stock, prompts, expected, f"the files unrounded, {dtype}"), differences)

    def _in_memory(
        self, prompts: dict[int, Tensor], dtype: str, folded: bool
    ) -> tuple[dict[int, Tensor], dict[str, Tensor], torch.device]:
        """Final hidden states of the tuned model, the weights that the export changes (exactly), and the device."""
        tuned, learned = self.base.load(dtype), self.learned
        if dtype == "float32":
            tuned = to_device(tuned)
        with with_lora(tuned, learned.lora):
            if not folded:
                attach_fixed(tuned, lambda length: (learned.inv_freq(), learned.attention_factor), learned.folds)
                expected = _hidden(tuned, prompts, f"the tuned model, {dtype}")
                detach(tuned)
            changed = self._changed_weights(tuned)
        if dtype == "float32":
            self.exact.update(changed)
        if folded:
            factor = learned.attention_factor / math.sqrt(self.served.fold)
            set_parameters(tuned, changed)
            attach_fixed(tuned, lambda length: (learned.inv_freq(), factor))
            expected = _hidden(tuned, prompts, f"the tuned model folded, {dtype}")
        return expected, changed, tuned.device

    def _changed_weights(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The weights that folding changes in a model with merged LoRA, and merged ones, exactly, in its dtype."""
        named = dict(model.named_parameters())
        changed = {name: named[name].cpu().clone() for name in self.learned.lora or {}}
        if self.served.folds(self.learned):
            changed |= fold_parameters(model, model.config.to_dict(), self.served.fold, self.learned.folds)
        return changed

    def _reloaded(self, dtype: str) -> PreTrainedModel:
        """The checkpoint with stock classes; its tokenizer must load too."""
        with rope_warnings() as texts:
            stock = load_model(str(self.folder), dtype=dtype)
            load_tokenizer(str(self.folder))
        bad = [text for text in texts if not ("nrecognized keys" in text and _names(text) <= EXTRA_KEYS)]
        if bad:
            raise CheckFailed(f"export: transformers warns about the exported rope section: {bad[0]}")
        return stock


def _hidden(model: PreTrainedModel, prompts: dict[int, Tensor], which: str) -> dict[int, Tensor]:
    """Final hidden states of every prompt; a progress bar names the model (`which`) if this takes seconds."""
    found = {}
    bar = tqdm(prompts.items(), desc=f"export: {which}", unit="prompt", delay=QUICK, file=sys.stderr)
    for length, ids in bar:
        bar.set_postfix_str(f"{length} tokens", refresh=bar.format_dict["elapsed"] > QUICK)
        found[length] = hidden_states(model, ids[None].to(model.device))[0]
    return found


def _differences(
    model: PreTrainedModel, prompts: dict[int, Tensor], expected: dict[int, Tensor], which: str
) -> ByLength:
    found = _hidden(model, prompts, which)
    return {length: _logit_difference(model, expected[length], found[length]) for length in prompts}


def prompt_lengths(native: int, window: int) -> list[int]:
    """Prompt lengths below, at and above the native window, up to the served window; in order."""
    return sorted({max(2, native // 2), native, min(native + 1, window), min(2 * native, window), window})


def _prompts(vocabulary: int, lengths: list[int]) -> dict[int, Tensor]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randint(vocabulary, (n,), generator=generator) for n in lengths}


def _logit_difference(model: PreTrainedModel, one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of a logit at any position, computed in chunks."""
    head, transform = model.get_output_embeddings(), logit_transform(model.config)

    def logits(hidden: Tensor) -> Tensor:
        values: Tensor = head(hidden)
        return transform(values) if transform else values

    pairs = zip(one.split(CHUNK), other.split(CHUNK), strict=True)
    return max((logits(a) - logits(b)).abs().max().item() for a, b in pairs)


def _names(text: str) -> set[str]:
    """The keys a message lists in braces at its end: "...: {'a', 'b'}"."""
    return {name.strip(" '\"") for name in text[text.rfind("{") + 1 : text.rfind("}")].split(",")}
