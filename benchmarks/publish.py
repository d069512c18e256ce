"""Write what README.md and recipes/README.md show of results: the picture, the tables, and sentences with numbers.

    python benchmarks/publish.py                        from benchmarks/results
    python benchmarks/publish.py --run runs/tiny-demo   take the demo's results from this run first
    python benchmarks/publish.py --walk                 run the README's five commands first

A block of a page is the text between `<!-- NAME: ... -->` and `<!-- /NAME -->`. tests/test_readme.py compares the pages
with the results.
"""

import argparse
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from yarn_tune.cli.terminal import summary_cells, verification_summary
from yarn_tune.evaluation import CompareRow, Comparison, TextResult, load_records
from yarn_tune.evaluation.results import table
from yarn_tune.evaluation.verdict import TextVerdict
from yarn_tune.report import plot_summary
from yarn_tune.serving import verify

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "recipes" / "tiny-demo.png"
DEMO = {"compare.json": "tiny-demo-compare.json", "retrieval.json": "tiny-demo-retrieval.json"}
"""File of a run folder -> its name in benchmarks/results."""
NAMES = {
    "none": "base as it is",
    "native-window": "base with its native window slid",
    "yarn": "YaRN",
    "tuned": "tuned",
}
"""Row of a comparison -> its name in the README."""
MODELS = {
    "Llama 2 7B": "llama-2-7b-32k",
    "Llama 3 8B": "llama-3-8b-64k",
    "Llama 3.1 8B": "llama-3.1-8b-256k",
    "Mistral 7B v0.3": "mistral-7b-v0.3-128k",
    "Qwen2.5 7B": "qwen2.5-7b-128k",
    "Qwen3 8B": "qwen3-8b-128k",
    "Gemma 3 1B": "gemma-3-1b-128k",
    "Phi-4-mini": "phi-4-mini-256k",
    "OLMo 2 7B": "olmo-2-7b-32k",
}
"""Model, by the name people say -> its recipe."""


def demo() -> Comparison:
    """The published comparison of the demo."""
    return Comparison.load(RESULTS / DEMO["compare.json"])


def _rows(results: Sequence[TextResult], names: dict[str, str], columns: int) -> list[str]:
    """The rows of a table: for each kind of text the first columns of `summary_cells`, the best in bold."""
    found = [dict(summary_cells(TextResult(each.excerpts, each.find("none", *names)))) for each in results]
    lines = []
    for method in (name for name in names if name in found[0]):
        cells = [cell for each in found for cell in each[method][:columns]]
        texts = [f"**{text}**" if best else text for text, best in cells]
        lines.append(f"| {names[method]} | {' | '.join(texts)} |")
    return lines


def demo_table() -> str:
    """The demo in four rows and five columns, and the verdict on text like and unlike the training text."""
    found = demo()
    verdict = found.verdict("tuned")
    assert found.unlike is not None
    lines = [
        "| the demo, 256 to 2048 tokens | mean NLL | short texts | far tokens | needles |",
        "|---|---|---|---|---|",
    ]
    lines += _rows([found.like], NAMES, 4)
    statements = [f"on {title} {_contrasts(each)}" for title, each in zip(TEXTS, verdict.texts, strict=True)]
    tuned, slid, adapted = (found.row(name).longest for name in ("tuned", "native-window", "tuned-slid"))
    parts = [
        f"In a sign test over excerpts the tuned model is, {'; '.join(statements)}. Of its distance of "
        f"{slid - tuned:.3f} to the slid base, {adapted - tuned:.3f} come from reading further, the rest from adapting "
        "to such text.",
    ]
    return "\n".join([*lines, "", _filled(" ".join(parts))])


TEXTS = ("text like the training text", "other authors and genres")
"""Kinds of text of the demo."""


def _contrasts(verdict: TextVerdict) -> str:
    """What the sign tests say, in the README's names."""
    names = {
        "yarn": "YaRN",
        "native-window": "the slid base",
        "native-adapted": "the same numbers learned at the native window and slid",
    }
    words = {"better": "better than", "worse": "worse than"}
    return ", ".join(
        f"{words.get(contrast.outcome, f'{contrast.outcome} against')} {names[contrast.other]} "
        f"({contrast.below} of {contrast.excerpts} lower, p = {contrast.p:.2g})"
        for contrast in verdict.contrasts
    )


def _filled(text: str, width: int = 124) -> str:
    lines = [""]
    for word in text.split():
        lines += [""] if len(lines[-1]) + 1 + len(word) > width else []
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def real_models() -> str:
    """The real model that was run at full size, on text like the training text and, where measured, unlike it."""
    lines = []
    for name in REAL:
        found = Comparison.load(RESULTS / f"{name}-compare.json")
        titles = [f"SmolLM2-135M, {found.native} to {found.window} tokens"]
        for kind, _ in zip(("like", "unlike"), found.texts, strict=False):
            titles += [f"{kind}: NLL", "short texts", "far tokens"]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        lines += [*_rows(list(found.texts.values()), REAL_NAMES, 3), ""]
    return "\n".join(lines).rstrip()


REAL = ("smollm2-135m-16k", "smollm2-135m-32k")
"""Published comparisons, one table each."""
REAL_NAMES = {
    "native-window": "base with its native window slid",
    "native-adapted": "control: the same numbers learned at the native window, slid",
    "yarn": "YaRN",
    "tuned": "tuned",
}
"""Rows of these tables."""


def results() -> str:
    """The tables of the demo and of the real models."""
    return f"{demo_table()}\n\n{real_models()}"


def models() -> str:
    """Model, recipe, window, GPU and hours: from recipes/README.md and the recipes' first lines."""
    page = (ROOT / "recipes" / "README.md").read_text()
    lines = ["| model | recipe | window | one GPU with | GPU-hours, computed |", "|---|---|---|---|---|"]
    for model, name in MODELS.items():
        row = re.search(rf"^\| `{re.escape(name)}.yaml` \| [^|]+ \| (\d+) \| [^|]+ \| ([\d.]+) \|", page, re.M)
        memory = re.search(r"one GPU with (\d+) GB", (ROOT / "recipes" / f"{name}.yaml").read_text())
        assert row, name
        assert memory, name
        lines.append(f"| {model} | `{name}` | {row[1]} | {memory[1]} GB | {row[2]} |")
    return "\n".join(lines)


CARD = ROOT / "tests" / "serving" / "field" / "01-qwen25-card-recipe.json"
"""config.json of Qwen2.5-7B-Instruct with the YaRN section that its model card recommends."""
SHOWN = ("transformers", "transformers-4.55", "vllm", "vllm-0.29", "exllamav3")
"""Stacks of the README's example of `verify`."""


def verified() -> str:
    """What `verify --for all` prints about a well-known config, with some of its stacks left out."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(CARD, Path(folder) / "config.json")
        made = verify(folder, ["all"])
        text = verification_summary(made).replace(folder, "Qwen2.5-7B-Instruct")
    lines = text.splitlines()
    names = [line.stack for line in made.lines]
    title = next(number for number, line in enumerate(lines) if line.startswith("stack"))
    rows = lines[title + 1 : title + 1 + len(names)]
    shown = [row for name, row in zip(names, rows, strict=True) if name in SHOWN]
    more = f"... {len(names) - len(shown)} stacks more, and why they differ ..."
    output = [lines[0], *lines[title : title + 1], *shown, more, *text[text.index("ERROR") :].splitlines()]
    return "\n".join(f"    {line}".rstrip() for line in ["yarn-tune verify Qwen2.5-7B-Instruct --for all", *output])


WALK = RESULTS / "five-commands.json"
"""The five commands of the README, each with two lines of its output."""
FIVE = [
    (
        "yarn-tune init data/tiny-base --window 2048 --train data/sample/train.jsonl.gz"
        " --heldout data/sample/heldout.jsonl.gz",
        ("written to", "next:"),
    ),
    ("yarn-tune plan recipes/tiny-demo.yaml", ("  reads", "  memory")),
    ("yarn-tune train recipes/tiny-demo.yaml", ("step 50/", "next:")),
    ("yarn-tune compare runs/tiny-demo", ("Prediction:", "Needles:")),
    ("yarn-tune export runs/tiny-demo", ("runs/", "next:")),
]
"""(command, beginnings of the lines of its output that the README shows)"""


def picked(output: str, beginnings: tuple[str, ...]) -> list[str]:
    """The first line of an output that begins with each of the texts; a verdict with its further lines."""
    found = []
    for beginning in beginnings:
        further = "" if beginning.startswith(" ") else r"(\n  \S.*)*"
        at = re.search(rf"^{re.escape(beginning)}.*{further}", output, re.M)
        assert at, f"no line begins with {beginning!r}:\n{output}"
        found.append(" ".join(at[0].split()))
    return found


def record_walk(folder: Path) -> None:
    """Run the five commands in a folder, about five minutes on two cores, and keep two lines of each."""
    for name in ("data", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    kept = []
    for command, beginnings in FIVE:
        words = [sys.executable, "-m", "yarn_tune", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
        kept.append({"command": command, "output": picked(f"{done.stderr}\n{done.stdout}", beginnings)})
    WALK.write_text(json.dumps(kept, indent=1) + "\n")


def walk() -> str:
    """The five commands with two lines of output each; long lines are cut after a statement."""
    lines = []
    for step in json.loads(WALK.read_text()):
        lines += [f"    {step['command']}", *(f"      {_cut(line)}" for line in step["output"])]
    return "\n".join(lines)


def _cut(line: str, width: int = 112) -> str:
    """A line of at most so many characters, cut after a word."""
    if len(line) <= width:
        return line
    return f"{line[: line.rfind(' ', 0, width)]} ..."


def demo_tables() -> str:
    """All rows of the demo by position, and the sentences about them."""
    found = demo()
    assert found.unlike is not None
    retrieved = {row.method: row.retrieved[0] for row in found.rows if row.retrieved}
    yarn, slid, tuned, base = (found.row(name) for name in ("yarn", "native-window", "tuned", "none"))
    text = (
        f"The tuned model's NLL is {_apart(tuned, yarn)} search-free YaRN over the whole window, and "
        f"{_apart(tuned, slid)} the slid native window. Inside the native window it changes by "
        f"{tuned.short_nll - base.short_nll:+.3f} against the base itself, which is not trained to the end (see the "
        f"control below). Of {found.prompts} needles hidden beyond the native window, YaRN finds "
        f"{retrieved['yarn']:.0%}, the tuned model {retrieved['tuned']:.0%}, the base {retrieved['none']:.0%}."
    )
    return "\n\n".join([
        table(found.like, found.edges),
        f"On {len(found.unlike.excerpts)} excerpts of other authors and genres (`data/sample/unlike.jsonl.gz`):",
        table(found.unlike, found.edges),
        _filled(text),
    ])  # fmt: skip


def _apart(one: CompareRow, other: CompareRow) -> str:
    gap = one.longest - other.longest
    return f"{abs(gap):.3f} {'below' if gap < 0 else 'above'}"


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"results": results, "models": models, "verify": verified, "walk": walk},
    "recipes/README.md": {"tiny-demo": demo_tables},
}
"""Page -> name of a block -> its text."""


def block(text: str, name: str) -> re.Match[str]:
    """The place of a block in a page: the line before it, its text, the line after it."""
    found = re.search(rf"(<!-- {name}: [^\n]*-->\n)(.*?)(\n<!-- /{name} -->)", text, re.S)
    assert found, name
    return found


def source() -> str:
    """A digest of the results in the picture, which the PNG holds as its `Source`."""
    files = [(RESULTS / name).read_bytes() for name in DEMO.values()]
    return hashlib.sha256(b"".join(files)).hexdigest()


def draw() -> None:
    """Draw the README's picture."""
    records = load_records(RESULTS / DEMO["retrieval.json"])
    plot_summary(demo(), {name: record.retrieval for name, record in records.items()}, PICTURE, source())


def main() -> None:
    """Take results, draw, and rewrite the blocks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, help="run folder of the demo")
    parser.add_argument("--walk", action="store_true", help="run the five commands of the README")
    given = parser.parse_args()
    for name, kept in DEMO.items() if given.run else ():
        shutil.copyfile(given.run / name, RESULTS / kept)
    if given.walk:
        with tempfile.TemporaryDirectory() as folder:
            record_walk(Path(folder))
    draw()
    for page, blocks in BLOCKS.items():
        text = (ROOT / page).read_text()
        for name, made in blocks.items():
            place = block(text, name)
            text = text[: place.start()] + f"{place[1]}{made()}{place[3]}" + text[place.end() :]
        (ROOT / page).write_text(text)


if __name__ == "__main__":
    main()
