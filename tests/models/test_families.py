"""A family takes one row: a made-up model type, a copy of Llama's classes, goes from training to a verified export."""

import json

import pytest
import torch
from tiny import recipe_tree, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from yarn_tune.api import Tuning
from yarn_tune.errors import UserError
from yarn_tune.models.families import FAMILIES, Q_PROJ, Family, family_of
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.models.token_loss import logit_transform


class PangolinConfig(LlamaConfig):
    model_type = "pangolin"
    pangolin_theta: float = 1e4
    logit_shrink: float = 2.0


class PangolinForCausalLM(LlamaForCausalLM):
    config_class = PangolinConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / self.config.logit_shrink
        return output


ROW = Family(model_type="pangolin", queries=Q_PROJ, logit_divisor_key="logit_shrink")


@pytest.fixture
def pangolin(monkeypatch, tmp_path):
    """A checkpoint of the made-up family."""
    AutoConfig.register("pangolin", PangolinConfig, exist_ok=True)
    AutoModelForCausalLM.register(PangolinConfig, PangolinForCausalLM, exist_ok=True)
    monkeypatch.setitem(FAMILIES, "pangolin", ROW)
    llama = tiny_model("llama")
    config = PangolinConfig(**{k: v for k, v in tiny_config("llama").to_dict().items() if k != "model_type"})
    model = PangolinForCausalLM(config)
    model.load_state_dict(llama.state_dict())
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_row_is_all_that_a_family_needs(pangolin, tmp_path):
    tree = recipe_tree(pangolin, tmp_path, steps=2)
    tree["rope"] = {"window": 256, "query_gains": "pair_phase"}
    tuning = Tuning(tree, folder=tmp_path / "run")
    tuning.train()
    target = tuning.export()
    checked = tuning.verify()
    assert checked.passed
    assert len(checked.lines) >= 4
    assert max(json.loads((target / "fidelity.json").read_text())["max_abs_logit_difference"].values()) <= 1e-4
    served = AutoModelForCausalLM.from_pretrained(target)
    assert type(served) is PangolinForCausalLM
    assert served.config.rope_parameters["rope_type"] == "longrope"
    base = AutoModelForCausalLM.from_pretrained(pangolin)
    changed = [n for n, p in served.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert sorted(changed) == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]


def test_without_its_row_it_is_refused(pangolin, monkeypatch):
    config = AutoConfig.from_pretrained(pangolin)
    assert rope_facts(config).model_type == "pangolin"
    assert logit_transform(config)(torch.ones(1)).item() == 0.5
    monkeypatch.delitem(FAMILIES, "pangolin")
    with pytest.raises(UserError, match="pangolin cannot be tuned: it is not supported yet; supported model types"):
        rope_facts(config)
    assert family_of("pangolin").queries is None
