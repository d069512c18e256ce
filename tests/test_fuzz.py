"""Bad input: mutated recipes, damaged files, odd documents. A message with exit code 2, or it works; never a traceback.

`FUZZ=10000 ./launch.sh test tests/test_fuzz.py` tries that many recipes instead of a few hundred.
"""

import copy
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import finished_run, recipe_tree, save_tiny, write_documents
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.recipe.loading import RecipeError, parse_recipe
from yarn_tune.recipe.schema import Recipe
from yarn_tune.runs.learned import learned_of

RECIPES = int(os.environ.get("FUZZ", "300"))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["pair_phase", "distill", "concat", "hub:a/b", "/", "../x", "1e-3", ""]),
    st.lists(st.integers(-1, 512), max_size=3),
    st.lists(st.text(max_size=4), max_size=2),
    st.dictionaries(st.sampled_from(["gain", "phase", "rank", "x"]), st.floats(), max_size=2),
)


def paths(tree, prefix=()):
    """Every key of a nested dict, as a tuple."""
    for key, value in tree.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A recipe with every default written out, over a real tiny base and real documents."""
    folder = tmp_path_factory.mktemp("fuzz")
    base = save_tiny(folder / "base")
    return folder, parse_recipe(recipe_tree(base, folder), ["eval.retrieval={per_cell: 1}"]).to_dict()


@st.composite
def mutations(draw):
    """Up to three (which key, what to do, a value)."""
    actions = st.sampled_from(["set", "set", "set", "delete", "add"])
    return draw(st.lists(st.tuples(st.integers(0, 10**6), actions, VALUES), min_size=1, max_size=3))


def mutate(tree, changes):
    tree = copy.deepcopy(tree)
    for number, action, value in changes:
        places = list(paths(tree))
        if not places:
            break
        *parents, key = places[number % len(places)]
        inner = tree
        for parent in parents:
            inner = inner[parent]
        if action == "delete":
            del inner[key]
        else:
            inner[f"{key}_" if action == "add" else key] = value
    return tree


@settings(max_examples=RECIPES, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=mutations())
def test_a_mutated_recipe_is_a_plan_or_a_message(good, changes):
    """From the file to the plan, as the command line does it."""
    folder, tree = good
    path = folder / "mutated.yaml"
    path.write_text(yaml.safe_dump(mutate(tree, changes)))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["plan", str(path)]) in (0, 2)
    finally:
        os.chdir(before)


@settings(max_examples=RECIPES, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_a_recipe_file_of_anything(good, text):
    folder, _ = good
    path = folder / "anything.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    assert main(["plan", str(path)]) == 2


@settings(max_examples=RECIPES, deadline=None)
@given(override=st.text(max_size=30))
def test_an_override_of_anything(good, override):
    try:
        parse_recipe(copy.deepcopy(good[1]), [override])
    except RecipeError:
        return


def test_what_parses_is_written_and_read_alike(good):
    recipe = parse_recipe(copy.deepcopy(good[1]), [])
    assert isinstance(recipe, Recipe)
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict())), []) == recipe


# Learned numbers.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"), "per_pair", settings=("rope.query_gains=pair_phase",))


@pytest.mark.parametrize("seed", range(30))
def test_damaged_numbers_are_refused_or_whole(run, seed):
    """Bit flips and cuts of the saved numbers: read as finite numbers of the right shapes, or a message."""
    whole, rng = run.numbers_path.read_bytes(), random.Random(seed)
    content = bytearray(whole)
    if seed % 3 == 0:
        content = content[: rng.randrange(len(content))]
    else:
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(200 if seed % 3 == 1 else len(content))] ^= 1 << rng.randrange(8)
    run.numbers_path.write_bytes(content)
    learned = None
    try:
        learned = learned_of(run)
    except UserError:
        pass
    finally:
        run.numbers_path.write_bytes(whole)
    if learned is not None:
        assert all(math.isfinite(factor) for factor in learned.factors)
        assert bool(torch.view_as_real(learned.gains).isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: {k: v for k, v in n.items() if k != "gains.phase"}, "do not fit"),
        (lambda n: n | {"gains.phase": n["gains.phase"][:1]}, "do not fit"),
        (lambda n: n | {"gains.log_gain": n["gains.log_gain"] * float("nan")}, "NaN or Inf"),
        (lambda n: n | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, "do not fit"),
        (lambda n: {"weight": torch.zeros(3)}, "do not fit"),
    ],
    ids=["missing", "shape", "nan", "foreign", "other"],
)
def test_numbers_of_something_else(run, change, message):
    whole = run.numbers_path.read_bytes()
    save_file(change(load_file(run.numbers_path)), run.numbers_path)
    try:
        with pytest.raises(UserError, match=message):
            learned_of(run)
    finally:
        run.numbers_path.write_bytes(whole)


# Documents.

ODD = {
    "empty file": b"",
    "empty documents": b'{"text": ""}\n{"text": "  \\n"}\n',
    "only special tokens": b'{"text": "<end> <end> <end>"}\n',
    "one token": b'{"text": "w1"}\n',
    "invalid UTF-8": b'{"text": "w1 \xff\xfe"}\n',
    "not JSON": b"w1 w2 w3\n",
    "no object": b"[1, 2]\n",
    "no text": b'{"words": "w1"}\n',
    "numbers": b'{"text": 3}\n',
    "ids outside": b'{"input_ids": [5, 100000]}\n',
    "negative ids": b'{"input_ids": [-5, 1]}\n',
    "ids of words": b'{"input_ids": ["a"]}\n',
    "null byte": b'{"text": "w1\\u0000w2"}\n',
    "cut line": b'{"text": "w1 w2',
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
@pytest.mark.parametrize("place", ["train", "heldout"])
def test_odd_documents(tmp_path, monkeypatch, capsys, content, place):
    monkeypatch.chdir(tmp_path)
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path, steps=1)
    (tmp_path / "odd.jsonl").write_bytes(content)
    tree["data"][place] = ["odd.jsonl"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    assert main(["run", "r.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"data.{place}" in said


def test_one_huge_line(tmp_path, monkeypatch):
    """A document of a million tokens on one line is cut into rows like any other."""
    monkeypatch.chdir(tmp_path)
    tree = recipe_tree(save_tiny(tmp_path / "base"), tmp_path, steps=1)
    tree["data"]["train"] = [str(write_documents(tmp_path / "huge.jsonl", [1_000_000]))]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", "r.yaml"]) == 0


def test_damaged_base_weights(tmp_path, monkeypatch, capsys):
    """Cut or flipped, the base is not loaded, or it is and the run goes on; never a traceback."""
    monkeypatch.chdir(tmp_path)
    base = save_tiny(tmp_path / "base")
    tree = recipe_tree(base, tmp_path, steps=1)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"{}" + whole, whole[:8] + b"x" * 40 + whole[48:]):
        weights.write_bytes(content)
        assert main(["train", "r.yaml"]) == 2
        assert "base.model" in capsys.readouterr().err
    config = json.loads((base / "config.json").read_text())
    weights.write_bytes(whole)
    for key, value in (("num_attention_heads", 0), ("hidden_size", "x"), ("rope_parameters", 3), ("vocab_size", -1)):
        (base / "config.json").write_text(json.dumps(config | {key: value}))
        assert main(["train", "r.yaml"]) == 2, key
        assert "Traceback" not in capsys.readouterr().err


def test_pickled_weights_are_not_loaded(tmp_path, capsys):
    """A pickle can hold code; its weights are refused, and nothing in it runs."""
    base = save_tiny(tmp_path / "base")
    (base / "model.safetensors").unlink()

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model.norm.weight": Code()}, base / "pytorch_model.bin")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree(base, tmp_path)))
    assert main(["train", str(recipe)]) == 2
    message = capsys.readouterr().err
    assert "base.model" in message
    assert "safetensors" in message
    assert not (tmp_path / "ran").exists()


def test_code_of_a_checkpoint_is_not_run(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (base / "config.json").write_text(json.dumps(config | own))
    (base / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree(base, tmp_path)))
    assert main(["plan", str(recipe)]) == 2
    assert "it requires custom code, which yarn-tune never runs" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
