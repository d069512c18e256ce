"""The harness that damages every file of a run: a few tries here, hundreds by `python benchmarks/damage.py`."""

import json
import os
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import damage  # noqa: E402


def test_no_damage_is_believed(tmp_path, monkeypatch):
    """One seed of each kind of damage for every file that a command reads would take minutes; these take seconds."""
    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "home"
    found = damage.tried(home, damage.small_recipe(home), range(1000, 1024))
    assert [each for each in found if each["verdict"] in ("traceback", "believed")] == []
    assert {each["verdict"] for each in found} == {"refused", "unharmed"}


def unchecked(path, more="", required=False):
    """What the cache would read if it did not compare the checksum."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_the_harness_finds_a_checksum_that_is_not_checked(tmp_path, monkeypatch):
    """Without the check of its measurements, the harness reports changed numbers."""
    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "home"
    before = Path.cwd()
    try:
        world = damage.build(home, damage.small_recipe(home))
        for path in (world.run / "nll").iterdir():
            content = bytearray(path.read_bytes())
            content[-2] ^= 0x40
            path.write_bytes(content)
        monkeypatch.setattr("yarn_tune.evaluation.nll_cache.read_tensors_and_metadata", unchecked)
        done, values = world.observe("compare")
    finally:
        os.chdir(before)  # monkeypatch would return to the folder of the run afterwards
    assert done.code == 0
    assert damage.different(values, world.truth["compare"])


def test_the_published_result_is_clean():
    report = json.loads((ROOT / "benchmarks/results/damage.json").read_text())
    assert report["tries"] >= 400
    assert report["failed"] == []


@pytest.mark.parametrize("kind", damage.KINDS)
def test_every_kind_of_damage_changes_the_file(tmp_path, kind):
    import random

    path = tmp_path / "file"
    path.write_bytes(bytes(range(1, 200)))
    damage.damage(path, kind, random.Random(1))
    assert not path.exists() or path.read_bytes() != bytes(range(1, 200))
