"""Queries that grow with the position (llama_4_scaling_beta), and rotary dimensions of latent attention."""

import json

import pytest
import torch
from tiny import GROWING, finished_run, recipe_tree, save_tiny, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, DeepseekV4Config, Mistral4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale
from transformers.models.mistral4.modeling_mistral4 import Mistral4Model, Mistral4RotaryEmbedding
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export, export_overrides
from yarn_tune.models.base import BaseModel
from yarn_tune.models.rope_config import layout_of, rope_facts
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.serving.conformance import expected_rope
from yarn_tune.serving.selection import Target, choose_encoding, make_representable
from yarn_tune.serving.stacks import default_stacks, reading
from yarn_tune.serving.verification import verify
from yarn_tune.tunable.rotary import at_start

BETA, ORIGINAL = GROWING["llama_4_scaling_beta"], GROWING["original_max_position_embeddings"]


@pytest.mark.parametrize("frequencies", ["scale", "ramp", "per_pair"])
def test_the_rule_of_the_base_stays_in_the_export(tmp_path, frequencies):
    """Beta and its original length are the base's, where transformers and where vLLM read them."""
    target = export(finished_run(tmp_path, frequencies, "ministral3"))
    config = json.loads((target / "config.json").read_text())
    section = config["rope_parameters"]
    assert (section["llama_4_scaling_beta"], section["original_max_position_embeddings"]) == (BETA, ORIGINAL)
    assert config["llama_4_scaling"] == {"beta": BETA, "original_max_position_embeddings": ORIGINAL}
    assert config["max_position_embeddings"] >= 256
    for name in ("transformers", "vllm", "vllm-0.29"):
        assert reading(name, config).query_growth == (BETA, ORIGINAL)
    left_out = Target.of(config).left_out or {}
    assert "llama_4_scaling_beta" in left_out["sglang"]
    assert set(default_stacks()) - set(left_out) == {"transformers", "vllm", "vllm-0.29"}
    assert verify(str(target)).passed


def test_queries_of_the_export_grow_as_in_the_base(tmp_path):
    """The last layer's queries against transformers' own function, at the positions of the new window."""
    target = export(finished_run(tmp_path, "scale", "ministral3"))
    model = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
    attention = model.model.layers[0].self_attn
    positions = torch.arange(256)[None]
    growth = get_llama_4_attn_scale(positions, BETA, ORIGINAL).squeeze()
    assert growth[-1] == pytest.approx(1 + 0.1 * torch.tensor(8.0).log().item())
    seen = {}
    attention.q_proj.register_forward_hook(lambda module, inputs, output: seen.update(q=output))
    attention.k_proj.register_forward_hook(lambda module, inputs, output: seen.update(k=output))
    with torch.no_grad():
        weights = model(positions % 127, output_attentions=True, use_cache=False).attentions[0]
        cos, sin = model.model.rotary_emb(seen["q"], positions)

    def rotated(x):
        x = x.view(256, -1, 16).transpose(0, 1)
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    logits = growth[:, None] * rotated(seen["q"]) @ rotated(seen["k"]).repeat_interleave(2, 0).mT * 16**-0.5
    logits = logits + torch.full((256, 256), -torch.inf).triu(1)
    torch.testing.assert_close(weights[0], logits.softmax(-1), rtol=0, atol=1e-5)


def test_a_smaller_factor_needs_factors_per_pair(tmp_path):
    """With the original length fixed, YaRN's factor is the window's: a smaller one is written as a list."""
    base = save_tiny(tmp_path / "base", "ministral3")
    recipe = parse_recipe(recipe_tree(base, tmp_path), ["rope.frequencies=scale"])
    rotary = at_start(BaseModel(recipe.base), recipe.rope)
    target = Target.of_model(BaseModel(recipe.base), recipe.export, recipe.rope)
    for log_scale, name in ((0.0, "yarn"), (0.2, "yarn"), (-0.2, "longrope")):
        rotary.load_numbers({"offsets.log_scale": torch.tensor([log_scale]), "log_temperature": torch.zeros(1)})
        learned = make_representable(rotary.learned(), target)
        served = choose_encoding(learned, target)
        assert served.name == name
        assert served.rope_parameters["original_max_position_embeddings"] == ORIGINAL
        assert expected_rope(learned, target.base).query_growth == (BETA, ORIGINAL)
        torch.testing.assert_close(served.inv_freq(16), rotary.table()[0], rtol=4e-3, atol=0)


def test_the_start_has_the_multiplier_of_the_base(tmp_path):
    """The growth takes the place of YaRN's temperature."""
    recipe = parse_recipe(recipe_tree(save_tiny(tmp_path / "base", "ministral3"), tmp_path), [])
    assert at_start(BaseModel(recipe.base), recipe.rope).learned().attention_factor == pytest.approx(1.0)


def test_overrides_carry_the_rule(tmp_path):
    run = finished_run(tmp_path, "scale", "ministral3", **{"offsets.log_scale": 0.1})
    overrides = json.loads(export_overrides(run).read_text())
    assert overrides["llama_4_scaling"] == {"beta": BETA, "original_max_position_embeddings": ORIGINAL}


@pytest.mark.parametrize("key", ["llama_4_scaling_beta", "original_max_position_embeddings"])
def test_a_base_without_the_rule_is_refused(key):
    config = tiny_config("ministral3")
    config.rope_parameters = {k: v for k, v in GROWING.items() if k != key} | {"rope_type": "default"}
    with pytest.raises(UserError, match=f"{key} is missing in the rope section of this ministral3"):
        rope_facts(config)


# Latent attention rotates qk_rope_head_dim dimensions, whatever share of head_dim a config states.

LATENT_SIZES = [(16, 16, None), (24, 8, None), (24, 8, 0.25), (48, 16, 0.25)]


@pytest.mark.parametrize(("unrotated", "rotated", "share"), LATENT_SIZES)
def test_rotary_dimensions_of_mistral4(unrotated, rotated, share):
    section = GROWING | ({} if share is None else {"partial_rotary_factor": share})
    sizes = {"qk_nope_head_dim": unrotated, "qk_rope_head_dim": rotated}
    sizes |= {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2 * ORIGINAL}
    config = Mistral4Config(rope_parameters=dict(section), **sizes)
    rotary = Mistral4RotaryEmbedding(config)
    written = config.to_dict()
    layout = layout_of(written)
    assert layout.rotary_dim(config.rope_parameters["partial_rotary_factor"]) == 2 * len(rotary.inv_freq) == rotated
    (table,) = reading("transformers", written).tables[""]
    assert torch.equal(table.inv_freq, rotary.inv_freq)
    assert table.multiplier == pytest.approx(rotary.attention_scaling)


def test_mistral4_multiplies_its_logits_as_read():
    """The gain on all logits and the growth of the queries, against the attention class."""
    config = Mistral4Config(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, kv_lora_rank=32, q_lora_rank=24, vocab_size=128,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=2, num_experts_per_tok=2,
        moe_intermediate_size=32, intermediate_size=96, max_position_embeddings=32 * ORIGINAL,
        rope_parameters=GROWING | {"factor": 32.0},
    )  # fmt: skip
    found = reading("transformers", config.to_dict())
    attention = Mistral4Model(config).layers[0].self_attn
    assert attention.scaling * 32**0.5 == pytest.approx(found.softmax_gain)
    assert found.softmax_gain > 1.5
    assert found.query_growth == (BETA, ORIGINAL)
    with pytest.raises(UserError, match="no class for this language model alone"):
        rope_facts(config)


@pytest.mark.parametrize(("head", "rotated"), [(64, 16), (512, 64), (32, 32)])
def test_rotary_dimensions_of_deepseek_v4(head, rotated):
    """One table per kind; the share of each head is that of qk_rope_head_dim, and is not applied to it again."""
    config = DeepseekV4Config(head_dim=head, qk_rope_head_dim=rotated, rope_theta=2e4, compress_rope_theta=3e5)
    rotary = DeepseekV4RotaryEmbedding(config)
    written = config.to_dict()
    layout = layout_of(written)
    found = reading("transformers", written)
    assert set(found.tables) == {"main", "compress"}
    for kind, (table,) in found.tables.items():
        assert torch.equal(table.inv_freq, getattr(rotary, f"{kind}_inv_freq"))
        assert layout.rotary_dim(config.rope_parameters[kind]["partial_rotary_factor"]) == rotated
        assert len(table.inv_freq) == rotated // 2
    with pytest.raises(UserError, match="rotary modules of their own"):
        rope_facts(config)


def test_an_indexer_chooses_the_same_tokens_in_the_export(tmp_path):
    """DeepSeek V3.2's indexer is rotated with the same table: with few tokens chosen, the export is still exact."""
    base = save_tiny(tmp_path / "base", "deepseek_v32", index_topk=24)
    fidelity = json.loads(
        (export(finished_run(tmp_path, "scale", "deepseek_v32", base=base)) / "fidelity.json").read_text()
    )
    assert max(fidelity["max_abs_logit_difference"].values()) <= 1e-4
    model, ids = tiny_model("deepseek_v32", index_topk=24), torch.arange(100)[None]
    full = tiny_model("deepseek_v32", index_topk=512)
    with torch.no_grad():
        difference = (model(ids).logits - full(ids).logits).abs().max()
    assert difference > 1e-2, "the choice must matter"
