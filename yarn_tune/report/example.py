"""One question about a number hidden in a long held-out document, with the answers of base, YaRN and tuned model."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from html import escape

from ..data import grid_lengths, heldout_tokens, prompt_of
from ..errors import UserError
from ..evaluation import Method, RetrievalGrid, greedy_answer, search_free_methods
from ..files import read_checked, write_checked
from ..models import to_device
from ..runs import Run, TunedRow
from ..tunable import Start
from .summary_picture import NAMES

FILE = "example.json"
"""Name of the file in a run folder with the example."""
AROUND, BEFORE_QUESTION = 40, 60
"""Tokens shown on either side of the hidden number's sentence, and at the end of the prompt."""


@dataclass(frozen=True)
class Example:
    """A question about a hidden number, and what each model answers."""

    key: str
    """A hash of everything that the answers depend on."""
    tokens: int
    """Length of the prompt."""
    depth: float
    """Share of the prompt before the number."""
    prose: str
    """The text around the number."""
    question: str
    """The end of the prompt."""
    answer: str
    given: dict[str, str]
    """Method -> its answer."""


def example_of(run: Run, tuned: TunedRow) -> Example | None:
    """The example of a run, from its folder or made now and kept there; None where the recipe measures no needles.

    The prompt is chosen before anything is measured: of the prompts of `eval.retrieval` the first of the greatest
    length at the middle depth. Answers are decoded greedily, as many tokens as the right answer has.

    Raises:
        UserError: if the base or the held-out documents cannot be read.
    """
    settings, start = run.recipe.eval.retrieval, Start.of(run.base.facts, run.recipe.rope)
    if settings is None:
        return None
    grid = RetrievalGrid.of(settings, grid_lengths(settings, start.native, start.window))
    longest = [spec for spec in grid.specs() if spec.length == max(grid.lengths) and spec.task == grid.tasks[0]]
    depths = sorted({spec.depth for spec in longest})
    spec = next(spec for spec in longest if spec.depth == depths[len(depths) // 2])
    methods = search_free_methods(start, ()) | {"tuned": Method.of(tuned.learned)}
    prompt = prompt_of(run.base.tokenizer, heldout_tokens(run.recipe.data, run.base).tolist(), spec)
    facts = [run.base.digest, prompt.ids, *(method.key(spec.length) for method in methods.values())]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = run.folder / FILE
    try:
        kept = Example(**{name: value for name, value in read_checked(path, "").items() if name != "sha256"})
        if kept.key == key:
            return kept
    except (UserError, TypeError):
        pass
    model, given = to_device(run.base.load()), {}
    for name, method in methods.items():
        with method.on(model, spec.length):
            given[name] = _text(run, greedy_answer(model, prompt)).strip()
    at = prompt.needle_at
    example = Example(
        key=key,
        tokens=spec.length,
        depth=spec.depth,
        prose=_text(run, prompt.ids[max(0, at - AROUND) : at + 2 * AROUND]),
        question=_text(run, prompt.ids[-BEFORE_QUESTION:]),
        answer=prompt.answer,
        given=given,
    )
    write_checked(path, asdict(example))
    return example


def _text(run: Run, ids: list[int]) -> str:
    text = run.base.tokenizer.decode(ids)
    assert isinstance(text, str)
    return text


def example_or_note(run: Run, tuned: TunedRow) -> Example | None:
    """The example of a run; where it cannot be made, None and a note on stderr."""
    try:
        return example_of(run, tuned)
    except UserError as error:
        print(f"yarn-tune: the report shows no question with its answers: {error}", file=sys.stderr)
        return None


def example_html(example: Example) -> str:
    """The example as a section of the page, the hidden number in bold."""
    prose = escape(example.prose).replace(escape(example.answer), f"<b>{escape(example.answer)}</b>")
    rows = "".join(
        f'<tr><td>{escape(NAMES.get(name, name))}</td><td class="answer">{escape(given)}</td>'
        f"<td>{'right' if given == example.answer else 'wrong'}</td></tr>"
        for name, given in example.given.items()
    )
    return (
        "<h2>A question about a long text</h2>"
        f'<p class="note">A prompt of {example.tokens:,} tokens from the held-out documents, a number hidden at '
        f"{example.depth:.0%} of it. It is one of the prompts above, chosen before measuring: the first of the "
        "greatest length at the middle depth. Answers are decoded greedily.</p>"
        f"<blockquote>… {prose} …</blockquote><blockquote>… {escape(example.question)}</blockquote>"
        f"<table><tr><th>model</th><th>answer (right: {escape(example.answer)})</th><th></th></tr>{rows}</table>"
    )
