"""Biases of queries and keys: zero at the start, right gradients, and exact as biases of a stock checkpoint."""

import json
import math

import pytest
import torch
from finite_differences import norm_of, slope_errors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import FAMILY_SIZES, NATIVE, VOCABULARY, finished_run, recipe_tree, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.models.families import FAMILIES
from yarn_tune.models.loading import load_model
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.planning.run_plan import plan
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Rope
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import learned_of
from yarn_tune.serving.selection import Target
from yarn_tune.serving.stacks import STACKS
from yarn_tune.serving.verification import verify
from yarn_tune.training.decision import scaled
from yarn_tune.training.loop import train
from yarn_tune.tunable.attachment import attach, attach_fixed, detach
from yarn_tune.tunable.folding import fold_checkpoint
from yarn_tune.tunable.kinds import adjustments_for
from yarn_tune.tunable.parameters import Start
from yarn_tune.tunable.qk_bias import Biases, bias_site, check_biased
from yarn_tune.tunable.rotary import at_start

CARRIED = sorted(family for family in FAMILY_SIZES if FAMILIES[family].biased or FAMILIES[family].bias_key)
REFUSED = sorted({*FAMILY_SIZES} - {*CARRIED})
WITHOUT_LONGROPE = {family for family in CARRIED if FAMILIES[family].interleaved} | {"gpt_oss"}
IDS = torch.randint(1, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0))


SWITCHED_OFF = [
    ("glm", {"attention_bias": False}),
    ("gpt_neox", {"attention_bias": False}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": False}),
    ("starcoder2", {"use_bias": False}),
]
"""Families whose releases have biases, without them."""


def tuned_model(family: str, extra: dict[str, object] | None = None):
    model = tiny_model(family, **(extra or {}))
    rope = Rope(window=4 * NATIVE, qk_bias=True)
    start = Start.of(rope_facts(model.config), rope)
    return model, attach(model, start, "fixed", adjustments_for(model.config.to_dict(), rope))


def biases_of(rotary) -> Biases:
    return next(each for each in rotary.adjustments if isinstance(each, Biases))


def loss_of(model):
    logits = model(IDS, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_the_families_are_those_with_biases_or_a_switch():
    assert {*CARRIED} == {
        "apertus", "arcee", "cohere", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4",
        "gpt_neox", "gpt_oss", "granite", "granitemoe", "llama", "nemotron", "olmo", "olmo2", "olmo3", "persimmon",
        "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss",
        "smollm3", "stablelm", "starcoder2",
    }  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_families_without_a_switch_are_refused_by_name(family):
    config = tiny_config(family).to_dict()
    with pytest.raises(UserError, match=rf"^rope.qk_bias: {family} is not known to have biases of queries and keys"):
        check_biased(config)
    if FAMILIES[family].twin:  # a Mistral learns them, and is written as a Llama
        assert bias_site(config).changes == {"attention_bias": True}
        return
    with pytest.raises(UserError, match=rf"^rope.qk_bias: {family} is not known"):
        bias_site(config)


@pytest.mark.parametrize("family", CARRIED)
def test_the_start_is_yarn_and_gradients_match_finite_differences(family):
    model = tiny_model(family)
    start = Start.of(rope_facts(model.config), Rope(window=4 * NATIVE))
    attach(model, start, "fixed")
    with torch.no_grad():
        yarn = model(IDS, use_cache=False).logits
    detach(model)
    model, rotary = tuned_model(family)
    biases = biases_of(rotary)
    with torch.no_grad():
        biases.query_size.fill_(0.5)
        biases.key_size.fill_(0.7)
        assert torch.equal(model(IDS, use_cache=False).logits, yarn)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (biases.query_bias, biases.key_bias):
            parameter.normal_(0, 0.5)
    loss_of(model).backward()
    for parameter in (biases.query_bias, biases.key_bias):
        gradients = [parameter.grad.clone()]
        assert norm_of(gradients) > 0
        assert min(slope_errors(lambda: loss_of(model), [parameter], gradients, (1e-1, 3e-2, 1e-2, 2e-3))) < 0.03


@pytest.mark.parametrize(("family", "extra"), [*((family, {}) for family in CARRIED), *SWITCHED_OFF])
def test_folded_it_is_the_stock_model_with_biases(family, extra, tmp_path):
    """Every number of every query and key row, in a checkpoint that stock classes load."""
    model, rotary = tuned_model(family, extra)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in biases_of(rotary).parameters():
            parameter.normal_(0, 0.5)
        fold = biases_of(rotary).exact()
        detach(model)
        plain = model(IDS, use_cache=False).logits
        table = Start.of(rope_facts(model.config), Rope(window=NATIVE)).facts.table(NATIVE)
        attach_fixed(model, lambda length: table, [fold])
        expected = model(IDS, use_cache=False).logits
        detach(model)
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    fold_checkpoint(tmp_path, config, 1.0, [fold])
    (tmp_path / "config.json").write_text(json.dumps(config | fold.config_changes()))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        found = stock(IDS, use_cache=False).logits
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * max(1.0, expected.abs().max().item()))
    after = load_file(tmp_path / "model.safetensors")
    added = {name: tensor for name, tensor in after.items() if name not in before}
    assert set(added) == set(fold.added())
    assert bool(added) == bool(fold.config_changes())
    assert {name for name, tensor in added.items() if bool(tensor.any())} == {n for n in added if fold.holds(n)}


@pytest.mark.parametrize("family", CARRIED)
def test_the_export_computes_what_was_learned(tmp_path, family):
    gains = (
        "pair" if FAMILIES[family].queries.pattern.endswith("norm\\.weight$") or family == "persimmon" else "pair_phase"
    )
    frequencies = "scale" if family in WITHOUT_LONGROPE else "per_pair"
    settings = ("rope.qk_bias=true", f"rope.query_gains={gains}", "export.stacks=[transformers]")
    target = export(finished_run(tmp_path, frequencies, family, settings=settings))
    fidelity = json.loads((target / "fidelity.json").read_text())
    assert max(fidelity["max_abs_logit_difference"].values()) <= 1e-4
    assert set(fidelity["learned"]["folds"]) == {"bias", "gain"}
    assert verify(str(target), ["transformers"]).passed


def test_shards_get_their_biases_and_the_index_names_them(tmp_path):
    model, rotary = tuned_model("llama")
    with torch.no_grad():
        for parameter in biases_of(rotary).parameters():
            parameter.fill_(0.5)
    fold = biases_of(rotary).exact()
    detach(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    config = model.config.to_dict()
    fold_checkpoint(tmp_path, config, 1.0, [fold])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name in fold.added():
        assert name in load_file(tmp_path / index["weight_map"][name])
    bias = load_file(tmp_path / index["weight_map"]["model.layers.1.self_attn.k_proj.bias"])
    assert torch.equal(bias["model.layers.1.self_attn.k_proj.bias"], torch.full((32,), 0.25))
    save_file({"other.weight": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    for path in tmp_path.glob("model-*-of-*.safetensors"):
        path.unlink()
    save_file({"other.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has no weights to which model.layers.0.self_attn.k_proj.bias"):
        fold_checkpoint(tmp_path, config, 1.0, [fold])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biases")
    settings = ["rope.qk_bias=true", "rope.query_gains=pair", "train.learning_rate={bias: 0.05}"]
    tree = recipe_tree(save_tiny(folder / "base"), folder, steps=3)
    run = Run(parse_recipe(tree, settings), folder / "run")
    train(run)
    return run


def test_training_measures_the_sizes_and_moves_by_the_rate(trained):
    """The sizes are the RMS of queries and keys on the rows of the first step; rates are relative to them."""
    numbers = load_file(trained.numbers_path)
    model = load_model(trained.recipe.base.model, dtype="float32")
    squares: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(
                lambda m, i, o, n=name: squares.setdefault(n, []).append(o.square().mean().item())
            )
    with torch.no_grad():
        model(torch.randint(1, VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(1)))
    for kind in ("query", "key"):
        sizes = numbers[f"biases.{kind}_size"]
        found = [math.sqrt(sum(squares[f"model.layers.{i}.self_attn.{kind[0]}_proj"])) for i in range(3)]
        torch.testing.assert_close(sizes, torch.tensor(found), rtol=0.1, atol=0)
        moved = numbers[f"biases.{kind}_bias"]
        assert bool((moved != 0).all())
        assert moved.abs().max() <= 3 * 0.05 + 1e-6
    assert learned_of(trained).summary()["largest_query_bias"] > 0
    assert json.loads((trained.folder / "learned.json").read_text())["numbers"]["bias"] == 3 * (64 + 32)


def test_scaled_towards_yarn_keeps_the_sizes(trained):
    """Half of the offsets is half of the biases; none of them is YaRN."""
    numbers = load_file(trained.numbers_path)
    rotary = at_start(trained.base, trained.recipe.rope)
    found = []
    for factor in (1.0, 0.5, 0.0):
        rotary.load_numbers(scaled(numbers, factor))
        found.append(biases_of(rotary).exact().query)
    torch.testing.assert_close(found[1], found[0] / 2)
    assert not bool(found[2].any())
    assert not biases_of(rotary).unscaled()


def test_plan_counts_them(trained):
    assert plan(trained.recipe, trained.base).learned_numbers["bias"] == 3 * (64 + 32)


def test_the_peft_adapter_is_merged_to_the_export(trained):
    target = export(trained)
    expected = AutoModelForCausalLM.from_pretrained(target).eval()
    base = AutoModelForCausalLM.from_pretrained(trained.recipe.base.model)
    adapted = PeftModel.from_pretrained(base, str(trained.folder / "adapter")).eval()
    with torch.no_grad():
        wanted = expected(IDS, use_cache=False).logits
        torch.testing.assert_close(adapted(IDS, use_cache=False).logits, wanted, rtol=0, atol=1e-4)
        merged = adapted.merge_and_unload()
        assert torch.equal(merged(IDS, use_cache=False).logits, wanted)
    state = merged.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    assert merged.config.attention_bias is True


def test_an_adapter_trained_by_peft_measures_the_sizes_too():
    from peft import get_peft_model
    from yarn_tune.adapter.config import YarnTuneConfig

    model = get_peft_model(tiny_model(), YarnTuneConfig(window=256, qk_bias=True)).train()
    numbers = {name.rpartition(".")[2]: p for name, p in model.named_parameters() if "yarn_tune_numbers" in name}
    assert {name for name, p in numbers.items() if not p.requires_grad} == {"query_size", "key_size"}
    loss_of(model).backward()
    assert not bool(numbers["query_size"].any())
    loss_of(model).backward()
    assert bool((numbers["query_size"] > 0).all())
    assert bool((numbers["key_size"] > 0).all())
    assert bool((numbers["key_bias"].grad != 0).any())


def test_stacks_that_may_drop_biases_are_left_out_or_refused(tmp_path):
    config = tiny_config("cohere").to_dict()
    assert "vllm" in Target.of(config).stacks
    target = Target.of(config, qk_bias=True)
    assert "vllm" not in target.stacks
    assert "biases of queries and keys in cohere" in target.left_out["vllm"]
    assert all(STACKS[name].reads_biases(FAMILIES["qwen2"]) for name in STACKS)
    assert {name for name in STACKS if STACKS[name].reads_biases(FAMILIES["llama"])} >= {"vllm", "sglang", "llama.cpp"}
    run = finished_run(tmp_path, "scale", "cohere", settings=("rope.qk_bias=true",))
    asked = parse_recipe(run.recipe.to_dict(), ["export.stacks=[vllm]"])
    with pytest.raises(UserError, match="vllm: is not known to read biases of queries and keys in this family"):
        export(Run(asked, run.folder))


def test_a_checkpoint_whose_biases_a_stack_drops_does_not_verify(tmp_path):
    settings = ("rope.qk_bias=true", "export.stacks=[transformers]")
    target = export(finished_run(tmp_path, "scale", "cohere", settings=settings))
    checked = verify(str(target), ["transformers", "vllm"])
    assert [bool(line.problems) for line in checked.lines] == [False, True]
    assert not checked.passed


def test_an_export_is_checked_on_the_stacks_that_read_its_biases(tmp_path):
    """LMDeploy reads biases in llama but not in granite, where an export with biases still passes on the others."""
    for family, read in (("llama", True), ("granite", False)):
        folder = tmp_path / family
        folder.mkdir()
        target = export(finished_run(folder, "scale", family, settings=("rope.qk_bias=true",)))
        checked = verify(str(target))
        assert checked.passed
        assert ("lmdeploy" in [line.stack for line in checked.lines]) == read
        unread = "not checked: lmdeploy is not known to read biases"
        assert any(note.startswith(unread) for note in checked.traps) != read
