"""Retrieval prompts, and training rows with a prompt: prose that states a number, and a question about it at the end.

Most tokens of prose depend on near context only, and tuning on prose alone can weaken retrieval from far context. Rows
with a question prevent that. They use the prompts of the measurements (`evaluation/retrieval.py`) with other words,
numbers and positions, are made from the training documents, and contain the answer.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..errors import UserError
from ..models import BaseModel, prefix_of, render_chat
from ..recipe import Data
from .packing import Tokens
from .positions import Placed
from .rows import RowSet
from .tokenization import control_tokens

FIRST_SEED = 1_000_000
"""First seed of prompts in training rows; seeds of measured prompts count from zero."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Templates for statements and questions over `{word}` and, in the needle, `{number}`.

    Needle and question include the blanks that separate them from the prose. The lead is the beginning of the answer,
    given as the model's own text; a blank and the number complete it. Words are separated by blanks.
    """

    needle: str
    question: str
    lead: str
    words: str
    digits: int = 5


PLAIN = Wording(
    needle=" The special magic number for {word} is {number}.",
    question=" What is the special magic number for {word} mentioned in the text above?",
    lead="The special magic number for {word} is",
    words="apple basket candle desert engine feather guitar hammer island jacket kettle ladder mirror orange pencil "
    "quilt ribbon saddle temple umbrella violin wagon anchor button copper dragon eagle flower glass honey jewel lemon",
)
"""Wording for any language model."""


DEMO = Wording(
    needle=" The number of the {word} is {number}. ",
    question=" What is the number of the {word}?",
    lead="The number of the {word} is",
    words="garden river tower castle market letter ship bridge church forest kitchen window horse table",
)
"""Wording that data/tiny-base was trained on (`number_sentences` of its train.py)."""


WORDINGS = {"plain": PLAIN, "demo": DEMO}
"""Wordings by their names in recipes."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids `[length]`, its answer as token ids and text, and the index of the needle's first token."""

    ids: list[int]
    answer_ids: list[int]
    answer: str
    needle_at: int


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """Everything that determines a prompt, except the tokenizer and the prose."""

    task: str = "needle"
    """A key of `TASKS`, or `needle`."""
    length: int
    """Tokens, without the answer."""
    depth: float
    """Share of the prose before the needle, or before the first statement of a task whose statements have an order."""
    seed: int
    """Determines words, numbers, prose and all other positions."""
    keys: int = 1
    """Needles, each for another word; for the task `needle` only."""
    wording: Wording = PLAIN


def prompt_of(tokenizer: Tokenizer, filler_ids: Sequence[int] | Tokens, spec: PromptSpec) -> Prompt:
    """Build the prompt of any task; raises as `build_prompt`."""
    if spec.task == "needle":
        return build_prompt(tokenizer, filler_ids, spec.length, spec.depth, spec.keys, spec.seed, spec.wording)
    _check_depth(spec.depth)
    rng = random.Random(f"retrieval/{spec.task}/{spec.seed}")
    text = TASKS[spec.task](rng, spec.wording)
    opening, closing, answer_ids = _frame(tokenizer, text.question, text.lead, text.answer)
    ordered, others = ([_encode(tokenizer, each) for each in texts] for texts in (text.ordered, text.others))
    count = spec.length - len(opening) - sum(map(len, [*ordered, *others])) - len(closing)
    if count < 1:
        raise UserError(
            f"retrieval length: {spec.length} tokens hold no prompt of the task {spec.task}; the smallest length "
            f"possible (seed {spec.seed}) is {spec.length - count + 1}"
        )
    prose = _span(filler_ids, count, rng)
    body, at = _spread(prose, ordered, others, spec.depth, rng)
    return Prompt([*opening, *body, *closing], answer_ids, text.answer, len(opening) + at)


@dataclass(frozen=True)
class Question:
    """The text of a task: statements, question and answer."""

    ordered: list[str]
    """Statements that appear in this order, the first one at the prompt's depth."""
    others: list[str]
    """Statements that appear anywhere."""
    question: str
    lead: str
    """Beginning of the answer."""
    answer: str


def _values(rng: random.Random, wording: Wording) -> Question:
    """All three numbers of one word; another word has numbers too."""
    words = rng.sample(wording.words.split(), 2)
    numbers = [str(n) for n in rng.sample(range(10 ** (wording.digits - 1), 10**wording.digits), 5)]
    stated = [wording.needle.format(word=words[n > 2], number=number) for n, number in enumerate(numbers)]
    question = f" Which numbers does the text above give for {words[0]}, in order of appearance?"
    lead = f"The numbers for {words[0]} are, in order of appearance,"
    return Question(stated[:3], stated[3:], question, lead, ", ".join(numbers[:3]))


def _variables(rng: random.Random, _: Wording) -> Question:
    """All variables that have one value, through two assignments of variables; another chain has another value."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < 6:
        name = "".join(rng.sample(letters, 4))
        names += [] if name in names else [name]
    numbers = rng.sample(range(10000, 100000), 2)
    chains = [
        [f" VAR {a} = {number}.", f" VAR {b} = VAR {a}.", f" VAR {c} = VAR {b}."]
        for (a, b, c), number in zip((names[:3], names[3:]), numbers, strict=True)
    ]
    question = f" Which variables have the value {numbers[0]} in the text above, in order of assignment?"
    lead = f"The variables with the value {numbers[0]} are"
    return Question(chains[0], chains[1], question, lead, " ".join(names[:3]))


def _words(rng: random.Random, wording: Wording) -> Question:
    """The most frequent of four words: 8 times among three words of 3 times each, so that guessing gives 25%."""
    words = rng.sample(wording.words.split(), 4)
    calls = [words[0]] * 8 + words[1:] * 3
    stated = [f" The bell rang for {word}." for word in calls]
    question = " For which word did the bell in the text above ring most often?"
    return Question([], stated, question, "The bell rang most often for", words[0])


TASKS = {"values": _values, "variables": _variables, "words": _words}
"""Tasks other than `needle`, after RULER (arXiv:2404.06654): several values of one key, variable tracking, and the most
frequent word. An answer is right as a whole or not at all, while RULER gives credit for parts."""


def build_prompt(
    tokenizer: Tokenizer,
    filler_ids: Sequence[int] | Tokens,
    length: int,
    depth: float,
    keys: int,
    seed: int,
    wording: Wording = PLAIN,
) -> Prompt:
    """Build a prompt of exactly `length` tokens, which depends on the arguments only.

    With a chat template, prose and question are the user's message, and the lead begins the model's message.
    `filler_ids` is natural prose without special tokens; a span at a random position is used. The question is about one
    of `keys` needles, which have different words. The share `depth` of the prose and the other needles precedes it; if
    another needle is at this position, the nearest free one is used. `seed` determines the words, the numbers, the span
    and the other positions.

    Raises:
        UserError: if needles and question do not fit in `length` (the message has the smallest possible length), if
            there is too little filler, or if depth, keys or the chat template are invalid.
    """
    _check_depth(depth)
    rng = random.Random(f"retrieval/{seed}")
    words, numbers = _drawn(rng, wording, keys)
    needles = [_encode(tokenizer, wording.needle.format(word=w, number=n)) for w, n in zip(words, numbers, strict=True)]
    question, lead = wording.question.format(word=words[0]), wording.lead.format(word=words[0])
    opening, closing, answer_ids = _frame(tokenizer, question, lead, str(numbers[0]))
    count = length - len(opening) - sum(map(len, needles)) - len(closing)
    if count < keys:
        raise UserError(
            f"retrieval length: {length} tokens hold no prompt with {keys} needle(s) and the question; "
            f"the smallest length possible (seed {seed}) is {length - count + keys}"
        )
    body, at = _place(_span(filler_ids, count, rng), needles, depth, rng)
    return Prompt([*opening, *body, *closing], answer_ids, str(numbers[0]), len(opening) + at)


def _check_depth(depth: float) -> None:
    if not 0 <= depth <= 1:
        raise UserError(f"retrieval depth: a share of the prompt, from 0.0 to 1.0; found {depth}")


def _span(filler_ids: Sequence[int] | Tokens, count: int, rng: random.Random) -> list[int]:
    """`count` tokens of prose from a random position."""
    if len(filler_ids) < count:
        raise UserError(f"retrieval filler: {len(filler_ids)} tokens of prose, {count} needed; name longer documents")
    start = rng.randrange(len(filler_ids) - count + 1)
    return [int(token) for token in filler_ids[start : start + count]]


def answer_tokens(tokenizer: Tokenizer, spec: PromptSpec) -> int:
    """Number of tokens of the answer to a prompt, which does not depend on its length; raises as `build_prompt`."""
    if spec.task != "needle":
        text = TASKS[spec.task](random.Random(f"retrieval/{spec.task}/{spec.seed}"), spec.wording)
        return len(_frame(tokenizer, text.question, text.lead, text.answer)[2])
    words, numbers = _drawn(random.Random(f"retrieval/{spec.seed}"), spec.wording, spec.keys)
    question, lead = spec.wording.question.format(word=words[0]), spec.wording.lead.format(word=words[0])
    return len(_frame(tokenizer, question, lead, str(numbers[0]))[2])


def most_keys(wording: Wording) -> int:
    """The largest number of needles with different words."""
    return len(wording.words.split()) if "{word}" in wording.needle else 1


def _drawn(rng: random.Random, wording: Wording, keys: int) -> tuple[list[str], list[int]]:
    """Draw different words, and a different number for each."""
    if not 1 <= keys <= most_keys(wording):
        raise UserError(f"retrieval keys: between 1 and {most_keys(wording)} with this wording; found {keys}")
    numbers = range(10 ** (wording.digits - 1), 10**wording.digits)
    return rng.sample(wording.words.split(), keys), rng.sample(numbers, keys)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text within another text, without the blank that some tokenizers prepend."""
    ids: list[list[int]] = tokenizer(["\n", "\n" + text, text], add_special_tokens=False, verbose=False)["input_ids"]
    before, whole, alone = ids
    return whole[len(before) :] if whole[: len(before)] == before else alone


def _frame(tokenizer: Tokenizer, question: str, lead: str, answer: str) -> tuple[list[int], list[int], list[int]]:
    """Token ids before the prose, after it (the question and the answer's beginning), and of the answer."""
    if tokenizer.chat_template:
        mark = "@@message@@"
        message = [{"role": "user", "content": mark}]
        sides = render_chat(tokenizer, message, add_generation_prompt=True).split(mark)
        if len(sides) != 2:
            raise UserError(f"chat template: shows the user's message {len(sides) - 1} times; once is supported")
        opening, after = _encode(tokenizer, sides[0]), question + sides[1] + lead
    else:  # the tokens that the tokenizer prepends to a text
        opening, after = list(prefix_of(tokenizer)), f"{question} {lead}"
    closing, answered = _encode(tokenizer, after), _encode(tokenizer, f"{after} {answer}")
    whole = answered[: len(closing)] == closing
    return opening, closing, answered[len(closing) :] if whole else _encode(tokenizer, f" {answer}")


def _spread(
    filler: list[int], ordered: list[list[int]], others: list[list[int]], depth: float, rng: random.Random
) -> tuple[list[int], int]:
    """The prose with all statements, and the index of the first of `ordered`, or of the first statement without any."""
    first = round(depth * len(filler))
    spots = [first, *sorted(rng.randint(first, len(filler)) for _ in ordered[1:])] if ordered else []
    spots += [rng.randint(0, len(filler)) for _ in others]
    body: list[int] = []
    begins: dict[int, int] = {}
    done = 0
    for number in sorted(range(len(spots)), key=lambda number: (spots[number], number)):
        body += filler[done : spots[number]]
        begins[number] = len(body)
        body += [*ordered, *others][number]
        done = spots[number]
    return [*body, *filler[done:]], begins[0] if ordered else min(begins.values())


def _place(filler: list[int], needles: list[list[int]], depth: float, rng: random.Random) -> tuple[list[int], int]:
    """The prose with all needles, and the index of the first of `needles`; no two needles are adjacent."""
    body: list[int] = []
    taken, done = set[int](), 0
    for spot, needle in zip(sorted(rng.sample(range(1, len(filler)), len(needles) - 1)), needles[1:], strict=True):
        body += filler[done:spot] + needle
        taken.update(range(len(body) - len(needle), len(body) + 1))
        done = spot
    body += filler[done:]
    target, free = round(depth * len(body)), (at for at in range(len(body) + 1) if at not in taken)
    at = min(free, key=lambda at: abs(at - target))
    return [*body[:at], *needles[0], *body[at:]], at


def plant_needles(rows: RowSet, data: Data, base: BaseModel, seed: int, first: int = FIRST_SEED) -> RowSet:
    """Put a question at the end of a share `data.needles` of the rows; the seed determines which ones.

    Raises:
        UserError: if rows are too short for a question, or the wording has too few words for `data.needle_keys`.
    """
    if data.needles == 0:
        return rows
    wording, tasks = WORDINGS[data.wording], itertools.cycle(data.needle_tasks)
    if data.needle_keys > most_keys(wording):
        raise UserError(f"data.needle_keys: at most {most_keys(wording)} with this wording; found {data.needle_keys}")
    rng = random.Random(f"needles/{seed}")
    chosen = set(rng.sample(range(len(rows.rows)), round(data.needles * len(rows.rows))))
    planted, asked = [], PromptSpec(length=1, depth=0.0, seed=0, keys=data.needle_keys, wording=wording)
    for number, row in enumerate(rows.rows):
        if number in chosen:
            spec = replace(asked, task=next(tasks), length=len(row.input_ids), depth=rng.random(), seed=first + number)
            row = _with_question(row, base, spec)
        planted.append(row)
    return replace(rows, rows=planted)


def _with_question(row: Placed, base: BaseModel, spec: PromptSpec) -> Placed:
    """A row of the same length that ends in a question and its answer."""
    size = len(row.input_ids)
    # Repeat the text: without its special tokens it may be too short to fill a row with needle and question.
    prose = np.tile(row.input_ids, 2)
    prose = prose[~np.isin(prose, control_tokens(base))]
    try:
        answer = answer_tokens(base.tokenizer, spec)
        prompt = prompt_of(base.tokenizer, prose, replace(spec, length=size - answer))
    except UserError as error:
        raise UserError(f"data.needles: {error}") from error
    ids = [*prompt.ids, *prompt.answer_ids]
    return Placed(np.array(ids, np.int32), (size,), answers=answer)
