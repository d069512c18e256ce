"""Needles in prose: does a model find a number it was told, at every depth of prompts of every length?

A prompt is prose in which one sentence (or several, for different words) states a number; its end asks for one of
them. The answer counts when greedy decoding gives exactly its tokens. Lengths and positions are in tokens; a depth is
the share of the prose before the needle, from 0.0 (far from the question) to 1.0 (right before it).
"""

import http.client
import itertools
import json
import math
import random
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data import PLAIN, Prompt, Wording, build_prompt
from ..errors import UserError
from ..models import hidden_states, logit_transform


@torch.no_grad()
def score_transformers(model: PreTrainedModel, prompt: Prompt) -> bool:
    """Whether greedy decoding gives the answer: one forward pass, logits `[answer, vocab]` only."""
    ids = torch.tensor([[*prompt.ids, *prompt.answer_ids[:-1]]], device=model.device)
    hidden = hidden_states(model, ids)[0, -len(prompt.answer_ids) :]
    logits, transform = model.get_output_embeddings()(hidden).float(), logit_transform(model.config)
    # Greedy decoding gives it exactly if each of its tokens is the likeliest after the prompt and those before.
    return bool((transform(logits) if transform else logits).argmax(-1).tolist() == prompt.answer_ids)


def score_server(client_url: str, model_name: str, prompt: Prompt, timeout: float = 600.0) -> bool:
    """Whether an OpenAI-compatible server, sent the prompt's token ids, gives the answer.

    `client_url` is as `http://localhost:8000`, with or without `/v1`; `timeout` is in seconds.

    Raises:
        UserError: if the server cannot be reached, refuses, or answers with something else than a completion.
    """
    url = f"{client_url.rstrip('/').removesuffix('/v1')}/v1/completions"
    wanted = {"model": model_name, "prompt": prompt.ids, "max_tokens": len(prompt.answer_ids), "temperature": 0}
    try:
        request = urllib.request.Request(url, json.dumps(wanted).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return str(json.load(response)["choices"][0]["text"]).strip() == prompt.answer
    except urllib.error.HTTPError as error:
        said = f"status {error.code}: {error.read().decode(errors='replace').strip()[:300]}"
        remedy = f"is {model_name!r} served there, with room for {len(prompt.ids)} tokens and the answer?"
        raise UserError(f"{url}: the server refused ({said}); {remedy}") from error
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
        remedy = "start an OpenAI-compatible server, for example `vllm serve CHECKPOINT`, or correct the address"
        raise UserError(f"{url}: no completion came back ({error!r}); {remedy}") from error


def wilson(right: int, asked: int) -> tuple[float, float, float]:
    """The share of right answers and its Wilson 95% interval `(share, low, high)`; `(nan, 0, 1)` if none was asked."""
    if not asked:
        return float("nan"), 0.0, 1.0
    share, spread = right / asked, 1.959964**2 / asked
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return share, max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Retrieval:
    """What was found on a grid: (length, depth) -> (right, asked)."""

    cells: dict[tuple[int, float], tuple[int, int]]

    def accuracy(self, length: int | None = None, beyond: int | None = None) -> tuple[float, float, float]:
        """Share of right answers with its Wilson 95% interval, `(share, low, high)`, each from 0 to 1.

        Only of prompts of `length` tokens, or longer than `beyond` (whatever the needle's depth), where given.
        """
        lengths = [n for n, _ in self.cells if length in (None, n) and (beyond is None or n > beyond)]
        chosen = [cell for (n, _), cell in self.cells.items() if n in lengths]
        return wilson(sum(right for right, _ in chosen), sum(asked for _, asked in chosen))

    def as_json(self) -> list[dict[str, float]]:
        """One object a cell."""
        return [{"length": n, "depth": d, "right": r, "asked": a} for (n, d), (r, a) in self.cells.items()]

    def shares(self) -> tuple[list[int], list[float], list[list[float]]]:
        """Lengths, depths, and the share right of each depth (row) and length (column), NaN where none was asked."""
        lengths, depths = (sorted(set(axis)) for axis in zip(*self.cells, strict=True))
        rows = [[wilson(*self.cells.get((length, depth), (0, 0)))[0] for length in lengths] for depth in depths]
        return lengths, depths, rows


def grid(
    lengths: list[int], depths: list[float], per_cell: int, keys: int, seed: int
) -> list[tuple[int, float, int, int]]:
    """(length, depth, keys, seed) of every prompt, shortest first; what a cell asks does not depend on the others.

    Raises:
        UserError: if there is nothing to ask.
    """
    if not lengths or not depths or per_cell < 1:
        raise UserError("retrieval: name at least one length and one depth, and at least 1 prompt a cell")
    cells = itertools.product(sorted(set(lengths)), sorted(set(map(float, depths))), range(per_cell))
    return [(n, d, keys, random.Random(f"{seed}/{n}/{d}/{number}").randrange(2**31)) for n, d, number in cells]


def retrieve(
    score: Callable[[Prompt], bool],
    tokenizer: Tokenizer,
    filler: list[int],
    lengths: list[int],
    depths: list[float],
    per_cell: int,
    keys: int = 1,
    seed: int = 0,
    wording: Wording = PLAIN,
    progress: bool = True,
) -> Retrieval:
    """Ask every prompt of a grid: `score` says which are answered; `progress` shows a bar on stderr.

    `filler` is as `build_prompt` takes it.

    Raises:
        UserError: as `grid` and `build_prompt`.
    """
    cells: dict[tuple[int, float], tuple[int, int]] = {}
    asks = grid(lengths, depths, per_cell, keys, seed)
    for length, depth, _, own in tqdm(asks, unit="prompt", file=sys.stderr, disable=not progress):
        right, asked = cells.get((length, depth), (0, 0))
        found = score(build_prompt(tokenizer, filler, length, depth, keys, own, wording))
        cells[length, depth] = (right + found, asked + 1)
    return Retrieval(cells)


def retrieval_table(retrieval: Retrieval) -> str:
    """A Markdown table: a row a depth, a column a length, and the mean with its 95% interval; in %."""
    lengths, depths, shares = retrieval.shares()
    means = map(retrieval.accuracy, lengths)
    rows = [
        ["depth", *map(str, lengths)],
        ["---"] * (len(lengths) + 1),
        *([f"{depth:.0%}", *(f"{share:.0%}" for share in row)] for depth, row in zip(depths, shares, strict=True)),
        ["mean", *(f"{share:.0%} ({100 * low:.0f}-{100 * high:.0f})" for share, low, high in means)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def heat_map(retrieval: Retrieval, path: Path, title: str, native: int | None = None) -> None:
    """Write a PNG: accuracy by prompt length and depth, with a line behind the last length inside `native`."""
    lengths, depths, shares = retrieval.shares()
    figure = Figure(figsize=(2.6 + 0.8 * max(len(lengths), 4), 1.8 + 0.5 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            ink = "white" if share < 0.45 else "black"  # a contrast of 4.3 or more on viridis
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=ink)
    if native is not None:
        axes.axvline(sum(length <= native for length in lengths) - 0.5, color="#D55E00", linewidth=2.5)
        title += f"\norange line: native window, {native} tokens"
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(lengths)), list(map(str, lengths)))
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths])
    axes.set(xlabel="prompt length (tokens)", ylabel="depth of the needle (%)", xlim=(-0.52, len(lengths) - 0.48))
    figure.colorbar(image, label="right answers (%)", format=lambda share, _: f"{100 * share:.0f}")
    figure.savefig(path, dpi=120)
