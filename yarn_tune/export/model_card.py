"""The export's README.md: a Hugging Face model card with the base, the licence, the table, the command, the limits."""

from pathlib import Path

import yaml

from ..evaluation import COMPARED, Comparison, tables
from ..files import CARD
from ..recipe import read_yaml
from ..runs import AdapterRun, Run, training_costs
from ..tunable import KINDS, Learned, WeightFold
from .fidelity import Fidelity


def model_card(run: Run | AdapterRun, learned: Learned, fidelity: Fidelity, base: Path) -> str:
    """The card of an export, in Markdown, with the comparison if the run has one.

    Args:
        run: the run or adapter that is exported.
        learned: its learned parameters.
        fidelity: the comparison of the export with the model in memory.
        base: folder with the base's licence.
    """
    name = run.sections.base.model
    header = {
        "base_model": name,
        **revision_key(run.sections.base.revision),
        **licence_from(base),
        "tags": ["long-context", "rope", "yarn_tune"],
    }
    numbers = f"RoPE scale {learned.scale:.6g}" if learned.factors is None else "one factor per rotary pair"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {run.sections.name}",
        f"{name}{at_revision(run.sections.base.revision)}, extended from {learned.native} to {learned.window} tokens "
        f"by yarn_tune. The weights are the base's{_changed(learned, fidelity)}. "
        f"Learned: {numbers}, the attention temperature {learned.temperature:.6g}"
        f"{_folds_text(learned)}{training_costs(run)}.",
        f"    vllm serve THIS-FOLDER --max-model-len {learned.window}",
        "SERVING.md has the command for each stack that was checked, and what the others would compute.",
        *_measured(run, learned.native),
        "## Limits",
        "A longer window does not teach the model to use it; knowledge, languages and biases are the base's. "
        f"Beyond {learned.window} tokens nothing was trained or measured. Check your own task before relying on it.",
    ]
    return "\n\n".join(parts) + "\n"


def _changed(learned: Learned, fidelity: Fidelity) -> str:
    """How the weights differ from the base's."""
    changes = [f"for {_label(fold)}" for fold in learned.folds]
    if fidelity.fold and fidelity.fold.gain != 1.0:
        changes.append("for the temperature, folded into the queries")
    if learned.lora:
        changes.append(f"for LoRA merged into {len(learned.lora)} tensors")
    return " but " + " and ".join(changes) if changes else ", byte for byte"


def _label(fold: WeightFold) -> str:
    """The kind of the values; complex gains hold phases too."""
    phases = any(value.is_complex() for value in fold.values().values())
    return "gains and phases of the queries" if phases else KINDS[fold.kind].label


def _folds_text(learned: Learned) -> str:
    """The kinds of learned numbers that are folded into the weights, with the shapes of their values."""
    parts = []
    for fold in learned.folds:
        shapes = (" x ".join(map(str, value.shape)) for value in fold.values().values())
        parts.append(f"{_label(fold)} ({', '.join(shapes)})")
    return "".join(f" and {part}" for part in parts)


def revision_key(revision: str | None) -> dict[str, str]:
    """The key of a card's header with the revision of the base on the hub; empty if none is known."""
    return {"base_model_revision": revision} if revision else {}


def at_revision(revision: str | None) -> str:
    """The words " (revision X)"; empty if none is known."""
    return f" (revision {revision})" if revision else ""


def licence_from(base: Path) -> dict[str, str]:
    """The licence keys of a checkpoint folder: from its card, else from its LICENSE file, else "as-the-base"."""
    card = base / CARD
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        kept = {k: str(v) for k, v in card_header(text).items() if k in ("license", "license_name", "license_link")}
        if kept:
            return kept
    found = sorted(path.name for path in base.glob("LICENSE*"))
    return {"license": "other", "license_name": "as-the-base", **({"license_link": found[0]} if found else {})}


def card_header(text: str) -> dict[str, object]:
    """The YAML header of a model card; empty if it has none that can be read."""
    if not text.startswith("---") or "\n---" not in text:
        return {}
    try:
        header = read_yaml(text[3 : text.index("\n---", 3)])
    except (yaml.YAMLError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _measured(run: Run | AdapterRun, native: int) -> list[str]:
    path = run.folder / COMPARED
    if not path.is_file():
        return []
    comparison = Comparison.load(path)
    # Of several runs in one comparison another one may be the best; a comparison before the training has no such row.
    own = [row.method for row in comparison.like.find("tuned", f"tuned-{run.folder.name}")]
    if not own:
        return []
    return [
        "## Measured",
        "\n".join(f"- **{title}**: {line}" for title, line in comparison.verdict(own[0]).lines().items()),
        f"NLL in nats per token by position (PPL in the mean) on {len(comparison.like.excerpts)} held-out excerpts; "
        f"`native-window` is the base evaluated with a sliding window of its native {native} tokens:",
        tables(comparison),
    ]
