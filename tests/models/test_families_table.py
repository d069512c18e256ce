"""docs/families.md is what the code does with a small model of each family, not what somebody wrote.

`UPDATE=1 ./launch.sh test tests/test_families_table.py` writes it anew.
"""

import os
import re
from pathlib import Path

import pytest
from tiny import FAMILY_SIZES, NATIVE, recipe_tree, save_tiny
from yarn_tune.errors import UserError
from yarn_tune.export.gguf import ARCHITECTURES, BY_FLAGS
from yarn_tune.models.base import BaseModel
from yarn_tune.models.families import FAMILIES
from yarn_tune.models.loading import config_json
from yarn_tune.models.query_layout import query_site
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.serving.selection import Target, make_representable
from yarn_tune.serving.stacks import DEFAULT
from yarn_tune.tunable.query_gains import gains_for
from yarn_tune.tunable.rotary import at_start

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = """# Families

What can be learned and served, by Hugging Face model type. Made by `tests/test_families_table.py` from small random
models of each: a parameterisation is listed if its numbers settle into a config that all the stacks named read alike,
a temperature if it folds exactly into the weights named. The tests train, export and reload each of them, and
`tests/engines/test_vllm.py` runs vLLM on those marked.

| family | rope.frequencies | rope.query_gains | folded into | served by default on | vLLM run | llama.cpp | note |
|---|---|---|---|---|---|---|---|
"""
VLLM = (Path(__file__).parents[1] / "engines" / "test_vllm.py").read_text()
RUN = sorted(set(re.findall(r'"(\w+)"', re.search(r"^FAMILIES = .*?^RUNGS", VLLM, re.S | re.M)[0])) & {*FAMILY_SIZES})
"""Served by the real vLLM in its tests, which are named there."""


def allowed(call) -> bool:
    try:
        call()
    except UserError:
        return False
    return True


def row(family: str, folder: Path) -> str:
    base = save_tiny(folder / family, family)
    config = config_json(str(base))

    def settles(frequencies: str):
        recipe = parse_recipe(recipe_tree(base, folder), [f"rope.frequencies={frequencies}"])
        rotary = at_start(BaseModel(recipe.base), recipe.rope)
        rotary.load_numbers({name: numbers + 0.07 for name, numbers in rotary.numbers().items()})  # off the start
        return lambda: make_representable(rotary.learned(), Target.of_model(BaseModel(recipe.base), recipe.export))

    parameterisations = [frequencies for frequencies in ("scale", "ramp", "per_pair") if allowed(settles(frequencies))]
    rungs = [r for r in ("layer", "head", "pair", "pair_phase") if allowed(lambda r=r: gains_for(config, r))]
    place = "norm of the queries" if query_site(config).normed else "query rows and bias"
    target = Target.of(config)
    served = "all" if target.stacks == DEFAULT else ", ".join(target.stacks)
    gguf = "GGUF" if family in ARCHITECTURES else "flags (scale)" if family in BY_FLAGS else "no"
    cells = [family, ", ".join(parameterisations), ", ".join(rungs), place, served, "yes" if family in RUN else "no",
             gguf, FAMILIES[family]]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def test_the_page_is_up_to_date(tmp_path):
    (tmp_path / "d").mkdir()
    text = HEAD + "\n".join(row(family, tmp_path) for family in FAMILIES) + "\n"
    text += f"\nThe default stacks: {', '.join(DEFAULT)}.\n"
    if os.environ.get("UPDATE"):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text)
    assert PAGE.read_text() == text


def test_families_said_to_run_in_vllm_are():
    assert {"llama", "deepseek_v2", "gpt_oss", "starcoder2"} <= {*RUN}
    assert not {"qwen3_next", "deepseek_v3"} & {*RUN}, "vLLM's CPU kernels do not run these in float32"


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_every_family_folds_somewhere(family, tmp_path):
    base = save_tiny(tmp_path / "base", family)
    assert query_site(config_json(str(base))).groups in (1, 4)
    assert config_json(str(base))["max_position_embeddings"] == NATIVE
