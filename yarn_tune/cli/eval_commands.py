"""The commands that measure any checkpoint, made by yarn_tune or not.

Packages are imported inside the functions, after the arguments are checked, so that a user error needs no import of
torch.
"""

import argparse
import json
import math
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import (
    check_documents,
    check_model,
    check_picture,
    check_revision,
    check_tokenizer,
    is_adapter_folder,
    numbers_of,
    tell_other_revision,
)
from .result import CommandResult

if TYPE_CHECKING:
    from ..models import BaseModel
    from ..tunable import Learned


def eval_command(options: argparse.Namespace) -> CommandResult:
    """Measure the NLL of a checkpoint, or of an adapter on its base, by position."""
    window, stride = _windows(options)
    adapter = is_adapter_folder(options.checkpoint)
    if adapter:
        check_documents("documents", options.documents)
    else:
        _check(options)

    from ..data import heldout_excerpts
    from ..evaluation import Method, NllSum, bucket_edges, by_position, full_nll, slid_nll
    from ..models import BaseModel, to_device
    from ..recipe import Base, Data, Eval

    tuned = _adapted(options) if adapter else None
    base = (
        tuned[0] if tuned else BaseModel(Base(model=options.checkpoint, revision=options.revision, dtype=options.dtype))
    )
    _warn_beyond_window(base, "--length", options.length, tuned[1].window if tuned else None)
    data = Data(train=[], heldout=options.documents)
    excerpts = heldout_excerpts(data, base, options.length, options.count, beginnings=True)
    model = to_device(base.load())
    with Method.of(tuned[1]).on(model) if tuned else nullcontext():
        if options.protocol == "sliding":
            documents = [slid_nll(model, ids, window, stride, base.prefix) for _, ids in excerpts]
        else:
            documents = [full_nll(model, ids, options.chunk) for _, ids in excerpts]
    buckets = Eval().buckets
    edges = bucket_edges(options.length, buckets)
    sums = [NllSum(0.0, 0)] * buckets
    for nll in documents:
        sums = [a + b for a, b in zip(sums, by_position(nll, edges), strict=True)]
    total = sum(sums, NllSum(0.0, 0))
    mean = total.mean
    lines = [f"{a:>8} to {b - 1:<8} {n.mean:.4f}" for a, b, n in zip(edges, edges[1:], sums, strict=False)]
    summary = f"mean NLL {mean:.4f}, PPL {math.exp(mean):.4f} ({options.protocol}, over {total.count} tokens)"
    text = "\n".join(["position             NLL, nats per token", *lines, summary])
    value = {"edges": edges, "nll": [n.mean for n in sums], "mean": mean, "ppl": math.exp(mean), "tokens": total.count}
    following = shlex.join(["yarn-tune", "retrieve", options.checkpoint, *options.documents])
    following += f" --lengths {options.length}"
    return CommandResult(text, value, f"yarn-tune export {options.checkpoint}" if tuned else following)


def _adapted(options: argparse.Namespace) -> tuple["BaseModel", "Learned"]:
    """The base of an adapter in the recorded revision or in that of --revision, and what was learned on it.

    Raises:
        UserError: if it is no adapter of yarn_tune, its numbers are damaged, or its base is not there.
    """
    from ..adapter import read_sections
    from ..models import BaseModel
    from ..runs import AdapterRun, learned_of

    folder = Path(options.checkpoint)
    sections = read_sections(folder)
    check_model("base.model", sections.base.model, sections.base.prepare)
    check_revision(sections.base.model, options.revision)
    used = replace(sections.base, revision=options.revision or sections.base.revision)
    tell_other_revision(folder, sections.base, used)
    sections = replace(sections, base=used)
    return BaseModel(replace(sections.base, dtype=options.dtype)), learned_of(AdapterRun(sections, folder))


def _warn_beyond_window(base: "BaseModel", flag: str, length: int, served: int | None = None) -> None:
    """Warn on stderr if a length is beyond the window that a checkpoint's config serves, or an adapter's `served`."""
    try:
        window = served or base.facts.native
    except UserError:  # a model without RoPE can be measured too
        window = getattr(base.text_config, "max_position_embeddings", length)
    if length > window:
        print(
            f"yarn-tune: WARNING: {flag} {length} is beyond the window of {base.source.model}, {window} tokens; the "
            "numbers are those of a model outside of its window",
            file=sys.stderr,
        )


def _wording_of(checkpoint: Path) -> str:
    """The wording that an export's run uses to measure, else to train; `plain` for other checkpoints."""
    if not (checkpoint.name == "export" and (checkpoint.parent / "recipe.yaml").is_file()):
        return "plain"
    from ..recipe import load_recipe

    recipe = load_recipe(checkpoint.parent / "recipe.yaml")
    return recipe.eval.retrieval.wording if recipe.eval.retrieval else recipe.data.wording


def _check(options: argparse.Namespace) -> None:
    """Check the checkpoint and the documents of a command."""
    check_model("CHECKPOINT", options.checkpoint)
    check_revision(options.checkpoint, options.revision)
    check_tokenizer("CHECKPOINT", options.checkpoint)
    check_documents("documents", options.documents)


def _windows(options: argparse.Namespace) -> tuple[int, int]:
    """Return the tokens per window and the tokens scored per window of `eval --protocol sliding`.

    Raises:
        UserError: if a number is impossible, or belongs to the other protocol.
    """
    for flag, least in (("length", 2), ("count", 1), ("chunk", 1)):
        number = getattr(options, flag)
        if number is not None and number < least:
            raise UserError(f"--{flag}: at least {least}; found {number}")
    flags = ", ".join(f"--{flag}" for flag in ("window", "stride") if getattr(options, flag) is not None)
    if options.protocol != "sliding" and flags:
        raise UserError(f"{flags}: only --protocol sliding has windows; add it, or leave {flags} out")
    window = max(2, options.length // 4) if options.window is None else options.window
    stride = min(256, window // 2) if options.stride is None else options.stride
    if not 2 <= window <= options.length or not 1 <= stride < window:
        raise UserError(
            f"--window, --stride: 2 <= window <= {options.length} and 1 <= stride < window; found {window} and {stride}"
        )
    return window, stride


def retrieve_command(options: argparse.Namespace) -> CommandResult:
    """Measure the retrieval of numbers hidden in documents."""
    lengths = numbers_of("--lengths", options.lengths, int)
    depths = numbers_of("--depths", options.depths, float)
    _check(options)
    if options.picture:
        check_picture("--picture", Path(options.picture))

    from functools import partial

    from ..data import WORDINGS, heldout_tokens
    from ..evaluation import RetrievalGrid, retrieval_table, retrieve, score_server, score_transformers
    from ..models import BaseModel, to_device
    from ..recipe import Base, Data
    from ..report import heat_map

    base = BaseModel(Base(model=options.checkpoint, revision=options.revision, dtype=options.dtype))
    _warn_beyond_window(base, "--lengths", max(lengths))
    wording = options.wording or _wording_of(Path(options.checkpoint))
    filler = heldout_tokens(Data(train=[], heldout=options.documents), base).tolist()
    if options.engine == "vllm":
        score = partial(score_server, options.url, options.served_name or options.checkpoint)
    else:
        score = partial(score_transformers, to_device(base.load()))
    tasks = tuple(options.tasks.split(","))
    grid = RetrievalGrid(lengths, depths, options.per_cell, options.keys, WORDINGS[wording], tasks=tasks)
    found = retrieve(score, base.tokenizer, filler, grid)
    picture = partial(heat_map, found, Path(options.picture or ""), f"Retrieval: {options.checkpoint}")
    share, low, high = found.accuracy()
    summary = f"found {share:.1%} of all needles (95% interval {low:.1%} to {high:.1%}; wording: {wording})"
    text = f"{retrieval_table(found)}\n\n{summary}"
    value = {"wording": wording, "accuracy": share, "interval": [low, high], "cells": asdict(found)["cells"]}
    following = f"yarn-tune lm-eval {options.checkpoint}"
    return CommandResult(text, value, following, afterwards=picture if options.picture else None)


def lm_eval_command(options: argparse.Namespace) -> CommandResult:
    """Print the commands that run lm-evaluation-harness."""
    check_model("CHECKPOINT", options.checkpoint)

    from ..models import config_json, needs_own_auto_class, text_section

    config = config_json(options.checkpoint)
    window = text_section(config).get("max_position_embeddings")
    if window is None:
        raise UserError(f"{options.checkpoint}: its config has no max_position_embeddings, so its window is unknown")
    metadata = json.dumps({"max_seq_lengths": [window]})
    common = f"--tasks {options.tasks} --metadata '{metadata}' --batch_size 1"
    path = options.checkpoint
    # lm-eval's hf loads AutoModelForCausalLM; hf-multimodal answers tasks without images as hf does.
    reader = "hf-multimodal" if needs_own_auto_class(config.get("model_type", "")) else "hf"
    lines = [
        f"lm_eval --model {reader} --model_args pretrained={path},max_length={window},dtype=bfloat16 {common}",
        f"lm_eval --model vllm --model_args pretrained={path},max_model_len={window},dtype=bfloat16 {common}",
    ]
    return CommandResult("\n".join(lines), {"commands": lines}, "pip install 'lm-eval[hf,ruler]', then one of these")
