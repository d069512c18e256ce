"""Measure the peak memory of a training step by row length, and compare it with the prediction of `yarn-tune plan`.

    python benchmarks/memory.py
    python benchmarks/memory.py --append --tokens 32768 --dtypes float32 --ways checkpointing tiled

The model is a random Llama of four layers (width 256, four query and two key heads of 64, MLP 768, vocabulary 4096).
Every cell runs in its own process and measures the peak resident memory of a step, above that of the loaded model
after a step of 256 tokens. The allocator is set to return memory at once, so that freed memory does not count. On a GPU
the allocated memory is measured. The prediction is in yarn_tune/planning/memory.py.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from yarn_tune.distributed import checkpoint_layers, tile_mlps
from yarn_tune.models import rope_facts, to_device
from yarn_tune.planning import Shape, step_memory
from yarn_tune.recipe import Recipe, Rope, parse_recipe
from yarn_tune.training import Objective, ObjectiveConfig
from yarn_tune.tunable import Start, adjustments_for, attach, lora_size

WAYS: dict[str, list[str]] = {
    "kept": ["train.gradient_checkpointing=false"],
    "checkpointing": [],
    "attention kept": ["train.keep_attention=true"],
    "tiled": ["train.tiled_mlp=1024"],
    "LoRA": ["train.gradient_checkpointing=false", "lora.rank=8"],
    "LoRA, checkpointing": ["lora.rank=8"],
}


def config() -> LlamaConfig:
    """The config of the model."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
        max_position_embeddings=2048,
    )


def recipe_of(way: str, tokens: int, dtype: str) -> Recipe:
    """The recipe of a run that reads rows of `tokens` tokens in this way."""
    tree = {
        "name": "memory",
        "base": {"model": "random", "dtype": dtype},
        "rope": {"window": tokens, "native": 2048, "query_gains": "pair_phase"},
        "data": {"train": ["a"], "heldout": ["b"]},
    }
    return parse_recipe(tree, WAYS[way])


def main() -> None:
    """Measure every cell and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--append", action="store_true", help="keep earlier measurements in the file")
    parser.add_argument("--cell", nargs=3, metavar=("WAY", "TOKENS", "DTYPE"), help="one cell, in this process")
    options = parser.parse_args()
    if options.cell:
        way, tokens, dtype = options.cell
        print(json.dumps({"mib": cell(recipe_of(way, int(tokens), dtype))}))
        return
    path = options.out / "memory.json"
    found = json.loads(path.read_text()) if options.append else []
    found += [measured(way, n, dtype) for dtype in options.dtypes for n in options.tokens for way in options.ways]
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def measured(way: str, tokens: int, dtype: str) -> dict[str, object]:
    """Measure one cell in its own process, and predict it."""
    done = subprocess.run(
        [sys.executable, __file__, "--cell", way, str(tokens), dtype],
        env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    mib = json.loads(done.stdout.splitlines()[-1])["mib"]
    predicted = predicted_mib(way, tokens, dtype)
    print(f"{dtype} {way} {tokens}: {mib:.1f} MiB, predicted {predicted:.1f}", file=sys.stderr)
    return {"way": way, "tokens": tokens, "dtype": dtype, "mib": mib, "predicted": round(predicted, 1)}


def predicted_mib(way: str, tokens: int, dtype: str) -> float:
    """The prediction of `yarn-tune plan`, in MiB."""
    recipe = recipe_of(way, tokens, dtype)
    return step_memory(recipe, Shape.of(config(), lora_size(config(), recipe.lora)), tokens) / 2**20


def cell(recipe: Recipe) -> float:
    """Peak MiB of a step above the loaded model."""
    torch.manual_seed(0)
    model = to_device(LlamaForCausalLM(config()).to(getattr(torch, recipe.base.dtype)).eval())
    model.config.use_cache = False
    tokens = recipe.rope.window
    start = Start.of(rope_facts(model.config), Rope(window=tokens, native=2048))
    gains = adjustments_for(model.config.to_dict(), recipe.rope)
    rotary = attach(model, start, "per_pair", gains, recipe.lora)
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model, recipe.train.keep_attention)
        model.train()
    if recipe.train.tiled_mlp is not None:
        tile_mlps(model, recipe.train.tiled_mlp)
    objective = Objective(model, rotary, ObjectiveConfig())

    def step(length: int) -> None:
        ids = torch.randint(1, 4096, (1, length + 1), generator=torch.Generator().manual_seed(0)).to(model.device)
        positions = torch.arange(length, device=model.device)[None]
        objective(ids[:, :-1], positions, ids[:, 1:].contiguous())[0].backward()

    step(256)
    base = memory(reset=True)
    step(tokens)
    return round(memory() - base, 1)


def memory(reset: bool = False) -> float:
    """Peak memory so far in MiB; with `reset`, the memory held now, and the peak is reset to it."""
    if torch.accelerator.is_available():
        if reset:
            torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.max_memory_allocated() / 2**20
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
        return int(status["VmRSS"].split()[0]) / 2**10
    return int(status["VmHWM"].split()[0]) / 2**10


def table(found: list[dict[str, object]]) -> str:
    """A Markdown table: KiB per token, and the error of the prediction."""
    at = {(one["dtype"], one["way"], one["tokens"]): one for one in found}
    tokens = list(dict.fromkeys(one["tokens"] for one in found))
    lines = ["| | " + " | ".join(f"{n}" for n in tokens) + " |", "|---" * (1 + len(tokens)) + "|"]
    for dtype, way in dict.fromkeys((one["dtype"], one["way"]) for one in found):
        cells = [at.get((dtype, way, n)) for n in tokens]
        shown = [
            f"{c['mib'] * 1024 / c['tokens']:.1f} ({c['predicted'] / c['mib'] - 1:+.0%})" if c else "" for c in cells
        ]
        lines.append(f"| {dtype}, {way} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
