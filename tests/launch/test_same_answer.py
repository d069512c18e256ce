"""However a run is spread over processes, it learns what one process learns from the same rows.

Each is compared with the run of one process, in float32, over three steps: learned values to 1e-5, losses to 1e-6 of
themselves. Values are logs, so this is 1e-5 of the factor or temperature that is served, and phases are in radians; of
LoRA it is the change of the weights, B A: while B is nearly zero, so is the gradient of A, and AdamW makes steps of its
rounding, which no weight shows. Gradient norms are compared too, to 1e-3 (differences of losses are not
more exact): AdamW would hide a gradient of twice the size.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import recipe_tree, save_tiny, tiny_model
from yarn_tune.distributed.sharding import check_parameters, check_weights
from yarn_tune.errors import CheckFailed, UserError
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Rope
from yarn_tune.runs.folder import Run
from yarn_tune.training.loop import train
from yarn_tune.tunable.attachment import attach
from yarn_tune.tunable.lora import PREFIX, factors_of
from yarn_tune.tunable.parameters import Start

WAYS: dict[str, list[str]] = {
    "scale": ["rope.frequencies=scale", "rope.query_gains=layer"],
    "ramp": ["rope.frequencies=ramp", "train.clip=0.001"],
    "frequency": ["rope.frequencies=per_pair", "rope.query_gains=head", "data.needles=0.5"],
    "spectral": ["rope.frequencies=fixed", "rope.query_gains=pair", "train.micro_batch_size=2"],
    "phase": ["rope.frequencies=per_pair", "rope.query_gains=pair_phase", "train.clip=0"],
    "lora": ["lora.rank=2"],
    "lengths": ["rope.query_gains=layer", "data.lengths=[256, 64]"],
    "guarded": ["rope.query_gains=pair_phase", "train.short_context_kl=0.5", "data.lengths=[256, 64]"],
    "decided": ["rope.query_gains=pair", "train.decide=true"],
    "distilled": ["rope.query_gains=pair_phase", "train.objective=distill", "train.gradient_checkpointing=false"],
}
"""Of learning."""
WHOLE = [way for way in WAYS if way not in ("guarded", "distilled")]
"""Those that rows can be split for."""
SPREAD: dict[str, list[str]] = {
    "plain": [],
    "zero-3": ["runtime.zero=3"],
    "zero-3-offload": ["runtime.zero=3", "runtime.offload=cpu"],
    "fsdp": ["runtime.fsdp=true"],
    "sequence": ["runtime.sequence=2"],
    "sequence-zero-3": ["runtime.sequence=2", "runtime.zero=3"],
    "sequence-fsdp": ["runtime.sequence=2", "runtime.fsdp=true"],
}
"""Over processes."""


def two() -> list[tuple[str, str]]:
    """All ways by those that differ in how they work, some by the rest."""
    pairs = [(spread, way) for spread in ("plain", "zero-3") for way in WAYS]
    pairs += [("fsdp", way) for way in ("ramp", "phase", "lora", "guarded", "decided")]
    pairs += [("sequence", way) for way in WHOLE]
    pairs += [(spread, way) for spread in SPREAD for way in ("ramp", "phase") if (spread, way) not in pairs]
    return pairs


def four() -> list[tuple[str, str]]:
    """One way each, so that every spread and every way is there."""
    whole = [way for way in WHOLE if "train.micro_batch_size=2" not in WAYS[way]]
    pairs = [(spread, whole[at % len(whole)]) for at, spread in enumerate(SPREAD)]
    return pairs + [(("zero-3", "fsdp")[at % 2], way) for at, way in enumerate(WAYS) if way not in WHOLE]


class Runs:
    """Trainings of one small model, by one process here or by several of a launch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = save_tiny(folder / "base")

    def recipe(self, settings: list[str], dtype: str) -> dict[str, object]:
        tree = recipe_tree(self.base, self.folder, steps=3, batch_size=4, learning_rate=0.02)
        return parse_recipe(tree, [*settings, f"base.dtype={dtype}", "runtime.threads=1"]).to_dict()

    def alone(self, way: str, dtype: str = "float32") -> Path:
        run = self.folder / f"1-{way}-{dtype}"
        if not run.exists():
            train(Run(parse_recipe(self.recipe(WAYS[way], dtype), []), run))
        return run

    def launch(self, processes: int, pairs: list[tuple[str, str]], dtype: str = "float32") -> dict[str, Path]:
        runs = {f"{spread}/{way}": self.folder / f"{processes}-{spread}-{way}-{dtype}" for spread, way in pairs}
        trainings = [
            [self.recipe([*WAYS[way], *SPREAD[spread]], dtype), str(runs[f"{spread}/{way}"])] for spread, way in pairs
        ]
        done = self.run(processes, trainings)
        assert done.returncode == 0, done.stderr[-4000:]
        return runs

    def run(self, processes: int, *trainings: list[list[object]]) -> subprocess.CompletedProcess[str]:
        """Launch the trainings; where there are several lists, one for each process."""
        files = [self.folder / f"{number}.json" for number in range(len(trainings))]
        for file, own in zip(files, trainings, strict=True):
            file.write_text(json.dumps(own))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.run(
            [*launcher, str(Path(__file__).with_name("trainings.py")), *map(str, files)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | self.stale_lock(),
            capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip

    def stale_lock(self) -> dict[str, str]:
        """What a DeepSpeed run that was killed while compiling leaves: the next one to compile would wait for ever."""
        lock = self.folder / "extensions" / "deepspeed_shm_comm" / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        return {"TORCH_EXTENSIONS_DIR": str(lock.parents[1])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def served(numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Offsets, and what LoRA adds to each weight."""
    offsets = {name: tensor for name, tensor in numbers.items() if not name.startswith(PREFIX)}
    return offsets | {weight: b @ a for weight, (b, a) in (factors_of(numbers) or {}).items()}


def furthest(one: Path, other: Path) -> tuple[float, float, float]:
    """Largest difference of any learned value; of any loss over the loss; of any gradient norm over the norm."""
    values, wanted = (served(load_file(run / "learned.safetensors")) for run in (one, other))
    assert values.keys() == wanted.keys()
    apart = max((values[name] - wanted[name]).abs().max().item() for name in wanted)
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (one, other)]

    def ratio(what: str) -> float:
        return max(abs(a[what] / b[what] - 1) for a, b in zip(*logs, strict=True))

    return apart, ratio("loss"), ratio("gradient_norm")


def same_decision(one: Path, other: Path) -> bool:
    """Whether the same candidate was kept, from the same losses of every candidate on every row, to 1e-5."""
    candidates = [json.loads((run / "decision.json").read_text())["candidates"] for run in (one, other)]
    return all(
        a["kept"] == b["kept"] and a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        for a, b in zip(*candidates, strict=True)
    )


@pytest.mark.parametrize(("processes", "pairs"), [(2, two()), (4, four())])
def test_the_same_answer(runs, processes, pairs):
    launched = runs.launch(processes, pairs)
    found = {name: furthest(run, runs.alone(name.split("/")[1])) for name, run in launched.items()}
    worse = {
        name: (values, losses, norms)
        for name, (values, losses, norms) in found.items()
        if not (values < 1e-5 and losses < 1e-6 and norms < 1e-3)
    }
    assert not worse
    decided = [name for name in launched if name.endswith("/decided")]
    assert decided
    assert all(same_decision(launched[name], runs.alone("decided")) for name in decided)


def test_bfloat16(runs):
    """Weights and activations are rounded alike; only the order of float32 sums of rows differs."""
    pairs = [(spread, "phase") for spread in ("plain", "zero-3", "fsdp", "sequence")]
    for name, run in runs.launch(2, pairs, "bfloat16").items():
        values, losses, norms = furthest(run, runs.alone("phase", "bfloat16"))
        assert losses < 1e-6, name
        assert norms < 1e-4, name
        assert values < 1e-5, name
    dtypes = {t.dtype for t in load_file(run / "learned.safetensors").values()}
    assert dtypes == {torch.float32}


def test_processes_that_differ_do_not_start(runs):
    """As where one machine has another version of the recipe."""
    trees = [runs.recipe([f"train.warmup={share}"], "float32") for share in (0.1, 0.2)]
    done = runs.run(2, *[[[tree, str(runs.folder / "differing")]] for tree in trees])
    assert done.returncode != 0
    assert "the processes do not have the same recipe" in done.stderr
    assert not (runs.folder / "differing" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("variable", "key"), [("ACCELERATE_USE_DEEPSPEED", "runtime.zero"), ("ACCELERATE_USE_FSDP", "runtime.fsdp")]
)
def test_a_second_source_is_refused(runs, monkeypatch, variable, key):
    """As `accelerate launch --use_deepspeed` sets it: two places would say how the run is spread."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=key):
        train(Run(parse_recipe(runs.recipe([], "float32"), []), runs.folder / "second"))


def test_numbers_that_were_cast_are_found():
    """A bfloat16 step near log 4 is 0.8% of the factor: small ones would be lost."""
    model = tiny_model()
    rotary = attach(model, Start.of(rope_facts(model.config), Rope(window=256)), "ramp")
    check_parameters(rotary.trainable())
    for spoiled in (rotary.log_temperature.bfloat16(), torch.zeros(0)):
        with pytest.raises(CheckFailed, match="float32 and whole"):
            check_parameters([*rotary.trainable(), torch.nn.Parameter(spoiled)])


def test_weights_of_another_dtype_are_found():
    """Loading in shards can ignore the dtype asked for: twice the memory, without a word."""
    check_weights(tiny_model(), "float32")
    with pytest.raises(CheckFailed, match="weights were loaded as torch.float32, though base.dtype is bfloat16"):
        check_weights(tiny_model(), "bfloat16")


@pytest.mark.parametrize("packed", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_have_no_dtype_of_the_recipe(packed):
    """As bitsandbytes and FP8 store them; what was not quantised is still checked."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.requires_grad_(False)
            parameter.data = torch.zeros(parameter.shape).to(packed)
    check_weights(model, "float32")
    with pytest.raises(CheckFailed, match="weights were loaded as torch.float32, though base.dtype is bfloat16"):
        check_weights(model, "bfloat16")
