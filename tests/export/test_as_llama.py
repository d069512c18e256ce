"""`export.as_llama`: a Mistral without a sliding window, written as the Llama that computes the same."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import finished_run, recipe_tree, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MistralForCausalLM
from yarn_tune.adapter.files import read_sections, write_adapter
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.models.query_layout import as_twin
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.runs.folder import AdapterRun, Run
from yarn_tune.runs.learned import learned_of
from yarn_tune.training.loop import train
from yarn_tune.tunable.rotary import at_start

IDS = torch.arange(200)[None] % 127
SIZES = {"biases.query_size": 1.0, "biases.key_size": 1.0}


def logits(folder, kind):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert isinstance(model, kind)
        return model(IDS).logits


@pytest.mark.parametrize("gains", ["none", "pair_phase"])
def test_the_same_computation_bit_for_bit(tmp_path, gains):
    exports = []
    for name in ("as_mistral", "as_llama"):
        settings = (f"rope.query_gains={gains}", f"export.as_llama={str(name == 'as_llama').lower()}")
        exports.append(export(finished_run(tmp_path / name, "per_pair", "mistral", settings=settings)))
    assert torch.equal(logits(exports[0], MistralForCausalLM), logits(exports[1], LlamaForCausalLM))
    one, other = (json.loads((path / "config.json").read_text()) for path in exports)
    assert {key for key in one if one[key] != other.get(key)} <= {"model_type", "architectures", "sliding_window"}
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (exports[0] / file).read_bytes() == (exports[1] / file).read_bytes()
    assert AutoTokenizer.from_pretrained(exports[1])("w1 w2")["input_ids"] == [2, 3]


def test_biases_are_learned_on_a_mistral_and_written_as_those_of_a_llama(tmp_path):
    """The export compares its logits with the tuned Mistral's; here its files are read, and the adapter's."""
    run = finished_run(tmp_path, "per_pair", "mistral", settings=("rope.qk_bias=true", "export.as_llama=true"), **SIZES)
    learned, target = learned_of(run), export(run)
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert model.config.attention_bias
    fold = learned.folds[0]
    gain = json.loads((target / "fidelity.json").read_text())["fold"]["gain"]
    attention = model.model.layers[1].self_attn
    torch.testing.assert_close(attention.k_proj.bias.double(), fold.key[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(attention.q_proj.bias.double(), gain * fold.query[1], rtol=1e-6, atol=1e-7)
    assert not attention.v_proj.bias.any()
    assert not attention.o_proj.bias.any()
    assert max(json.loads((target / "fidelity.json").read_text())["max_abs_logit_difference"].values()) <= 1e-4

    rotary = at_start(run.base, run.recipe.rope)
    rotary.load_numbers(load_file(run.numbers_path))
    write_adapter(run.folder / "adapter", run.recipe, rotary, "model.rotary_emb")
    again = export(AdapterRun(read_sections(run.folder / "adapter"), run.folder / "adapter"))
    assert torch.equal(logits(target, LlamaForCausalLM), logits(again, LlamaForCausalLM))
    mistral = MistralForCausalLM.from_pretrained(run.recipe.base.model, dtype=torch.float32)
    with pytest.raises(UserError, match="merging does not change the class of a loaded model"):
        PeftModel.from_pretrained(mistral, run.folder / "adapter").merge_and_unload()


def test_training_learns_them(tmp_path):
    tree = recipe_tree(save_tiny(tmp_path / "base", "mistral"), tmp_path)
    run = Run(parse_recipe(tree, ["rope.qk_bias=true", "export.as_llama=true"]), tmp_path / "run")
    assert train(run).folds[0].query.any()


@pytest.mark.parametrize(
    ("family", "extra", "settings", "message"),
    [
        ("mistral", {}, ["rope.qk_bias=true"], r"rope\.qk_bias: mistral .* set export\.as_llama to true"),
        ("mistral", {"sliding_window": 256}, ["export.as_llama=true"], "within a sliding window of 256 tokens"),
        ("qwen2", {}, ["export.as_llama=true"], "qwen2 does not compute what a Llama computes"),
        ("llama", {}, ["export.as_llama=true"], "llama does not compute"),
    ],
)
def test_what_cannot_be_written_as_a_llama_is_refused_before_training(tmp_path, family, extra, settings, message):
    tree = recipe_tree(save_tiny(tmp_path / "base", family, **extra), tmp_path)
    with pytest.raises(UserError, match=message):
        train(Run(parse_recipe(tree, settings), tmp_path / "run"))


def test_keys_that_a_config_omits_keep_the_defaults_of_its_own_class():
    """A Mistral has 8 key heads by default, a Llama as many as query heads."""
    twin = as_twin({"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 16, "sliding_window": None})
    assert (twin["num_key_value_heads"], twin["intermediate_size"], twin["rms_norm_eps"]) == (8, 14336, 1e-6)
    assert "sliding_window" not in twin
