"""SERVING.md: how to serve an export on each requested stack, where its values are, and what was folded."""

import json
import math
from dataclasses import replace

from ..models import FULL, WRAPPERS, layout_of
from ..serving import STACKS, RopeEncoding, Target, unserved
from ..tunable import KINDS, Learned
from .fidelity import Fidelity, difference_text


def serving_page(base: str, learned: Learned, served: RopeEncoding, target: Target, fidelity: Fidelity) -> str:
    """The page, in Markdown.

    Args:
        base: name of the base model.
        learned: the learned parameters.
        served: encoding of the parameters.
        target: the requested stacks.
        fidelity: the comparison with memory, and what was folded.
    """
    window = learned.window
    lost = unserved(served, learned, replace(target, stacks=tuple(STACKS)))
    whole = target.base.get("model_type") in WRAPPERS
    requested = [f"| {n} ({STACKS[n].versions}) | {_command(n, window, whole)} |" for n in target.stacks]
    others = [
        f"| {n} ({STACKS[n].versions}) | {'; '.join(lost.get(n, ['the same']))} |"
        for n in STACKS
        if n not in target.stacks
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
            *requested,
            "",
            *_carried(base, learned, served, target, fidelity),
            "## Other stacks",
            "",
            "Not requested at export. What each would compute from this config, according to its source "
            "(`yarn-tune verify EXPORT --for all` checks the same):",
            "",
            "| stack | |",
            "|---|---|",
            *others,
            "",
            "## Afterwards",
            "",
            "- Quantise the export, not the base: what is folded must be in the weights before they are quantised. A "
            "quantised KV cache is quantised after the rotation and needs nothing.",
            "- Saving this checkpoint again with transformers 5 (quantisers and merges do) drops `rope_scaling` and "
            "`rope_theta`, which transformers 4 and old servers read; run `yarn-tune verify` on the result.",
            "",
        ]
    )


def _command(stack: str, window: int, multimodal: bool) -> str:
    """The command that serves the checkpoint on a stack, as a table cell."""
    command = STACKS[stack].command(window)
    if multimodal:
        command = command.replace("text-generation", "image-text-to-text")
    return f"`{command}`" if command else "no command is known"


def _carried(base: str, learned: Learned, served: RopeEncoding, target: Target, fidelity: Fidelity) -> list[str]:
    """Where each value is: in the config, in the weights, or nowhere."""
    folded = fidelity.fold
    section, longest = served.rope_parameters, served.max_position_embeddings
    layers = f", of {FULL} layers only" if layout_of(target.base).nested else ""
    place = "config.json, under the key of each reader"
    if served.fold != 1.0:
        own = learned.attention_factor / math.sqrt(served.fold)
        place = f"{own:.6g} of it is what every reader computes from the config, the rest is folded into the queries"
    elif "attention_factor" not in section:
        place = "what every reader computes from the config"
    lines = [
        "## Where the values are",
        "",
        f"- Frequencies: config.json, `rope_type: {section['rope_type']}`{layers}.",
        f"- Attention factor {learned.attention_factor:.6g} (of cos and sin; logits: its square): {place}.",
        f"- Window: {learned.window}, as max_position_embeddings and the tokenizer's model_max_length say.",
    ]
    original = section.get("original_max_position_embeddings", learned.native)
    if (original, longest) != (learned.native, learned.window):
        lines[-1] = (
            f"- Window: {learned.window}. max_position_embeddings and the tokenizer's model_max_length are {longest}, "
            f"and original_max_position_embeddings is {original}: these are chosen such that every stack computes the "
            "same frequencies and multiplier."
        )
    for fold in learned.folds:
        kind = KINDS[fold.kind]
        shapes = ", ".join(" x ".join(map(str, values.shape)) for values in fold.values().values())
        range_ = "".join(f", {name.replace('_', ' ')} {value:.3g}" for name, value in fold.summary().items())
        lines.append(f"- {kind.label.capitalize()}: folded into the {kind.folded_into} ({shapes} values{range_}).")
    if learned.lora is not None:
        lines.append(f"- LoRA: merged into {len(learned.lora)} tensors, before anything was folded.")
    if folded is not None:
        lines += [
            f"- Folded: {folded.numbers} numbers in {folded.tensors} tensors"
            + (f", all multiplied by {folded.gain:.8g}" if folded.gain != 1.0 else "")
            + f"; rounding to the checkpoint's dtype changed them by {folded.rounding:.1e} "
            "(root mean square, relative).",
            *([f"- Measured: {fidelity.rounding_cost.text()}."] if fidelity.rounding_cost else []),
            "- The base cannot be served with overrides instead of this checkpoint: its weights lack the fold.",
        ]
    elif learned.lora is not None:
        lines.append(
            "- The base cannot be served with overrides instead of this checkpoint: its weights lack the merge."
        )
    else:
        overrides = json.dumps(served.overrides(target.base))
        lines += [
            "- Nothing is folded: the weight files are the base's, byte for byte. Without this checkpoint:",
            "",
            f"      vllm serve {base} --max-model-len {learned.window} --hf-overrides '{overrides}'",
        ]
    for name, reason in (target.left_out or {}).items():
        lines.append(f"- Left out: {name} {reason}.")
    return [*lines, ""]
