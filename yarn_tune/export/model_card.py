"""The export's README.md: a Hugging Face model card with base, licence, code, verdict, picture, limits, citation."""

from importlib.util import find_spec
from pathlib import Path

import yaml

from ..evaluation import COMPARED, Comparison, load_records, tables
from ..files import CARD, write_atomically
from ..recipe import read_yaml
from ..report import plot_summary
from ..runs import AdapterRun, Run, training_costs
from ..tunable import KINDS, Learned, WeightFold
from ..version import __version__
from .fidelity import Fidelity

HERE = "THIS-FOLDER"
"""Stands for the folder or the hub's name of the export in its card."""


PICTURE = "summary.png"
"""Name of the picture in the card."""


def write_card(run: Run | AdapterRun, learned: Learned, fidelity: Fidelity, base: Path, folder: Path) -> None:
    """Write the card of an export, in Markdown, with the comparison and its picture if the run has one.

    Args:
        run: the run or adapter that is exported.
        learned: its learned parameters.
        fidelity: the comparison of the export with the model in memory.
        base: folder with the base's licence.
        folder: the export.
    """
    name, revision = run.sections.base.model, run.sections.base.revision
    header = {
        "base_model": name,
        **revision_key(revision),
        **licence_from(base),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["long-context", "rope", "yarn_tune"],
    }
    numbers = f"RoPE scale {learned.scale:.6g}" if learned.factors is None else "one factor per rotary pair"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {run.sections.name}",
        f"{name}{at_revision(revision)}, extended from {learned.native} to {learned.window} tokens "
        f"by yarn_tune. The weights are the base's{_changed(learned, fidelity)}. "
        f"Learned: {numbers}, the attention temperature {learned.temperature:.6g}"
        f"{_folds_text(learned)}{training_costs(run)}.",
        *_use(run, learned.window),
        *_measured(run, learned.native, folder),
        "## Limits",
        "A longer window does not teach the model to use it; knowledge, languages and biases are the base's. "
        f"Beyond {learned.window} tokens nothing was trained or measured. Check your own task before relying on it.",
        *_citation(name),
    ]
    write_atomically(folder / CARD, ("\n\n".join(parts) + "\n").encode())


def _use(run: Run | AdapterRun, window: int) -> list[str]:
    """Code for transformers and vLLM; `push` writes the name of the repository in the place of THIS-FOLDER."""
    whole = run.base.text_config is run.base.config
    architectures = run.base.written.get("architectures") or ["AutoModelForCausalLM"]
    loader = "AutoModelForCausalLM" if whole else architectures[0]
    return [
        "## Use",
        "An ordinary checkpoint: no custom code, and yarn_tune is not needed.",
        f"""```python
from transformers import AutoTokenizer, {loader}

tokenizer = AutoTokenizer.from_pretrained("{HERE}")
model = {loader}.from_pretrained("{HERE}", dtype="auto", device_map="auto")
text = open("long.txt").read()  # up to {window} tokens
inputs = tokenizer(text, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```""",
        f"""```bash
vllm serve {HERE} --max-model-len {window}
```""",
        "SERVING.md has the command for each stack that was checked, and what the others would compute.",
    ]


def _citation(name: str) -> list[str]:
    return [
        "## Citation",
        f"Cite {name} as its authors ask, and for the extension:",
        f"""```bibtex
@software{{yarn_tune,
  title = {{yarn\\_tune: longer context windows from a few learned numbers of RoPE}},
  author = {{{{The yarn\\_tune authors}}}},
  version = {{{__version__}}}
}}
@article{{peng2023yarn,
  title = {{YaRN: Efficient Context Window Extension of Large Language Models}},
  author = {{Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico}},
  journal = {{arXiv:2309.00071}},
  year = {{2023}}
}}
```""",
    ]


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
        header = read_yaml(text[3 : text.index("\n---", 3)], strict=False)
    except (yaml.YAMLError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _measured(run: Run | AdapterRun, native: int, folder: Path) -> list[str]:
    """The verdict, the picture and the table; nothing where this run was not compared."""
    path = run.folder / COMPARED
    if not path.is_file():
        return []
    comparison = Comparison.load(path)
    # Of several runs in one comparison another one may be the best; a comparison before the training has no such row.
    own = [row.method for row in comparison.like.find("tuned", f"tuned-{run.folder.name}")]
    if not own:
        return []
    picture = []
    if own == ["tuned"] and find_spec("matplotlib"):
        records = load_records(run.folder / "retrieval.json")
        measured = [row.method for row in comparison.rows if row.retrieved is not None]
        needles = {name: record.retrieval for name, record in records.items() if name in measured}
        plot_summary(comparison, needles, folder / PICTURE)
        picture.append(f"![needles found by base, YaRN and this model, and NLL by position]({PICTURE})")
    return [
        "## Measured",
        *picture,
        "\n".join(f"- **{title}**: {line}" for title, line in comparison.verdict(own[0]).lines().items()),
        f"NLL in nats per token by position (PPL in the mean) on {len(comparison.like.excerpts)} held-out excerpts; "
        f"`native-window` is the base evaluated with a sliding window of its native {native} tokens:",
        tables(comparison),
    ]
