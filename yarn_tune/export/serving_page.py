"""SERVING.md: how to serve an export on each stack asked for, what is carried where, and what was folded."""

import json
from dataclasses import replace
from typing import Any

from ..models import FULL, layout_of
from ..serving import STACKS, RopeEncoding, Target, unserved
from ..tunable import Folded, Learned


def difference_text(fidelity: dict[str, Any]) -> str:
    """Largest logit difference of an export by its fidelity.json, and what of it is rounding."""
    text = f"{max(fidelity['max_abs_logit_difference'].values()):.1e}"
    exact = fidelity.get("max_abs_logit_difference_before_rounding")
    if exact:
        text += f" ({max(exact.values()):.1e} before what is folded was rounded to the dtype of the base's weights)"
    return text


def serving_page(
    base: str,
    learned: Learned,
    served: RopeEncoding,
    aim: Target,
    folded: Folded | None,
    fidelity: dict[str, Any],
) -> str:
    """The page, in Markdown."""
    window = learned.window
    lost = unserved(served, learned, replace(aim, stacks=tuple(STACKS)))
    asked = [f"| {n} ({STACKS[n].versions}) | {_command(n, window)} |" for n in aim.stacks]
    others = [
        f"| {n} ({STACKS[n].versions}) | {'; '.join(lost.get(n, ['the same']))} |"
        for n in STACKS
        if n not in aim.stacks
    ]
    return "\n".join(
        [
            "# Serving",
            "",
            f"A stock checkpoint of {base} with a window of {window} tokens; no custom code is needed.",
            "Reloaded by transformers in float32, its logits differ from the tuned model's by at most "
            f"{difference_text(fidelity)}. EXPORT is this folder.",
            "",
            "| stack | command |",
            "|---|---|",
            *asked,
            "",
            *_carried(base, learned, served, aim, folded),
            "## Other stacks",
            "",
            "Not asked for at export. What each would compute from this config, by its source "
            "(`yarn-tune verify EXPORT --for all` says the same):",
            "",
            "| stack | |",
            "|---|---|",
            *others,
            "",
            "## Afterwards",
            "",
            "- Quantise after exporting, never before: what is folded must be in the weights first. A quantised KV "
            "cache is quantised after rotation and needs nothing.",
            "- Saving this checkpoint again with transformers 5 (quantisers and merges do) drops `rope_scaling` and "
            "`rope_theta`, which transformers 4 and old servers read; run `yarn-tune verify` on the result.",
            "",
        ]
    )


def _command(stack: str, window: int) -> str:
    """The command that serves the checkpoint on a stack, as a table cell."""
    command = STACKS[stack].command(window)
    return f"`{command}`" if command else "no command is known"


def _carried(base: str, learned: Learned, served: RopeEncoding, aim: Target, folded: Folded | None) -> list[str]:
    """What stands where."""
    section, longest = served.rope_parameters, served.max_position_embeddings
    layers = f", of {FULL} layers only" if layout_of(aim.base).nested else ""
    place = "folded into the queries" if served.fold != 1.0 else "config.json, under the key of each reader"
    lines = [
        "## What is carried where",
        "",
        f"- Frequencies: config.json, `rope_type: {section['rope_type']}`{layers}.",
        f"- Attention factor {learned.attention_factor:.6g} (of cos and sin; logits: its square): {place}.",
        f"- Window: {learned.window}. max_position_embeddings and the tokenizer's model_max_length are {longest}: the "
        "lengths in the config are chosen such that every stack computes the same frequencies and multiplier.",
    ]
    if learned.gains is not None:
        layers_, groups, pairs = learned.gains.shape
        turned = (
            f" and turned by up to {learned.gains.angle().abs().max():.2g} rad" if learned.gains.is_complex() else ""
        )
        lines.append(
            f"- Temperatures by layer, head or pair: folded into the queries of {layers_} layers ({groups} x {pairs} "
            f"gains each, from {learned.gains.abs().min():.3g} to {learned.gains.abs().max():.3g}{turned})."
        )
    if learned.lora is not None:
        lines.append(f"- LoRA: merged into {len(learned.lora)} tensors, before anything was folded.")
    if folded is not None:
        lines += [
            f"- Folded: {folded.numbers} numbers in {folded.tensors} tensors"
            + (f", all multiplied by {folded.gain:.8g}" if folded.gain != 1.0 else "")
            + f"; rounding to the checkpoint's dtype changed them by {folded.rounding:.1e} "
            "(root mean square, relative).",
            "- The base cannot be served with overrides instead of this checkpoint: its weights lack the fold.",
        ]
    elif learned.lora is not None:
        lines.append(
            "- The base cannot be served with overrides instead of this checkpoint: its weights lack the merge."
        )
    else:
        overrides = json.dumps(served.overrides(aim.base))
        lines += [
            "- Nothing is folded: the weight files are the base's, byte for byte. Without this checkpoint:",
            "",
            f"      vllm serve {base} --max-model-len {learned.window} --hf-overrides '{overrides}'",
        ]
    for name, reason in (aim.left_out or {}).items():
        lines.append(f"- Left out: {name} {reason}.")
    return [*lines, ""]
