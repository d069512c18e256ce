"""The parts that time steps: ways to hold activations, the attention kernel, planned memory, torch.compile."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from yarn_tune.distributed import checkpoint_layers, offload_inputs, tile_mlps
from yarn_tune.models import BaseModel, hidden_states, to_device
from yarn_tune.recipe import Base, Rope
from yarn_tune.training import Objective, ObjectiveConfig
from yarn_tune.tunable import Start, adjustments_for, attach

from . import handwritten
from .context import Context, PartSkipped, Results
from .planned import predicted_mib

WAYS = ("forward", "kept", "checkpointing", "attention kept", "tiled MLPs", "offloaded", "hand-written")
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
"""Dense bfloat16 peak by a part of the card's name, from the vendors' data sheets."""


@dataclass
class Step:
    """One way to run a step: call `run` once per repetition."""

    run: Callable[[], None]
    model: Any
    parameters: list[torch.nn.Parameter]


def step_cost(context: Context, results: Results) -> dict[str, Any]:
    """Time of a step in forward passes and memory in prefills, by way and row length."""
    lengths = (256, 512) if context.smoke else (8192, 32768, 65536, 131072)
    cells: dict[str, dict[str, Any]] = {}
    for length in lengths:
        for way in ("prefill", *WAYS):
            if context.left < 20:
                return {"cells": cells, "stopped": f"before {way} at {length} tokens: the time was up"}
            cells[f"{way}, {length}"] = measured(context, way, length)
    return {"cells": cells, "ratios": ratios(cells, lengths)}


def measured(context: Context, way: str, length: int) -> dict[str, Any]:
    """Median seconds and peak memory of one cell; `out_of_memory` if it does not fit."""
    step = made_step(context, way, length)
    try:
        step.run()  # warm-up: kernels are selected and memory is reserved
        synchronize()
        held = allocated()
        times = []
        for _ in range(1 if context.smoke else 3):
            for parameter in step.parameters:
                parameter.grad = None
            started = time.monotonic()
            step.run()
            synchronize()
            times.append(time.monotonic() - started)
        seconds = statistics.median(times)
        found = {"seconds": round(seconds, 4), "tokens_per_second": round(length / seconds)}
        if torch.cuda.is_available():
            found["peak_mib"] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
            found |= share_of_peak(context, way, length, seconds)
        return found
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        del step
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def made_step(context: Context, way: str, length: int) -> Step:
    """One step on a random row of `length` tokens, of a model with all kinds of learned numbers attached."""
    model = loaded(context)
    ids = torch.randint(1, model.config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    if way == "hand-written":
        rotary = handwritten.prepare(model)
        return Step(lambda: handwritten.loss(model, ids).backward(), model, list(rotary.parameters()))
    objective, parameters = attached(context, model, length)
    if way in ("checkpointing", "attention kept", "tiled MLPs", "offloaded"):
        checkpoint_layers(model, way == "attention kept")
        model.train()
    if way == "tiled MLPs":
        tile_mlps(model, min(4096, length))
    if way == "offloaded":
        offload_inputs(model, model.device.type)
    positions = torch.arange(length, device=model.device)[None]

    @torch.no_grad()
    def prefill() -> None:
        hidden_states(model, ids[:, :-1], cache=DynamicCache(config=model.config))

    @torch.no_grad()
    def forward() -> None:
        objective(ids[:, :-1], positions, ids[:, 1:])

    def step() -> None:
        objective(ids[:, :-1], positions, ids[:, 1:].contiguous())[0].backward()

    return Step({"prefill": prefill, "forward": forward}.get(way, step), model, parameters)


def loaded(context: Context) -> Any:
    """The base with stock classes: bfloat16 on a GPU, float32 on a CPU."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return to_device(AutoModelForCausalLM.from_pretrained(context.model, dtype=dtype).eval())


def attached(context: Context, model: Any, length: int) -> tuple[Objective, list[torch.nn.Parameter]]:
    """The objective of a model with factors, temperature, gains and phases attached."""
    base = BaseModel(Base(model=str(context.model)))
    rope = Rope(window=max(length, base.facts.native), query_gains="pair_phase")
    start = Start.of(base.facts, rope)
    rotary = attach(model, start, rope.frequencies, adjustments_for(model.config.to_dict(), rope))
    rotary.to(model.device)
    return Objective(model, rotary, ObjectiveConfig()), rotary.trainable()


def ratios(cells: dict[str, dict[str, Any]], lengths: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Time in forwards and memory in prefills of every way, by length."""
    found: dict[str, dict[str, float]] = {}
    for length in lengths:
        forward, prefill = cells[f"forward, {length}"], cells[f"prefill, {length}"]
        for way in WAYS:
            cell = cells[f"{way}, {length}"]
            if "seconds" in cell and "seconds" in forward:
                found[f"{way}, {length}"] = {"forwards": round(cell["seconds"] / forward["seconds"], 2)}
                if cell.get("peak_mib") and prefill.get("peak_mib"):
                    found[f"{way}, {length}"]["prefills"] = round(cell["peak_mib"] / prefill["peak_mib"], 2)
    return found


def share_of_peak(context: Context, way: str, length: int, seconds: float) -> dict[str, float]:
    """Model operations per second as a share of the card's dense bfloat16 peak.

    A forward pass counts as 2 operations per parameter and token, and 2 x layers x width x tokens^2 for attention. The
    backward pass with frozen weights counts as the same again for the matrices, and 2.5 times for attention.
    """
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    if peak is None:
        return {}
    config = BaseModel(Base(model=str(context.base))).config
    dense = 2 * 134.5e6 * length if "SmolLM2" in str(context.base) else 0.0
    attention = 2 * config.num_hidden_layers * config.hidden_size * length**2
    total = dense + attention if way in ("forward", "prefill") else 2 * dense + 3.5 * attention
    return {"share_of_peak": round(total / seconds / (peak * 1e12), 3)} if dense else {}


def attention_kernel(context: Context, results: Results) -> dict[str, Any]:
    """Which kernels attention ran, and how often a step waits for the device, from the profiler."""
    length = 512 if context.smoke else 8192
    step = made_step(context, "kept", length)
    step.run()
    synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step.run()
        synchronize()
    names = [event.key for event in profile.key_averages()]
    attention = sorted({n for n in names if "attention" in n.lower() or "flash" in n.lower() or "fmha" in n.lower()})
    waits = sum(e.count for e in profile.key_averages() if e.key in ("aten::item", "aten::_local_scalar_dense"))
    return {"kernels": attention, "flash": any("flash" in n.lower() for n in attention), "items_per_step": waits}


def planned_memory(context: Context, results: Results) -> dict[str, Any]:
    """What `plan` predicts beside the allocator's peak of each cell."""
    cells = results.parts.get("cost of a step", {}).get("cells", {})
    if not any("peak_mib" in cell for cell in cells.values()) and not context.smoke:
        raise PartSkipped("no peak memory was measured: it needs a GPU")
    found = {}
    for name, cell in cells.items():
        way, length = name.rsplit(", ", 1)
        predicted = predicted_mib(context, way, int(length))
        if predicted is None:
            continue
        found[name] = {"predicted_mib": round(predicted, 1), "measured_mib": cell.get("peak_mib")}
        if cell.get("peak_mib"):
            found[name]["error"] = round(predicted / cell["peak_mib"] - 1, 3)
    errors = [abs(one["error"]) for one in found.values() if "error" in one]
    return {"cells": found, "largest_error": max(errors, default=None)}


def compiled(context: Context, results: Results) -> dict[str, Any]:
    """A step with `torch.compile` of the decoder layers, and without."""
    length = 256 if context.smoke else 32768
    plain = measured(context, "kept", length)
    if not torch.cuda.is_available():
        return {"plain": plain, "compiled": "not run: it needs a GPU"}
    step = made_step(context, "kept", length)
    for layer in step.model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    started = time.monotonic()
    step.run()
    synchronize()
    first = time.monotonic() - started
    times = []
    for _ in range(3):
        started = time.monotonic()
        step.run()
        synchronize()
        times.append(time.monotonic() - started)
    return {"plain": plain, "compiled": {"seconds": round(statistics.median(times), 4), "first": round(first, 1)}}


def allocated() -> int:
    """Bytes held now; resets the peak."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
