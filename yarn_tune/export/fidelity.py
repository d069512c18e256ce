"""Is the checkpoint what was learned? Logits of the tuned model in memory against the files, reloaded by stock classes.

Below, at and above the native window, up to the last position served, on random tokens.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import CheckFailed
from ..models import CHUNK, hidden_states, load_tokenizer, logit_transform, to_device
from ..runs import Run
from ..serving import EXTRA_KEYS, RopeEncoding
from ..tunable import Learned, attach_fixed, detach, fold_parameters, with_lora

SHORT = 1024
"""Tokens that the fold is compared on in float64, whose attention takes memory for every pair of them."""


def compare_with_memory(run: Run, learned: Learned, served: RopeEncoding, folder: Path) -> dict[str, Any]:
    """Logits of the tuned model in memory against the checkpoint as stock transformers loads it, in float32.

    Rounding what is folded to the dtype of the base's weights is reported and not refused; the tolerance is for
    everything else.

    Multiplying queries and multiplying their weights round differently, which on a real model and a long prompt is more
    than `export.tolerance`. Where it is, two comparisons without that noise must hold instead: at the same lengths with
    the weights in memory folded too, and of the fold itself, on a short prompt in float64.

    Raises:
        CheckFailed: on a difference above `export.tolerance`, or if transformers warns about the rope section.
    """
    tolerance, lengths = run.recipe.export.tolerance, _lengths(learned)
    folds = served.folds(learned)
    differences: dict[int, float] = {}
    rounded: dict[int, float] = {}
    # The shortest first: where the fold's noise shows there already, longer ones need not be read to see more of it.
    for group in (lengths[:1], lengths[1:]) if folds else (lengths,):
        some, some_rounded = _differences(run, learned, served, folder, group)
        differences |= some
        rounded |= some_rounded
        if not max(differences.values()) <= tolerance:
            break
    exact, double = dict(differences), dict[int, float]()
    if folds and not max(differences.values()) <= tolerance:
        noisy = [length for length in lengths if not differences.get(length, math.inf) <= tolerance]
        same, some_rounded = _differences(run, learned, served, folder, noisy, folded=True)
        exact |= same
        rounded = {length: value for length, value in rounded.items() if length not in noisy} | some_rounded
        double, _ = _differences(run, learned, served, folder, [min(SHORT, learned.window)], dtype="float64")
    worst = max([*exact.values(), *double.values()])
    if not worst <= tolerance:
        raise CheckFailed(
            f"export: logits of the reloaded checkpoint differ by {worst:.2e} from the tuned model's, more than "
            f"export.tolerance ({tolerance:.0e}); no checkpoint was written. By length: {exact}"
            + (f", in float64: {double}" if double else "")
        )
    found: dict[str, Any] = {"max_abs_logit_difference": exact | rounded, "dtype": "float32"}
    if rounded:
        found["max_abs_logit_difference_before_rounding"] = exact
    if double:
        found |= {"float32_noise_of_the_fold": differences, "max_abs_logit_difference_float64": double}
    return {
        **found,
        "learned": learned.as_json(),
        "carrier": served.carrier,
        "rope_parameters": served.rope_parameters,
        "window": learned.window,
        "inv_freq": learned.inv_freq().tolist(),
        "attention_factor": learned.attention_factor,
        "softmax_gain": learned.facts.softmax_gain,
    }


@torch.no_grad()
def _differences(
    run: Run,
    learned: Learned,
    served: RopeEncoding,
    folder: Path,
    lengths: list[int],
    dtype: str = "float32",
    folded: bool = False,
) -> tuple[dict[int, float], dict[int, float]]:
    """Largest difference of a logit by length, and the same as rounded to the base's dtype, where that is more.

    With `folded`, the model in memory has the folded weights too, instead of gains on its queries. Double precision
    stays on the CPU, which has room for it.
    """
    place = to_device if dtype == "float32" else lambda model: model
    tuned = place(run.base.load(dtype))
    prompts = _prompts(tuned.config.vocab_size, lengths)
    with with_lora(tuned, learned.lora):
        if not folded:
            attach_fixed(tuned, lambda length: (learned.inv_freq(), learned.attention_factor), learned.folds)
            expected = _hidden(tuned, prompts)
            detach(tuned)
        changed = _exact_weights(tuned, learned, served)
    if folded:
        _set(tuned, changed)
        attach_fixed(tuned, lambda length: (learned.inv_freq(), learned.attention_factor / math.sqrt(served.fold)))
        expected = _hidden(tuned, prompts)
    device = tuned.device
    del tuned
    with rope_warnings() as warnings:
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
        found = _hidden(stock, prompts)
        load_tokenizer(str(folder))
    bad = [text for text in warnings if not ("nrecognized keys" in text and _names(text) <= EXTRA_KEYS)]
    if bad:
        raise CheckFailed(f"export: transformers warns about the exported rope section: {bad[0]}")
    differences = {n: _logit_difference(stock, expected[n], found[n]) for n in prompts}
    if not changed or max(differences.values()) <= run.recipe.export.tolerance:
        return differences, {}
    # A bfloat16 base rounds what is folded into it. That is reported; the fold itself must be exact.
    _set(stock, changed)
    found = _hidden(stock, prompts)
    return {n: _logit_difference(stock, expected[n], found[n]) for n in prompts}, differences


def _set(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def _hidden(model: PreTrainedModel, prompts: dict[int, Tensor]) -> dict[int, Tensor]:
    """Final hidden states of every prompt."""
    return {length: hidden_states(model, ids[None].to(model.device))[0] for length, ids in prompts.items()}


def _exact_weights(model: PreTrainedModel, learned: Learned, served: RopeEncoding) -> dict[str, Tensor]:
    """What merging and folding should leave, from the float32 model with LoRA merged; only what they change."""
    named = dict(model.named_parameters())
    changed = {name: named[name].cpu().clone() for name in learned.lora or {}}
    if served.folds(learned):
        changed |= fold_parameters(model, model.config.to_dict(), served.fold, learned.folds)
    return changed


def _lengths(learned: Learned) -> list[int]:
    """Below, at and above the native window, up to the last position served; in order."""
    native, window = learned.native, learned.window
    return sorted({max(2, native // 2), native, min(native + 1, window), min(2 * native, window), window})


def _prompts(vocabulary: int, lengths: list[int]) -> dict[int, Tensor]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randint(vocabulary, (n,), generator=generator) for n in lengths}


def _logit_difference(model: PreTrainedModel, one: Tensor, other: Tensor) -> float:
    """Largest difference of any logit at any position, chunk by chunk."""
    head, transform = model.get_output_embeddings(), logit_transform(model.config)

    def logits(hidden: Tensor) -> Tensor:
        values: Tensor = head(hidden)
        return transform(values) if transform else values

    pairs = zip(one.split(CHUNK), other.split(CHUNK), strict=True)
    return max((logits(a) - logits(b)).abs().max().item() for a, b in pairs)


@contextmanager
def rope_warnings() -> Iterator[list[str]]:
    """Collect what transformers says about rope sections; it warns where other libraries would raise."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "rope" in record.getMessage().lower():
                texts.append(record.getMessage())

    # Rope sections are checked in configuration and modeling modules alike; all log below this one.
    logger, collector = logging.getLogger("transformers"), Collector(level=logging.WARNING)
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    try:
        yield texts
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)


def _names(text: str) -> set[str]:
    """The keys a message lists in braces at its end: "...: {'a', 'b'}"."""
    return {name.strip(" '\"") for name in text[text.rfind("{") + 1 : text.rfind("}")].split(",")}
