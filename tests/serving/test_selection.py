"""Learned numbers -> config: what each stack's reader makes of it, over many random settings."""

import math
import random
from dataclasses import replace

import pytest
import torch
from tiny import finished_run, save_tiny, tiny_config
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from yarn_tune.errors import UserError
from yarn_tune.models.rope_config import RopeFacts, rope_facts
from yarn_tune.rope import longrope_attention_factor, snapped_betas
from yarn_tune.runs.learned import learned_of
from yarn_tune.serving.encodings import lengths_for, longest
from yarn_tune.serving.selection import Target, choose_encoding, make_representable, unserved
from yarn_tune.serving.stacks import STACKS, default_stacks, reading
from yarn_tune.tunable.parameters import Learned

HEADS = (32, 64, 128, 256)


def base_config(facts: RopeFacts) -> dict:
    """config.json of a Llama-like base."""
    return {
        "model_type": "llama",
        "hidden_size": facts.head_dim * 4,
        "num_attention_heads": 4,
        "head_dim": facts.head_dim,
        "max_position_embeddings": facts.native,
        "rope_theta": facts.theta,
        "partial_rotary_factor": facts.partial_rotary_factor,
        "vocab_size": 128,
    }


def random_learned(rng: random.Random, kind: str) -> Learned:
    """s from 1 to 64, also below window / native; betas 0.05 to 200; a from 0.5 to 2.5; factors 0.5 to 64."""
    head = rng.choice(HEADS)
    partial = rng.choice([1.0, 0.5, 0.25])
    native = rng.choice([128, 256, 1000, 4096, 8192, 131072])
    window = round(native * rng.uniform(1, 32))
    dim = int(head * partial)
    facts = RopeFacts(
        model_type="llama", theta=rng.choice([1e4, 5e5, 1e6]), dim=dim, head_dim=head, native=native,
        partial_rotary_factor=partial,
    )  # fmt: skip
    attention = rng.uniform(0.5, 2.5)
    common = {"frequencies": kind, "facts": facts, "native": native, "window": window, "temperature": attention**-2}
    if kind == "per_pair":
        return Learned(**common, factors=[rng.uniform(0.5, 64) for _ in range(dim // 2)])
    if kind == "scale":
        fast, slow = snapped_betas(facts.theta, dim, native)
    else:
        slow = rng.uniform(0.05, 5)
        fast = slow + rng.uniform(0.1, 195)
    return Learned(**common, original=native, scale=rng.uniform(1, 64), beta_slow=slow, beta_fast=fast)


def settled(rng: random.Random, kind: str, **options) -> tuple[Learned, Target]:
    """As everything after training uses it; the table moves by no more than the ratio's resolution."""
    learned = random_learned(rng, kind)
    target = Target.of(base_config(learned.facts), **options)
    found = make_representable(learned, target)
    original = found.original or 1
    resolution = 2e-6 if found.factors is not None else 2e-6 + 0.5 / original
    torch.testing.assert_close(found.inv_freq(), learned.inv_freq(), rtol=resolution, atol=0)
    assert make_representable(found, target) == found
    assert found.attention_factor == pytest.approx(learned.attention_factor, rel=1e-5)
    return found, target


@pytest.mark.parametrize("kind", ["scale", "ramp", "per_pair"])
@pytest.mark.parametrize("fold", ["auto", "never", "always"])
def test_every_default_stack_serves_what_was_learned(kind, fold):
    """The property: frequencies within 1e-5, multiplier x fold within 1e-6, the window never short; or refused."""
    rng = random.Random(f"{kind} {fold}")
    refused = []
    for _ in range(80):
        try:
            learned, target = settled(rng, kind, fold=fold)
        except UserError as error:
            refused.append(str(error))
            continue
        served = choose_encoding(learned, target)
        config = served.config(target.base)
        assert served.max_position_embeddings >= learned.window
        for name in default_stacks():
            found = reading(name, config)
            assert found.refusal is None
            assert found.window >= learned.window
            assert found.rows is None or found.rows >= found.window
            for table in found.tables[""]:
                torch.testing.assert_close(table.inv_freq, learned.inv_freq(), rtol=1e-5, atol=0)
                total = table.multiplier * math.sqrt(served.fold)
                assert total == pytest.approx(learned.attention_factor, rel=1e-6)
        assert (served.fold == 1.0) or fold != "never"
        assert (served.fold != 1.0) or fold != "always"
    # LMDeploy reads no key beside a list of factors, and its formula gives only some values above 1.
    assert not refused or (kind, fold) == ("per_pair", "never")
    assert all("lmdeploy: multiplies cos and sin by 1 instead of" in text for text in refused)
    assert len(refused) < 60


@pytest.mark.parametrize("name", [name for name in STACKS if name not in default_stacks()])
def test_every_other_stack_serves_it_or_is_refused_by_name(name):
    """No third case: a config comes back only if that stack's reader computes the learned numbers from it."""
    rng = random.Random(name)
    served, refused = 0, []
    for kind in ("scale", "ramp", "per_pair"):
        for _ in range(12):
            learned = random_learned(rng, kind)
            target = Target.of(base_config(learned.facts), stacks=[name])
            try:
                numbers = make_representable(learned, target)
            except UserError as error:
                refused.append(str(error))
                continue
            assert not unserved(choose_encoding(numbers, target), numbers, target)
            served += 1
    assert all(f"  {name}: " in text and "export.stacks" in text for text in refused)
    assert served or name in ("ctranslate2", "onnx-genai", "turbomind", "exllamav2", "tgi", "llama.cpp")


@pytest.mark.parametrize("kind", ["scale", "ramp", "per_pair"])
def test_transformers_computes_it_to_the_bit(kind):
    rng = random.Random(kind)
    for _ in range(60):
        learned, target = settled(rng, kind)
        served = choose_encoding(learned, target)
        config = served.config(target.base)
        loaded = LlamaConfig.from_dict(config)
        section = config["rope_parameters"]
        for length in (learned.native // 2, served.max_position_embeddings):
            inv_freq, attention = ROPE_INIT_FUNCTIONS[section["rope_type"]](loaded, seq_len=length)
            assert torch.equal(inv_freq, learned.inv_freq())
            assert attention * math.sqrt(served.fold) == pytest.approx(learned.attention_factor, rel=1e-12)
        assert torch.equal(served.inv_freq(learned.facts.dim), inv_freq)


def test_weights_are_left_alone_where_the_stacks_allow_it():
    """auto folds only where no key reaches a stack: factors with a < 1 on LMDeploy, and stacks of different keys."""
    rng = random.Random(0)
    for kind in ("scale", "ramp", "per_pair"):
        for _ in range(30):
            learned, target = settled(rng, kind)
            likely = learned.window >= 2048 and 1.05 < learned.attention_factor < 1.3
            if kind != "per_pair" or likely:
                assert choose_encoding(learned, target).fold == 1.0
            if kind == "per_pair" and learned.attention_factor < 1:
                assert choose_encoding(learned, target).fold != 1.0
    learned = random_learned(random.Random(1), "scale")
    both = ["vllm-0.29", "tgi", "transformers"]  # tgi reads mscale, vLLM 0.29 attn_factor: only a fold reaches both
    target = Target.of(base_config(learned.facts), stacks=both)
    served = choose_encoding(make_representable(learned, target), target)
    assert served.name == "yarn, folded"
    with pytest.raises(UserError, match=r"allow folding into the weights \(export.fold: auto\)"):
        make_representable(learned, Target.of(base_config(learned.facts), stacks=both, fold="never"))


def test_the_formula_of_longrope_carries_the_attention_factor():
    """LMDeploy reads no key under longrope; original and served length are chosen so that its formula gives a."""
    learned = random_learned(random.Random(3), "per_pair")
    while not 1.02 < learned.attention_factor < 1.6:
        learned = random_learned(random.Random(learned.window), "per_pair")
    target = Target.of(base_config(learned.facts))
    served = choose_encoding(make_representable(learned, target), target)
    assert served.name == "longrope, formula"
    section = served.rope_parameters
    original = section["original_max_position_embeddings"]
    formula = longrope_attention_factor(served.max_position_embeddings / original, original)
    assert formula == pytest.approx(learned.attention_factor, rel=1e-6)
    assert learned.window <= served.max_position_embeddings <= longest(learned.window)


def test_longrope_cannot_depend_on_which_list_is_read():
    for seed in range(20):
        section = choose_encoding(*settled(random.Random(seed), "per_pair")).rope_parameters
        assert section["short_factor"] == section["long_factor"]
        assert section["attention_factor"] == section["short_mscale"] == section["long_mscale"]
        assert section["original_max_position_embeddings"] > 1


def test_theta_is_wherever_a_reader_looks():
    for kind in ("ramp", "per_pair"):
        learned, target = settled(random.Random(0), kind)
        served = choose_encoding(learned, target)
        config = served.config(target.base)
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == learned.facts.theta
        assert config["rope_scaling"] == config["rope_parameters"]
        assert "original_max_position_embeddings" not in config
        if served.fold == 1.0:
            assert served.overrides(target.base)["rope_parameters"]["rope_theta"] == learned.facts.theta


def test_overrides_are_refused_where_weights_were_folded():
    learned, target = settled(random.Random(0), "scale", fold="always")
    with pytest.raises(UserError, match="folded into the weights"):
        choose_encoding(learned, target).overrides(target.base)


def test_whole_pair_ramps_serve_readers_that_round_and_readers_that_do_not():
    """`scale` keeps the published ramp: vLLM <= 0.11 (always rounds) and ORT GenAI (never does) read the same."""
    learned = random_learned(random.Random(5), "scale")
    while learned.facts.partial_rotary_factor != 1 or learned.native < 4096:
        learned = random_learned(random.Random(learned.window), "scale")
    target = Target.of(base_config(learned.facts), stacks=["transformers", "vllm-0.11", "onnx-genai"])
    served = choose_encoding(make_representable(learned, target), target)
    assert "truncate" not in served.rope_parameters
    tables = [reading(n, served.config(target.base)).tables[""][0].inv_freq for n in target.stacks]
    assert not torch.equal(tables[0], tables[2])
    torch.testing.assert_close(tables[0], tables[2], rtol=1e-5, atol=0)


def test_a_family_that_a_default_stack_runs_unscaled():
    """SGLang has Gemma without scaling: left out by default and said so, refused where asked for by name."""
    base = tiny_config("gemma").to_dict()
    assert "sglang" not in Target.of(base).stacks
    assert "without any RoPE scaling" in Target.of(base).left_out["sglang"]
    facts = RopeFacts(model_type="gemma", theta=1e4, dim=16, head_dim=16, native=64, partial_rotary_factor=1.0)
    learned = Learned(
        frequencies="scale", facts=facts, native=64, window=256, temperature=0.8, scale=4.0, original=64,
        beta_fast=32.0, beta_slow=1.0,
    )  # fmt: skip
    with pytest.raises(UserError, match="sglang: frequencies off by"):
        make_representable(learned, Target.of(base, stacks=["sglang", "vllm"]))


def test_latent_attention_without_anything_to_extend():
    """DeepSeek's keys are multiples of ln s, which is 0 where the window is the base's own."""
    config = tiny_config("deepseek_v2")
    plain = Learned(
        frequencies="scale", facts=rope_facts(config), native=64, window=64, temperature=1.0, scale=1.0, original=64,
        beta_fast=32.0, beta_slow=1.0,
    )  # fmt: skip
    target = Target.of(config.to_dict())
    served = choose_encoding(make_representable(plain, target), target)
    assert served.name == "yarn, latent"
    assert "mscale" not in served.rope_parameters
    with pytest.raises(UserError, match=r"vllm: multiplies cos and sin by 1 instead of 1.05409"):
        make_representable(replace(plain, temperature=0.9), target)


def test_the_nominal_factor_keeps_the_native_window():
    assert lengths_for(8.0, 256, 2048) == (256, 2048)
    assert lengths_for(4.0, 8192, 32768) == (8192, 32768)


@pytest.mark.parametrize(("scale", "native", "window"), [(7.83, 4096, 32768), (8.37, 256, 2048), (1.0, 64, 64)])
def test_lengths_carry_the_learned_factor(scale, native, window):
    original, length = lengths_for(scale, native, window)
    assert length >= window
    assert length / original == pytest.approx(scale, rel=1e-4)
    assert length <= longest(window)


def test_partial_rotary_stands_where_old_and_new_readers_look():
    learned, target = settled(random.Random(0), "ramp")
    share = learned.facts.partial_rotary_factor
    assert share < 1
    config = choose_encoding(learned, target).config(target.base)
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == share
    loaded = AutoConfig.for_model(**config)
    assert loaded.rope_parameters["partial_rotary_factor"] == share


@pytest.mark.parametrize(("original", "betas"), [(64, (32.0, 1.0)), (32, (4.0, 0.5)), (4096, (32.0, 1.0))])
def test_a_ramp_that_begins_at_the_first_pair_is_read_alike_with_and_without_rounding(original, betas, tmp_path):
    """vLLM rounds the ends of the ramp of latent attention, transformers as the config says."""
    section = {
        "rope_type": "yarn", "rope_theta": 5e4, "factor": 2.0, "original_max_position_embeddings": original,
        "beta_fast": betas[0], "beta_slow": betas[1], "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    base = save_tiny(tmp_path / "base", "deepseek_v3", qk_rope_head_dim=64, max_position_embeddings=2 * original,
                     rope_parameters=section)  # fmt: skip
    run = finished_run(tmp_path, "scale", window=16 * original, base=base)
    learned, target = learned_of(run), Target.of_model(run.base, run.recipe.export, run.recipe.rope)
    assert {"transformers", "vllm", "vllm-0.29", "vllm-0.19"} <= {*target.stacks}
    config = choose_encoding(learned, target).config(run.base.written)
    for stack in ("transformers", "vllm"):
        (found,) = reading(stack, config).tables[""]
        torch.testing.assert_close(found.inv_freq, learned.inv_freq(), rtol=1e-6, atol=0)
