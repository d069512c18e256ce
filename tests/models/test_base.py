"""The base model is resolved once: one run reads its config and derives its rope facts once."""

import json
import sys
from pathlib import Path

import pytest
from tiny import recipe_tree, save_tiny, tiny_config
from yarn_tune.api import Tuning
from yarn_tune.errors import UserError
from yarn_tune.models import rope_config
from yarn_tune.models.base import BaseModel
from yarn_tune.recipe.schema import Base

OPENED: dict[str, int] = {}


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], (str, Path)) and str(arguments[0]) in OPENED:
        OPENED[str(arguments[0])] += 1


sys.addaudithook(_count)


def test_one_run_opens_the_config_twice_and_derives_the_rope_facts_once(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    path = str(base / "config.json")
    derived = []
    refusal = rope_config.refusal
    monkeypatch.setattr(rope_config, "refusal", lambda config: derived.append(config) or refusal(config))
    OPENED[path] = 0
    tree = recipe_tree(base, tmp_path)
    tree["rope"] = {"window": 256, "query_gains": "pair_phase"}
    tuning = Tuning(tree, folder=tmp_path / "run")
    assert "numbers" in tuning.plan().text()
    tuning.train()
    comparison = tuning.compare()
    tuning.export()
    assert tuning.verify().passed
    assert {"none", "yarn", "tuned"} <= {row.method for row in comparison.rows}
    assert 1 <= OPENED.pop(path) <= 2
    assert len(derived) == 1


def test_what_is_derived_from_the_files(tmp_path):
    base = BaseModel(Base(model=str(save_tiny(tmp_path / "base"))))
    assert base.is_local
    assert base.written == json.loads((tmp_path / "base" / "config.json").read_text())
    assert base.text_config is base.config
    assert (base.facts.dim, base.layout.head_dim, base.facts.native) == (16, 16, 64)
    assert base.query_site.groups == 4
    assert base.no_query_site == ""
    first = base.digest
    assert BaseModel(base.source).digest == first
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"rope_theta": 2e4}))
    assert BaseModel(base.source).digest != first


def test_a_base_without_a_place_for_gains_says_why(tmp_path):
    tiny_config("olmo", clip_qkv=8.0).save_pretrained(tmp_path / "base")
    base = BaseModel(Base(model=str(tmp_path / "base")))
    assert base.query_site is None
    assert "clamps its queries (clip_qkv)" in base.no_query_site


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint folder"):
        assert BaseModel(Base(model=str(tmp_path / "none"))).is_local
    assert not BaseModel(Base(model="nobody/nothing")).is_local


def test_a_name_that_no_hub_allows_is_refused():
    with pytest.raises(UserError, match=r"base.model: '0/:' is neither a checkpoint folder nor a hub id"):
        BaseModel(Base(model="0/:")).is_local  # noqa: B018
