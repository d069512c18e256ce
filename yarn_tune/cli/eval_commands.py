"""Commands that measure any checkpoint, whoever made it; as in `commands.py`, imports are inside the functions."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError

Result = tuple[str, dict[str, Any]]
"""What a command prints: text for people, and the object for `--json`. A false `passed` in it is exit code 3."""


def numbers_of(place: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """A list of numbers from the command line.

    Raises:
        UserError: if it is none, or a number is infinite or NaN.
    """
    try:
        numbers = [kind(word) for word in text.split(",")]
        if all(map(math.isfinite, numbers)):
            return numbers
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{place}: numbers with commas between them, as in 2,4,8; found {text!r}")


def eval_command(options: argparse.Namespace) -> Result:
    """NLL of a checkpoint by position."""
    from ..data import heldout_excerpts
    from ..evaluation import NllSum, bucket_edges, by_position, full_nats, slid_nats
    from ..models import BaseModel, to_device
    from ..recipe import Base, Data, Eval

    window, stride = _windows(options)
    base = BaseModel(Base(model=options.checkpoint, dtype=options.dtype))
    data = Data(train=[], heldout=options.documents)
    excerpts = heldout_excerpts(data, base, options.length, options.count)
    model = to_device(base.load())
    if options.protocol == "sliding":
        documents = [slid_nats(model, ids, window, stride, base.prefix) for _, ids in excerpts]
    else:
        documents = [full_nats(model, ids, options.chunk) for _, ids in excerpts]
    buckets = Eval().buckets
    edges = bucket_edges(options.length, buckets)
    sums = [NllSum(0.0, 0)] * buckets
    for nats in documents:
        sums = [a + b for a, b in zip(sums, by_position(nats, edges), strict=True)]
    total = sum(sums, NllSum(0.0, 0))
    mean, how = total.mean, f"over {total.count} tokens"
    lines = [f"{a:>8} to {b - 1:<8} {n.mean:.4f}" for a, b, n in zip(edges, edges[1:], sums, strict=False)]
    text = "\n".join([*lines, f"mean {mean:.4f} nats per token, PPL {math.exp(mean):.4f} ({options.protocol}, {how})"])
    value = {"edges": edges, "nll": [n.mean for n in sums], "mean": mean, "ppl": math.exp(mean), "tokens": total.count}
    return text, value


def _windows(options: argparse.Namespace) -> tuple[int, int]:
    """Tokens of a window, and scored a window, of `eval --protocol sliding`.

    Raises:
        UserError: if a number of the command is impossible, or is of the other protocol.
    """
    for flag, least in (("length", 2), ("count", 1), ("chunk", 1)):
        number = getattr(options, flag)
        if number is not None and number < least:
            raise UserError(f"--{flag}: at least {least}; found {number}")
    flags = ", ".join(f"--{flag}" for flag in ("window", "stride") if getattr(options, flag) is not None)
    if options.protocol != "sliding" and flags:
        raise UserError(f"{flags}: of windows, which --protocol {options.protocol} has none of; add --protocol sliding")
    window = max(2, options.length // 4) if options.window is None else options.window
    stride = min(256, window // 2) if options.stride is None else options.stride
    if not 2 <= window <= options.length or not 1 <= stride < window:
        raise UserError(
            f"--window, --stride: 2 <= window <= {options.length} and 1 <= stride < window; found {window} and {stride}"
        )
    return window, stride


def retrieve_command(options: argparse.Namespace) -> Result:
    """Ask for numbers hidden in documents."""
    from functools import partial

    from ..data import WORDINGS, heldout_tokens
    from ..evaluation import heat_map, retrieval_table, retrieve, score_server, score_transformers
    from ..models import BaseModel, to_device
    from ..recipe import Base, Data

    lengths = numbers_of("--lengths", options.lengths, int)
    depths = numbers_of("--depths", options.depths, float)
    base = BaseModel(Base(model=options.checkpoint, dtype=options.dtype))
    filler = heldout_tokens(Data(train=[], heldout=options.documents), base)
    if options.engine == "vllm":
        score = partial(score_server, options.url, options.served_name or options.checkpoint)
    else:
        score = partial(score_transformers, to_device(base.load()))
    wording = WORDINGS[options.wording]
    found = retrieve(score, base.tokenizer, filler, lengths, depths, options.per_cell, options.keys, 0, wording)
    if options.picture:
        heat_map(found, Path(options.picture), f"Retrieval: {options.checkpoint}")
    share, low, high = found.accuracy()
    text = f"{retrieval_table(found)}\n\nin all {share:.1%} (95% interval {low:.1%} to {high:.1%})"
    return text, {"accuracy": share, "interval": [low, high], "cells": found.as_json()}


def lm_eval_command(options: argparse.Namespace) -> Result:
    """Print the commands for lm-evaluation-harness."""
    from ..models import config_json

    window = config_json(options.checkpoint).get("max_position_embeddings")
    if window is None:
        raise UserError(f"{options.checkpoint}: its config has no max_position_embeddings, so its window is unknown")
    metadata = json.dumps({"max_seq_lengths": [window]})
    common = f"--tasks {options.tasks} --metadata '{metadata}' --batch_size 1"
    path = options.checkpoint
    lines = [
        f"lm_eval --model hf --model_args pretrained={path},max_length={window},dtype=bfloat16 {common}",
        f"lm_eval --model vllm --model_args pretrained={path},max_model_len={window},dtype=bfloat16 {common}",
    ]
    return "\n".join(["pip install 'lm-eval[hf,ruler]'", *lines]), {"commands": lines}
