"""The trainable rotary module: identity, gradients and frozen weights, for every family."""

import math

import pytest
import torch
from finite_differences import norm_of, slope_errors
from tiny import FAMILY_SIZES, NATIVE, VOCABULARY, tiny_config, tiny_model
from transformers import AutoModelForCausalLM
from yarn_tune.distributed.activation_memory import checkpoint_layers
from yarn_tune.errors import UserError
from yarn_tune.models.families import supported
from yarn_tune.models.loading import GIB, to_device
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.models.token_loss import NextToken
from yarn_tune.models.wrappers import rotary_site, switch_off_dropout
from yarn_tune.recipe.schema import Rope
from yarn_tune.rope import yarn_attention_factor
from yarn_tune.tunable.attachment import attach, attach_fixed, detach
from yarn_tune.tunable.parameters import Start

WINDOW = 4 * NATIVE
IDS = torch.randint(VOCABULARY, (2, 200), generator=torch.Generator().manual_seed(1))
SHORT = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(2))
LEARN = ("scale", "ramp", "per_pair")


def start_of(model, window: int = WINDOW, **rope: object) -> Start:
    return Start.of(rope_facts(model.config), Rope(window=window, **rope))


def loss_of(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    labels = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], 1)
    return NextToken(model)(ids, positions, labels) / (labels != -100).sum()


@pytest.mark.parametrize("family", supported())
def test_training_mode_computes_what_evaluation_does(family):
    """Wherever a family keeps its dropout: in modules, in attributes, or in the config."""
    config = tiny_config(family)
    probabilities = [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]
    if family == "diffllama":  # its config class accepts no scaling
        probabilities = []
    model = tiny_model(family, **dict.fromkeys(probabilities, 0.5))
    with torch.no_grad():
        expected = model(SHORT, use_cache=False).logits
        switch_off_dropout(model)
        assert torch.equal(model.train()(SHORT, use_cache=False).logits, expected)


def test_every_supported_family_is_tested():
    assert set(FAMILY_SIZES) == set(supported())


def stock_yarn(facts):
    """A plain YaRN section, of full-attention layers where layers differ by kind; or the base's own, further."""
    if facts.scaling is not None:
        return {**tiny_config(facts.model_type).rope_parameters, "factor": WINDOW / facts.scaling.ramp.original}
    section = {
        "rope_type": "yarn",
        "rope_theta": facts.theta,
        "factor": WINDOW / NATIVE,
        "original_max_position_embeddings": NATIVE,
        "partial_rotary_factor": facts.partial_rotary_factor,
    }
    if not facts.layer_kind:
        return section
    sliding = tiny_config(facts.model_type).rope_parameters["sliding_attention"]
    return {"full_attention": section, "sliding_attention": sliding}


@pytest.mark.parametrize("frequencies", LEARN)
@pytest.mark.parametrize("family", [family for family in supported() if family != "phi3"])  # its config accepts no YaRN
def test_the_start_is_stock_yarn(family, frequencies):
    """Untrained, the tuned model computes what the stock model does under a plain YaRN config, to the bit."""
    model = tiny_model(family)
    begin = start_of(model)
    stock = AutoModelForCausalLM.from_config(model.config)
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
        attach(model, begin, frequencies)
        tuned = model(IDS, use_cache=False).logits
    config = tiny_config(family)
    facts = begin.facts
    if family != "falcon":  # which computes it
        config.head_dim = facts.head_dim
    config.max_position_embeddings = WINDOW
    config.rope_parameters = stock_yarn(facts)
    yarn = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    yarn.load_state_dict(stock.state_dict())
    with torch.no_grad():
        expected = yarn(IDS, use_cache=False).logits
    assert not torch.allclose(plain, expected, atol=1e-3), "positions must matter for this test to mean anything"
    # `ramp` goes through unrounded betas that reproduce the rounded ramp to an ulp or two.
    torch.testing.assert_close(tuned, expected, rtol=0, atol=0 if frequencies == "per_pair" else 2e-5)


@pytest.mark.parametrize("family", supported())
def test_attach_at_factor_one_is_the_base_and_detach_restores_it(family):
    model = tiny_model(family)
    parent, name = rotary_site(model)
    stock = getattr(parent, name)
    with torch.no_grad():
        before = model(IDS[:, :NATIVE], use_cache=False).logits
        attach(model, start_of(model, NATIVE), "per_pair")
        during = model(IDS[:, :NATIVE], use_cache=False).logits
        detach(model)
        after = model(IDS[:, :NATIVE], use_cache=False).logits
    torch.testing.assert_close(during, before, rtol=0, atol=1e-5)
    assert torch.equal(after, before)
    assert getattr(parent, name) is stock


@pytest.mark.parametrize("frequencies", LEARN)
@pytest.mark.parametrize("family", supported())
def test_gradients_match_finite_differences(family, frequencies):
    """Along the gradient itself, where the signal is largest; in float32 the noise is about 1e-3."""
    model = tiny_model(family)
    if family == "longcat_flash":  # a step changes which experts it chooses, and the loss jumps
        for name, parameter in model.named_parameters():
            if "router" in name:
                torch.nn.init.zeros_(parameter)
    rotary = attach(model, start_of(model), frequencies)
    with torch.no_grad():  # off the start, where the ramp of `ramp` has its kinks exactly on pairs
        for parameter in rotary.parameters():
            parameter.add_(0.07)
    loss_of(model, SHORT).backward()
    gradients = [p.grad.clone() for p in rotary.parameters()]
    assert norm_of(gradients) > 1e-5
    steps = (5e-2, 1e-2, 2e-3, 5e-4, 1e-4)
    assert min(slope_errors(lambda: loss_of(model, SHORT), rotary.parameters(), gradients, steps)) < 0.02


@pytest.mark.parametrize("family", supported())
def test_only_the_learned_numbers_move(family):
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rotary = attach(model, start_of(model), "ramp")
    optimizer = torch.optim.SGD(rotary.trainable(), lr=1.0)
    for _ in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool((p != 0).all()) for p in rotary.parameters())
    detach(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("frequencies", "count"), [("scale", 2), ("ramp", 4), ("per_pair", 9)])
def test_shapes_and_counts(frequencies, count):
    model = tiny_model()
    rotary = attach(model, start_of(model), frequencies)
    assert sum(p.numel() for p in rotary.parameters()) == count
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.ndim == 1 and p.dtype == torch.float32 for p in rotary.parameters())


def test_learned_numbers_stay_float32():
    model = tiny_model()
    rotary = attach(model, start_of(model), "per_pair")
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in rotary.parameters())
    assert rotary.table()[0].dtype == torch.float32
    model.to("meta")
    assert all(p.device.type == "meta" for p in rotary.parameters())


def test_checkpointing_gives_the_same_gradient_and_reentrant_would_fail():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        rotary = attach(model, start_of(model), "ramp")
        model.train()
        if checkpointing:
            checkpoint_layers(model)
        loss_of(model).backward()
        gradients.append([p.grad for p in rotary.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_saving_while_attached_is_refused(tmp_path):
    model = tiny_model()
    attach(model, start_of(model), "scale")
    with pytest.raises(RuntimeError, match="detach"):
        model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="detach"):
        model.state_dict()
    with pytest.raises(RuntimeError, match="attached already"):
        attach(model, start_of(model), "scale")
    detach(model)
    model.save_pretrained(tmp_path)
    assert not [name for name in model.state_dict() if "log_" in name]


def test_learned_values_in_natural_units():
    model = tiny_model()
    rotary = attach(model, start_of(model, factor=3.5), "ramp")
    start = rotary.learned()
    assert start.scale == pytest.approx(3.5)
    assert start.attention_factor == pytest.approx(yarn_attention_factor(3.5))
    with torch.no_grad():
        rotary.offsets["log_scale"].fill_(math.log(10))
        rotary.log_temperature.fill_(math.log(4))
    moved = rotary.learned()
    assert moved.scale == pytest.approx(35), "never clamped to the start"
    assert moved.temperature == pytest.approx(4 * start.temperature)
    assert moved.attention_factor == pytest.approx(start.attention_factor / 2)
    torch.testing.assert_close(moved.inv_freq(), rotary.table()[0].detach(), rtol=2e-7, atol=0)


def test_frequency_factors_rebuild_the_table():
    model = tiny_model()
    rotary = attach(model, start_of(model), "per_pair")
    with torch.no_grad():
        rotary.offsets["log_factor"].uniform_(-1, 1)
    torch.testing.assert_close(rotary.learned().inv_freq(), rotary.table()[0].detach(), rtol=2e-7, atol=0)


def test_numbers_that_do_not_fit_are_refused():
    rotary = attach(model := tiny_model(), start_of(model), "scale")
    with pytest.raises(UserError, match="do not fit"):
        rotary.load_numbers({"log_temperature": torch.zeros(1)})
    bad = rotary.numbers() | {"log_temperature": torch.tensor([float("nan")])}
    with pytest.raises(UserError, match="NaN"):
        rotary.load_numbers(bad)


def test_a_fixed_table_follows_the_length_read():
    model = tiny_model()
    lengths: list[int] = []

    def table_of(length: int):
        lengths.append(length)
        return torch.ones(8) / length, 1.0

    attach_fixed(model, table_of)
    with torch.no_grad():
        model(IDS[:, :50], use_cache=False)
    assert lengths == [50]


@pytest.mark.parametrize(
    ("family", "extra", "reason"),
    [
        ("mamba", {}, "mamba cannot be tuned: it is recurrent"),
        ("gpt2", {}, "gpt2 cannot be tuned: its positions are learned"),
        ("bloom", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("gptj", {}, "rotates inside its attention"),
        ("codegen", {}, "rotates inside its attention"),
        ("cohere2", {}, "full-attention layers have no positions"),
        ("exaone4", {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 32},
         "full-attention layers of this exaone4 have no positions"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 32, "use_sliding_window": True},
         "attend to the last 32 tokens only"),
        ("ministral", {"layer_types": ["sliding_attention"] * 3}, "attend to the last 32 tokens only"),
        ("mistral", {"sliding_window": 32}, "sliding window"),
        pytest.param("gemma3_text", {"layer_types": ["sliding_attention"] * 3}, "no full-attention|look back only",
                     marks=pytest.mark.rope_warnings),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused_with_the_reason(family, extra, reason):
    with pytest.raises(UserError, match=reason):
        rope_facts(tiny_config(family, **extra))


def test_a_window_below_the_native_one_is_refused():
    with pytest.raises(UserError, match="smaller than the base model's native window 64"):
        start_of(tiny_model(), window=32)


@pytest.mark.parametrize(("kind", "free", "stays"), [("cuda", 1.5, False), ("cuda", 1.0, True), ("xpu", 0.0, False)])
def test_a_model_that_its_device_has_no_room_for_stays_on_the_cpu(monkeypatch, capsys, kind, free, stays):
    """Free memory is measured after the cache is emptied; on a device that does not report it, the model is moved."""
    model, moves, given_back = tiny_model(), [], []
    monkeypatch.setattr(model, "to", lambda device: moves.append(device))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB if given_back else 0, 80 * GIB))
    assert to_device(model) is model
    assert moves == ([] if stays else [torch.device(kind)])
    said = capsys.readouterr().err
    assert said.count("\n") == stays
    assert ("needs about 1.0 GiB, and 1.0 are free on cuda: it stays on the CPU" in said) == stays


def test_a_family_that_this_transformers_reads_wrongly_is_refused(monkeypatch):
    monkeypatch.setattr("yarn_tune.models.wrappers.RELEASE", (5, 3))
    with pytest.raises(UserError, match=r"base.model: qwen3_moe cannot be tuned: it needs transformers 5.4 or newer"):
        rope_facts(tiny_config("qwen3_moe"))
    assert rope_facts(tiny_config("llama")).native == NATIVE
