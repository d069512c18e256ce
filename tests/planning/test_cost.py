"""The memory model against measurements: some made now, all those of the benchmark."""

import json
import sys
from pathlib import Path

import pytest
from published import published
from tiny import tiny_config, tiny_model
from transformers import LlamaConfig
from yarn_tune.models.loading import GIB
from yarn_tune.planning.cost import estimate_cost
from yarn_tune.planning.memory import RESERVE, largest_rows, step_memory, weight_memory
from yarn_tune.planning.shape import Shape
from yarn_tune.recipe.loading import parse_recipe

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import memory  # noqa: E402

CONFIG = published("llama-2-7b-32k")
SEVEN_B = Shape.of(CONFIG)


def recipe(*settings):
    tree = {
        "name": "a",
        "base": {"model": "a"},
        "rope": {"window": 131072, "native": 4096},
        "data": {"train": ["a"], "heldout": ["b"]},
    }
    return parse_recipe(tree, list(settings))


@pytest.mark.parametrize("way", memory.WAYS)
def test_what_is_predicted_is_measured(way):
    found = memory.measured(way, 4096, "float32")
    assert found["predicted"] == pytest.approx(found["mib"], rel=0.2)


def test_what_was_measured_is_predicted():
    measured = json.loads((ROOT / "benchmarks/results/memory.json").read_text())
    assert {one["way"] for one in measured} == set(memory.WAYS)
    assert max(one["tokens"] for one in measured) >= 32768
    for one in measured:
        predicted = memory.predicted_mib(one["way"], one["tokens"], one["dtype"])
        assert predicted == pytest.approx(one["mib"], rel=0.2), one


def test_weights_are_counted_and_shards_divide_them():
    model = tiny_model()
    whole = weight_memory(recipe("base.dtype=float32"), Shape.of(model.config), 10)
    assert whole == sum(p.numel() for p in model.parameters()) * 4 + 160
    cost = estimate_cost(recipe(), SEVEN_B)
    assert cost.parameters == 6_738_415_616
    assert cost.weights_gib == pytest.approx(6_738_415_616 * 2 / GIB)
    layer, words = 202_383_360 * 2 / GIB, 32000 * 4096 * 2 / GIB
    for setting, live in (("runtime.fsdp=true", 2 * layer), ("runtime.zero=3", 1e9 * 2 / GIB)):
        sharded = weight_memory(recipe(setting, "runtime.processes=8"), SEVEN_B) / GIB
        assert sharded == pytest.approx(cost.weights_gib / 8 + live + words, rel=1e-3)


def test_the_largest_row_just_fits():
    for settings in ((), ("train.tiled_mlp=1024",), ("runtime.zero=3", "runtime.processes=8")):
        own = recipe(*settings)
        for gib, tokens in largest_rows(own, SEVEN_B, weight_memory(own, SEVEN_B)).items():
            assert tokens % 1024 == 0
            need = [weight_memory(own, SEVEN_B) + step_memory(own, SEVEN_B, n) for n in (tokens, tokens + 1024)]
            assert need[0] <= (1 - RESERVE) * gib * GIB < need[1]
    ways = ((), ("train.tiled_mlp=1024",), ("train.offload_activations=true",))
    weights = weight_memory(recipe(), SEVEN_B)
    rows = [largest_rows(recipe(*settings), SEVEN_B, weights)[40] for settings in ways]
    assert rows == sorted(rows)


def test_a_model_that_does_not_fit_has_no_row():
    big = Shape.of(LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 80, "intermediate_size": 44032}))
    assert largest_rows(recipe(), big, weight_memory(recipe(), big)) == {24: 0, 40: 0, 80: 0}


def test_documents_that_share_a_row_need_a_mask():
    """All else grows with the row and no faster, so it is not in second differences."""
    own, n = recipe("base.dtype=float32", "data.packing=concat"), 131072
    one, two, three = (step_memory(own, SEVEN_B, tokens) for tokens in (n, 2 * n, 3 * n))
    assert three - 2 * two + one == 2 * n**2 * 5


def test_of_experts_only_those_that_a_token_is_sent_to_are_computed():
    """Against the matrices that one token is multiplied with, counted by name."""
    eight = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
    config, model = tiny_config("mixtral", **eight), tiny_model("mixtral", **eight)
    expert = 3 * 64 * 96  # gate, up and down of one expert
    outside = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name)
    assert Shape.of(config).active == outside + 3 * 2 * expert
    assert Shape.of(config).parameters == outside + 3 * 8 * expert
    assert Shape.of(tiny_config("llama")).active == Shape.of(tiny_config("llama")).parameters


def test_layers_of_a_hybrid_without_softmax_attention_attend_to_no_pairs():
    assert Shape.of(tiny_config("qwen3_5_text")).attending == 2
    assert Shape.of(tiny_config("lfm2")).attending == 2
    assert Shape.of(tiny_config("gemma2")).attending == Shape.of(tiny_config("gemma2")).layers == 3


def test_heads_of_latent_attention_count_with_both_parts():
    assert Shape.of(tiny_config("deepseek_v3")).queries == 4 * (16 + 16)


def test_operations_of_a_step():
    """By hand: 2 a parameter and token; attention 4 a layer, width and pair of tokens, 2.5 times as many backwards."""
    settings = ("rope.native=131072", "data.row_tokens=1024", "train.batch_size=1", "train.steps=2")
    dense = 2 * (6_738_415_616 - 32000 * 4096) * 1024
    attention = 4 * 32 * 4096 * 1024**2 / 2
    mlps = 2 * 3 * 4096 * 11008 * 32 * 1024
    for more, expected in (
        (("train.gradient_checkpointing=false",), 2 * dense + 3.5 * attention),
        ((), 3 * dense + 4.5 * attention),
        (("train.keep_attention=true",), 3 * dense + 3.5 * attention),
        (("train.tiled_mlp=64",), 3 * dense + 4.5 * attention + mlps),
    ):
        assert estimate_cost(recipe(*settings, *more), SEVEN_B).step_flops == pytest.approx(expected, rel=1e-9), more
