"""Kept attention, offloaded activations, tiled MLPs: the same gradient; refused where tokens are not independent."""

import pytest
import torch
from tiny import FAMILY_SIZES, NATIVE, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from yarn_tune.distributed import activation_memory as longrows
from yarn_tune.distributed.activation_memory import checkpoint_layers, offload_inputs, tile_mlps
from yarn_tune.errors import UserError
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.models.wrappers import switch_off_dropout
from yarn_tune.recipe.schema import Rope
from yarn_tune.training.objective import Objective, ObjectiveConfig
from yarn_tune.tunable.attachment import attach
from yarn_tune.tunable.parameters import Start

EXPERTS = (
    "aria_text", "bamba", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "falcon_h1", "flex_olmo", "glm4_moe",
    "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared", "hy_v3", "lfm2", "lfm2_moe", "minimax",
    "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open", "axk1",
    "axk2", "bailing_hybrid", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "longcat_flash",
)  # fmt: skip
"""Families with experts, or with MLPs under other names: `train.tiled_mlp` is refused for them."""
WHOLE = ("gpt_neox_japanese", "jetmoe")
"""Families that transformers does not checkpoint."""


def gradient(family, tile=None, offload=False, checkpointing=True, keep=False):
    """(what is minimised, gradients) of one row of 200 tokens."""
    model = tiny_model(family)
    switch_off_dropout(model)
    rotary = attach(model, Start.of(rope_facts(model.config), Rope(window=4 * NATIVE)), "per_pair")
    if checkpointing:
        checkpoint_layers(model, keep)
        model.train()
    if offload:
        offload_inputs(model)
    if tile:
        tile_mlps(model, tile)
    ids = torch.randint(128, (1, 201), generator=torch.Generator().manual_seed(0))
    value = Objective(model, rotary, ObjectiveConfig())(ids[:, :-1], torch.arange(200)[None], ids[:, 1:].contiguous())
    value[0].backward()
    return value[0].item(), [p.grad for p in rotary.trainable()]


WAYS = ({"tile": 64}, {"tile": 64, "checkpointing": False}, {"offload": True}, {"keep": True, "offload": True})


CASES = [
    (family, way) for family in FAMILY_SIZES for way in WAYS
    if (family not in EXPERTS or "tile" not in way) and family not in WHOLE
]  # fmt: skip


@pytest.mark.parametrize(("family", "options"), CASES)
def test_the_gradient_is_the_same(family, options):
    wanted, gradients = gradient(family)
    found, others = gradient(family, **options)
    assert found == pytest.approx(wanted, rel=1e-6)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("family", WHOLE)
def test_what_cannot_be_checkpointed_is_refused(family):
    with pytest.raises(UserError, match=f"train.gradient_checkpointing: transformers does not support it for {family}"):
        gradient(family)


class Kernels(TorchDispatchMode):
    """Counts attention's kernels as they run."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product"):
            self.backward += "backward" in name
            self.forward += "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "times"), [(False, 2), (True, 1)])
def test_what_attention_gave_is_kept_and_not_computed_again(keep, times):
    with Kernels() as ran:
        gradient("llama", keep=keep)
    assert (ran.forward, ran.backward) == (3 * times, 3)


def test_tiles_are_what_an_mlp_sees():
    model = tiny_model()
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    tile_mlps(model, 64)
    with torch.no_grad():
        model(torch.zeros(1, 200, dtype=torch.long))
    assert seen == 3 * [64, 64, 64, 8]


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_refused(family):
    with pytest.raises(UserError, match=f"train.tiled_mlp: layers of {family} have no plain MLP"):
        tile_mlps(tiny_model(family), 64)


def test_only_the_inputs_of_layers_wait(monkeypatch):
    """Frozen matrices, which are on the device anyway, and values computed again are not offloaded."""
    sizes = []

    class Counting(longrows.save_on_cpu):
        def __init__(self, **options):
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: sizes.append(tuple(tensor.shape)) or pack(tensor)

    monkeypatch.setattr(longrows, "save_on_cpu", Counting)
    gradient("llama", offload=True)
    assert sizes.count((1, 200, 64)) == 3
    # And what all layers share: cos and sin, once a layer, as pairs of a head of 16.
    assert set(sizes) <= {(1, 200, 64), (1, 200, 16), (0,), (1, 200), (200,)}


@pytest.mark.parametrize(("device", "pinned"), [(None, False), ("cpu", False), ("cuda", True)])
def test_inputs_are_pinned_for_the_device_the_model_will_be_on(monkeypatch, device, pinned):
    """The device that the model will be on decides, not the one that it is on: FSDP moves it later."""
    options = {}

    class Seen(longrows.save_on_cpu):
        def __init__(self, **given):
            options.update(given)
            super().__init__()

    monkeypatch.setattr(longrows, "save_on_cpu", Seen)
    model = tiny_model()
    checkpoint_layers(model)
    offload_inputs(model, device)
    model.train()
    model(torch.zeros(1, 8, dtype=torch.long))
    assert options == {"pin_memory": pinned, "device_type": device or "cpu"}
