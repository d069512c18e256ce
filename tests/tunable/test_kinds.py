"""The table of kinds: rates, decays and counts come from it, and one more row is a kind that trains and is exported."""

import json
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny import NATIVE, recipe_tree, save_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from yarn_tune.adapter.layer import place_of
from yarn_tune.export.checkpoint import export
from yarn_tune.models.query_layout import QuerySite, query_site
from yarn_tune.planning.run_plan import plan
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Decays, Lora, Rates, Rope, Train
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import learned_of
from yarn_tune.serving.verification import verify
from yarn_tune.training.loop import train
from yarn_tune.training.optimizer import make_optimizer, set_rates
from yarn_tune.tunable.kinds import KINDS, Kind, decay_of, kinds_of, rate_of
from yarn_tune.tunable.parameters import Adjustment, WeightFold
from yarn_tune.tunable.rotary import at_start

EVERY = Rope(window=4 * NATIVE, query_gains="pair_phase", qk_bias=True)


def test_the_recipe_has_a_rate_and_a_decay_for_every_kind():
    names = list(KINDS)
    assert [f.name for f in fields(Rates)] == names
    assert [f.name for f in fields(Decays)] == names
    assert [kind.name for kind in kinds_of(EVERY, Lora())] == names
    assert [kind.name for kind in kinds_of(Rope(window=256, frequencies="fixed", query_gains="layer"))] == ["gain"]


def test_rates_and_decays_come_from_the_recipe_or_else_from_the_row():
    given = Train(learning_rate=Rates(frequency=0.5), weight_decay=Decays(phase=2.0))
    assert [rate_of(kind, given, EVERY) for kind in KINDS] == [0.5, 0.01, 0.01, 0.03, 0.03, 0.002]
    assert [decay_of(kind, given) for kind in KINDS] == [0.0, 0.0, 0.0, 0.0, 2.0, 0.0]
    by_gains = [
        rate_of("gain", given, Rope(window=256, query_gains=g)) for g in ("layer", "head", "pair", "pair_phase")
    ]
    assert by_gains == [0.01, 0.02, 0.03, 0.03]
    assert rate_of("gain", Train(learning_rate=Rates(gain=0.7)), EVERY) == 0.7
    one = Train(learning_rate=0.2, weight_decay=0.1)
    assert {rate_of(kind, one, EVERY) for kind in KINDS} == {0.2}
    assert {decay_of(kind, one) for kind in KINDS} == {0.1}


def test_the_optimizer_has_a_group_per_kind(tmp_path):
    recipe = parse_recipe(recipe_tree(save_tiny(tmp_path / "base"), tmp_path), ["rope.query_gains=pair_phase"])
    rotary = at_start(Run(recipe, tmp_path / "run").base, recipe.rope)
    settings = Train(steps=10, warmup=0.0, weight_decay=Decays(gain=0.3))
    optimizer = make_optimizer(rotary, settings)
    set_rates(optimizer, settings, recipe.rope, 0)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {"frequency": (0.02, 0), "temperature": (0.01, 0), "gain": (0.03, 0.3), "phase": (0.03, 0)}


@dataclass(frozen=True)
class TiltFold(WeightFold):
    """The whole query, rotated or not, times one number per layer."""

    kind: ClassVar[str] = "tilt"
    site: QuerySite
    factors: Tensor
    """`[layers]`."""

    def _factor(self, name: str) -> Tensor:
        return self.factors[int(self.site.pattern.search(name)[1])]

    def acts_on(self, module: str) -> bool:
        return self.site.holds(f"{module}.weight")

    def adjust(self, module: str, output: Tensor) -> Tensor:
        return (output * self._factor(f"{module}.weight")).to(output.dtype)

    def holds(self, tensor: str) -> bool:
        return self.site.holds(tensor)

    def fold(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.double() * self._factor(name)

    def summary(self) -> dict[str, float]:
        return {"largest_tilt": self.factors.max().item()}


class Tilt(Adjustment):
    place = "tilt"

    def __init__(self, site: QuerySite) -> None:
        super().__init__()
        self.site = site
        self.log_tilt = nn.Parameter(torch.zeros(len(site.layers)))

    def forward(self) -> TiltFold:
        return TiltFold(self.site, self.log_tilt.exp())

    def exact(self) -> TiltFold:
        return TiltFold(self.site, self.log_tilt.detach().cpu().double().exp())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"tilt": [self.log_tilt]}


TILT = Kind(
    name="tilt",
    key="tests",
    label="tilts of whole queries",
    identity=1.0,
    learned=lambda rope, lora: True,
    rate=lambda rope: 0.05,
    folded_into="query projection",
    make=lambda config, rope: Tilt(query_site(config)),
)


@pytest.mark.parametrize("settings", [(), ("rope.query_gains=pair_phase", "lora.rank=2")])
def test_a_made_up_kind_is_trained_exported_and_verified(tmp_path, monkeypatch, settings):
    """A new kind needs one row, its parameters and its fold; it is then in every result."""
    monkeypatch.setitem(KINDS, "tilt", TILT)
    base = save_tiny(tmp_path / "base")
    recipe = parse_recipe(recipe_tree(base, tmp_path, steps=2), list(settings))
    run = Run(recipe, tmp_path / "run")
    assert plan(recipe, run.base).learned_numbers["tilt"] == 3
    train(run)
    numbers = load_file(run.numbers_path)["tilt.log_tilt"]
    assert bool((numbers != 0).all())
    assert numbers.abs().max() < 2 * 0.05 + 1e-6  # two steps of its own rate
    learned = learned_of(run)
    assert learned.summary()["largest_tilt"] == pytest.approx(numbers.exp().max().item())
    assert json.loads((run.folder / "learned.json").read_text())["numbers"]["tilt"] == 3
    target = export(run)  # compares the reloaded checkpoint with the hooks in memory
    assert "tilt" in json.loads((target / "fidelity.json").read_text())["learned"]["folds"]
    stock, tuned = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, target))
    if not settings:
        gain = json.loads((target / "fidelity.json").read_text())["fold"]["gain"]  # the temperature is folded too
        for layer, factor in enumerate(numbers.double().exp()):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            torch.testing.assert_close(tuned[name], (stock[name].double() * factor * gain).float(), rtol=1e-7, atol=0)
            assert not torch.equal(tuned[name], stock[name])
    assert verify(str(target)).passed
    assert "log_tilt" in " ".join(load_file(run.folder / "adapter" / "adapter_model.safetensors"))
    assert place_of(AutoModelForCausalLM.from_pretrained(base)) == "model.rotary_emb"


def test_cost_counts_what_the_kinds_keep():
    kept = [sum(kind.kept_queries for kind in kinds_of(Rope(window=256, query_gains=g))) for g in ("none", "layer",
            "head", "pair", "pair_phase")]  # fmt: skip
    assert kept == [0, 1, 1, 1, 2]
    assert asdict(Rates())["gain"] is None
