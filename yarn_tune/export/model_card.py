"""The export's README.md: a Hugging Face model card with the base, the licence, the table, the command, the limits."""

import json
from pathlib import Path
from typing import Any

import yaml

from ..evaluation import Comparison, tables
from ..recipe import Recipe
from ..runs import Run, taught
from ..tunable import KINDS
from .checkpoint import base_folder


def write_card(run: Run, export: Path) -> Path:
    """Write the card of a finished export; the comparison goes in if there is one."""
    recipe = run.recipe
    fidelity = json.loads((export / "fidelity.json").read_text(encoding="utf-8"))
    window = fidelity["window"]
    header = {"base_model": recipe.base.model, **licence_of(recipe), "tags": ["long-context", "rope", "yarn_tune"]}
    learned = fidelity["learned"]
    gains = _folds_text(learned["folds"])
    numbers = "one factor per rotary pair" if learned["factors"] else f"RoPE scale {learned['scale']:.6g}"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {recipe.name}",
        f"{recipe.base.model}, extended from {learned['native']} to {window} tokens by yarn_tune: the weights are the "
        "base's"
        + _changed(fidelity)
        + f"; learned were {numbers} and the attention temperature {learned['temperature']:.6g}{gains}"
        f"{taught(run)}.",
        f"    vllm serve THIS-FOLDER --max-model-len {window}",
        "SERVING.md has the command for each stack that was checked, and what the others would do.",
        *_measured(run, learned["native"]),
        "## Limits",
        "Extending the window does not teach the model to use it: knowledge, languages and biases are the base's. "
        f"Beyond {window} tokens nothing was trained or measured. Check your own task before relying on it.",
    ]
    path = export / "README.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _changed(fidelity: dict[str, Any]) -> str:
    """How the weights differ from the base's."""
    changes = ["for temperatures folded into the query projections"] if "fold" in fidelity else []
    if fidelity["learned"]["lora"]:
        changes.append(f"for LoRA merged into {len(fidelity['learned']['lora'])} tensors")
    return " but " + " and ".join(changes) if changes else ", byte for byte"


def _folds_text(folds: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The kinds of learned numbers that are folded into the weights, with the shapes of their values."""
    parts = []
    for kind, values in folds.items():
        label = KINDS[kind].label
        if kind == "gain" and values["gains"]["complex"]:
            label = "gains and phases of the queries"
        parts.append(f"{label} ({', '.join(' x '.join(map(str, value['shape'])) for value in values.values())})")
    return "".join(f" and {part}" for part in parts)


def licence_of(recipe: Recipe) -> dict[str, str]:
    """The base's licence keys, from its own card; or its LICENSE file; or that there is none known."""
    return licence_from(base_folder(recipe))


def licence_from(base: Path) -> dict[str, str]:
    """The licence keys of a checkpoint folder."""
    card = base / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        if text.startswith("---"):
            header = yaml.safe_load(text.split("---")[1]) or {}
            kept = {k: str(v) for k, v in header.items() if k in ("license", "license_name", "license_link")}
            if kept:
                return kept
    found = sorted(path.name for path in base.glob("LICENSE*"))
    return {"license": "other", "license_name": "as-the-base", **({"license_link": found[0]} if found else {})}


def _measured(run: Run, native: int) -> list[str]:
    path = run.folder / "compare.json"
    if not path.is_file():
        return []
    comparison = Comparison.load(path)
    return [
        "## Measured",
        "\n".join(f"- **{title}**: {line}" for title, line in comparison.verdict().lines().items()),
        f"NLL in nats per token by position (PPL in the mean) on {len(comparison.like.excerpts)} held-out excerpts; "
        f"`native-window` is the base evaluated with a sliding window of its native {native} tokens:",
        tables(comparison),
    ]
