"""Where each family's queries are, and which rows belong to which pair, checked against its own model class."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny import FAMILY_SIZES, LATENT, VOCABULARY, YARN_ALONE, finished_run, save_tiny, tiny_model
from yarn_tune.export.checkpoint import export
from yarn_tune.models.families import FAMILIES
from yarn_tune.models.query_layout import query_site
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.models.token_loss import logit_transform
from yarn_tune.tunable.attachment import attach_fixed, detach
from yarn_tune.tunable.query_gains import GainFold

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{family: (family, {}) for family in FAMILY_SIZES if FAMILIES[family].queries is not None},
    "cohere with a norm of the queries": ("cohere", {"use_qk_norm": True}),
    "deepseek_v3, pairs are halves": ("deepseek_v3", {"rope_interleave": False}),
    "deepseek_v3, plain queries": ("deepseek_v3", {**LATENT, "q_lora_rank": None}),
    "falcon, per head": ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
    "falcon, multi-query": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "glm4_moe without a norm": ("glm4_moe", {"use_qk_norm": False}),
    "persimmon without a norm": ("persimmon", {"qk_layernorm": False}),
    "phi with a norm of the queries": ("phi", {"qk_layernorm": True}),
    "stablelm with a norm per head": ("stablelm", {"qk_layernorm": True}),
}
NESTED = ("gemma3_text", "gemma3n_text", "olmo3")
"""Their sliding layers have a table of their own, so these are tested without any."""
IDS = torch.randint(1, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(48)[None]
TURN = 8
"""Tokens in which the pair under test makes one turn."""


@torch.no_grad()
def change(model, site, pair: int, stretch: int) -> float:
    """Largest change of a logit by multiplying all positions with `stretch`, where queries have `pair` alone."""
    count = site.pairs.numel() // 2
    inv_freq = 0.3 + 0.37 * torch.arange(count)
    inv_freq[pair] = 2 * math.pi / TURN
    gains = torch.zeros(len(site.layers), site.groups, count)
    gains[..., pair] = 2.0
    attach_fixed(model, lambda length: (inv_freq, 1.0), (GainFold(site, gains),))
    mask = torch.ones_like(IDS)
    read = partial(model, IDS, attention_mask=mask, use_cache=False)
    logits = [read(position_ids=by * POSITIONS).logits for by in (1, stretch)]
    detach(model)
    return (logits[0] - logits[1]).abs().max().item()


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_belong_to_the_pairs_that_the_model_rotates(name):
    """One pair alone makes the model periodic in its positions; rows of another pair break that."""
    family, extra = VARIANTS[name]
    extra = extra | ({"layer_types": ["full_attention"] * 3} if family in NESTED else {})
    model = tiny_model(family, **extra)
    model.config.rope_parameters |= {"llama_4_scaling_beta": 0.0} if family == "ministral3" else {}  # no growth here
    site = query_site(model.config.to_dict())
    half = site.pairs.numel() // 2
    assert 2 * half == rope_facts(model.config).dim
    interleaved = torch.equal(site.pairs, torch.arange(half).repeat_interleave(2))
    other = torch.arange(half).repeat(2) if interleaved else torch.arange(half).repeat_interleave(2)
    for pair in (0, half - 2):
        whole_turns = change(model, site, pair, TURN + 1)
        assert whole_turns < 1e-3
        assert change(model, site, pair, TURN // 2 + 1) > 30 * whole_turns, "the pair must matter"
        assert change(model, replace(site, pairs=other), pair, TURN + 1) > 30 * whole_turns


@pytest.mark.parametrize("family", FAMILY_SIZES)
def test_logits_are_those_of_the_model(family):
    """From hidden states, the vocabulary matrix and the family's transform."""
    model = tiny_model(family)
    with torch.no_grad():
        hidden = model.base_model(IDS, use_cache=False).last_hidden_state
        logits, transform = model.get_output_embeddings()(hidden), logit_transform(model.config)
        expected = model(IDS, use_cache=False).logits
    torch.testing.assert_close(transform(logits) if transform else logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in FAMILY_SIZES])
def test_odd_variants_export_what_was_learned(tmp_path, name):
    """export() reloads the folded checkpoint and compares its logits with the hooks in memory."""
    family, extra = VARIANTS[name]
    base = save_tiny(tmp_path / "base", family, **extra)
    frequencies = "scale" if family in YARN_ALONE else "per_pair"
    target = export(finished_run(tmp_path, frequencies, base=base, settings=("rope.query_gains=pair",)))
    fidelity = json.loads((target / "fidelity.json").read_text())
    assert max(fidelity["max_abs_logit_difference"].values()) <= 1e-4
