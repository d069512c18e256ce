"""The temperature in the weights equals the temperature on cos and sin, for every family, to float32."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILY_SIZES, LATENT, THETA_ONLY, VOCABULARY, tiny_config
from transformers import AutoModelForCausalLM
from yarn_tune.errors import UserError
from yarn_tune.models.families import FAMILIES, FULL
from yarn_tune.models.query_layout import query_site
from yarn_tune.tunable.folding import fold_checkpoint, fold_tensor
from yarn_tune.tunable.lora import merge_checkpoint
from yarn_tune.tunable.query_gains import GainFold

A = 1.27
IDS = torch.randint(1, VOCABULARY, (2, 96), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, tuple[str, dict[str, object]]] = {
    **{family: (family, dict(extra)) for family, extra in FAMILY_SIZES.items() if FAMILIES[family].queries},
    "deepseek_v3, pairs are halves": ("deepseek_v3", {"rope_interleave": False}),
    "deepseek_v3, plain queries": ("deepseek_v3", LATENT),
    "falcon, multi-query": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 4}),
    "falcon, per head": ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
    "cohere, norm": ("cohere", {"use_qk_norm": True}),
    "phi, norm": ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    "persimmon, no norm": ("persimmon", {"qk_layernorm": False}),
    "stablelm, norm": ("stablelm", {"qk_layernorm": True, "partial_rotary_factor": 0.25, "hidden_size": 128}),
}


def config_of(case: str, attention_factor: float):
    """A config whose tuned layers multiply cos and sin by `attention_factor`."""
    family, extra = SIZES[case]
    config = tiny_config(family, **extra)
    rope = config.rope_parameters
    nested = "rope_theta" not in rope
    own = rope[FULL] if nested else rope
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if family == "phi3":
        ones = [1.0] * (int(head_dim * own.get("partial_rotary_factor", 1.0)) // 2)
        new = {"rope_type": "longrope", "short_factor": ones, "long_factor": ones, "factor": 1.0}
    else:
        new = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    kept = {k: own[k] for k in ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta") if k in own}
    section = {**kept, **new, "attention_factor": attention_factor}
    if not family.startswith(("deepseek", "falcon")):
        config.head_dim = head_dim
    config.max_position_embeddings = 128
    config.rope_parameters = {**rope, FULL: section} if nested else section
    return config


def random_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_every_family_is_here():
    folding = {each for each, row in FAMILIES.items() if row.alone and (row.queries or row.query_norm)}
    places = folding - {*THETA_ONLY}  # no config of these has a multiplier to fold
    assert {family for family, _ in SIZES.values()} >= places


@pytest.mark.rope_warnings
@pytest.mark.parametrize("case", SIZES)
def test_folded_equals_configured(case, tmp_path):
    wanted = random_model(config_of(case, A))
    plain = AutoModelForCausalLM.from_config(config_of(case, 1.0), dtype=torch.float32).eval()
    plain.load_state_dict(wanted.state_dict())
    expected, before = logits(wanted), logits(plain)
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    folded = fold_checkpoint(tmp_path, config, A * A)
    assert folded.rounding < 1e-6
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert (before - expected).abs().max() > 1e-2, "or the temperature does nothing here"
    scale = expected.abs().max().item()
    assert (found - expected).abs().max() < 2e-5 * max(1.0, scale)


def test_what_cannot_be_folded_is_refused_by_name():
    for family, extra, reason in (
        ("olmo", {"clip_qkv": 8.0}, "clamps its queries"),
        ("hunyuan_v1_dense", {}, "it is not known where to scale queries of hunyuan_v1_dense"),
        ("llama4_text", {}, "llama4_text"),
    ):
        with pytest.raises(UserError, match=reason):
            query_site(tiny_config(family, **extra).to_dict())


def test_bfloat16_rounding_is_measured(tmp_path):
    model = random_model(tiny_config("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    folded = fold_checkpoint(tmp_path, model.config.to_dict(), 1.1)
    after = load_file(tmp_path / "model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [name for name in before if name.endswith("q_proj.weight")]
    assert (folded.tensors, folded.numbers) == (3, 3 * 64 * 64)
    exact = torch.cat([before[name].double().flatten() * 1.1 for name in changed])
    rounded = torch.cat([after[name].double().flatten() for name in changed])
    assert folded.rounding == pytest.approx((rounded / exact - 1).square().mean().sqrt().item(), rel=1e-6)
    assert 1e-4 < folded.rounding < 5e-3


def test_shards_and_their_index(tmp_path):
    model = random_model(config_of("llama", 1.0))
    expected = logits(random_model(config_of("llama", A)))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    fold_checkpoint(tmp_path, model.config.to_dict(), A * A)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_a_checkpoint_without_queries(tmp_path):
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no tensor found"):
        fold_checkpoint(tmp_path, tiny_config("llama").to_dict(), 1.2)


def test_a_full_disk_is_told(tmp_path):
    """A limit of the file size is a message, in folding as in merging."""
    model = random_model(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    before, hard = (tmp_path / "model.safetensors").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    factors = {"model.layers.0.self_attn.q_proj.weight": (torch.ones(64, 1), torch.ones(1, 64))}
    ways = (
        lambda: fold_checkpoint(tmp_path, model.config.to_dict(), 1.1),
        lambda: merge_checkpoint(tmp_path, model.config.to_dict(), factors),
    )
    for way in ways:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(UserError, match=r"model.safetensors cannot be written \(File too large\); make room"):
                way()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("family", ["llama", "qwen2", "cohere"])
def test_a_gain_a_head_and_pair_commutes_with_the_rotation(family):
    """Any positive gain by head and pair before the rotation is that gain on the pair's part of each logit."""
    config = tiny_config(family)
    site = query_site(config.to_dict())
    heads, dim = site.rows.shape
    generator = torch.Generator().manual_seed(0)
    gains = 0.5 + torch.rand(3, heads, dim // 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(heads * dim, 64, generator=generator, dtype=torch.float64)
    x = torch.randn(64, generator=generator, dtype=torch.float64)
    exact = fold_tensor("model.layers.1.self_attn.q_proj.weight", weight, [GainFold(site, gains)])
    plain, scaled = (weight @ x).reshape(heads, dim), (exact @ x).reshape(heads, dim)
    first = torch.arange(dim).reshape(-1, 2)[:, 0] if family == "cohere" else torch.arange(dim // 2)
    second = first + (1 if family == "cohere" else dim // 2)
    for part in (first, second):
        torch.testing.assert_close(scaled[:, part], plain[:, part] * gains[1])
