"""The readers against the code they describe, over random configs: frequencies to 1e-6, multipliers to 1e-12.

A reader refuses exactly where the real code raises. transformers 5 is the installed one; the others come from the
folder YARN_TUNE_ENGINES, of old releases only the files that compute the tables.
"""

import ast
import importlib.util
import json
import logging
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Generic, TypeVar
from unittest import mock

import pytest
import torch
from tiny import ENGINES, tiny_config, tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from yarn_tune.engines.vllm_runner import QUIET
from yarn_tune.models.wrappers import ROPE_KEYS, rotary_site
from yarn_tune.rope import YarnRamp, default_inv_freq, llama3_inv_freq, yarn_inv_freq
from yarn_tune.serving.readers import EffectiveRope
from yarn_tune.serving.stacks import reading
from yarn_tune.serving.tables import ORIGINAL

pytestmark = pytest.mark.rope_warnings

Real = Callable[[int], tuple[Tensor, float]]
"""Prompt length -> what the real code computes, or an exception."""

NESTED = ("gemma3_text", "olmo3")
KINDS = ("yarn", "yarn", "longrope", "llama3", "linear", "default")


def engine(path: str) -> Path:
    """A file of another release. Skipped without engines; fails where there are some, or should be, but not this."""
    named = os.environ.get("YARN_TUNE_ENGINES", ".engines") != ".engines"
    if not named and not ENGINES.is_dir():
        pytest.skip("no engines here (YARN_TUNE_ENGINES is unset); tests/engines/install.sh installs them")
    assert (ENGINES / path).exists(), f"{ENGINES} has no {path}; run tests/engines/install.sh again"
    return ENGINES / path


# Random configs.


def maybe(rng: random.Random, key: str, *values: object) -> dict[str, object]:
    """The key with one of the values, or not at all."""
    value = rng.choice(["absent", *values])
    return {} if value == "absent" else {key: value}


def random_section(rng: random.Random, kind: str, pairs: int, native: int, longest: int) -> dict:
    ratio = longest / native
    original = maybe(rng, ORIGINAL, native, native)
    factor = rng.choice([ratio, rng.uniform(0.7, 20), rng.uniform(1, 20)])
    section: dict = {rng.choice(["rope_type"] * 5 + ["type"]): kind}
    if kind == "yarn":
        section |= rng.choice([{"factor": factor}] * 8 + [{"factor": None}, {}]) | original
        section |= maybe(rng, "attention_factor", None, rng.uniform(0.6, 2))
        section |= maybe(rng, "attn_factor", rng.uniform(0.6, 2))
        section |= maybe(rng, "mscale", 0.707, 1.0, 0) | maybe(rng, "mscale_all_dim", 1.0, rng.uniform(0.2, 2), 0)
        section |= maybe(rng, "beta_fast", *[rng.uniform(2, 60)] * 3, rng.choice([None, 0]))
        section |= maybe(rng, "beta_slow", *[rng.uniform(0.1, 1.9)] * 3, rng.choice([None, 0]))
        section |= maybe(rng, "truncate", True, False) | maybe(rng, "apply_yarn_scaling", True, False)
    elif kind == "longrope":
        short, long = ([rng.uniform(0.5, 30) for _ in range(pairs)] for _ in range(2))
        section |= {"short_factor": short, "long_factor": rng.choice([short, long])} | original
        section |= maybe(rng, "factor", factor) | maybe(rng, "attention_factor", None, rng.uniform(0.6, 2))
        section |= maybe(rng, "short_mscale", rng.uniform(1, 2)) | maybe(rng, "long_mscale", rng.uniform(1, 2))
    elif kind == "llama3":
        section |= {"factor": factor, "low_freq_factor": rng.uniform(1, 2), "high_freq_factor": rng.uniform(3, 5)}
        section |= original
    elif kind == "linear":
        section |= {"factor": factor}
    return section


def random_config(rng: random.Random, small: bool = False, family: str = "llama") -> dict:
    """A config.json; `small` for engines that hold a row a position."""
    kinds = ("longrope",) * 2 + ("default",) if family == "phi3" else KINDS
    kinds = ("yarn",) * 4 + ("default",) if family == "deepseek_v3" else kinds
    config = {k: v for k, v in tiny_config(family).to_dict().items() if k not in (*ROPE_KEYS, ORIGINAL)}
    if family in ("llama", "cohere", "qwen2"):
        head_dim = rng.choice([32, 64, 80, 96, 128, 256])
        config |= {"head_dim": head_dim, "hidden_size": 4 * head_dim}
    if family == "deepseek_v3":
        config["head_dim"] = config["qk_rope_head_dim"] = rng.choice([32, 64])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    native = rng.choice([128, 200, 512] if small else [128, 1000, 4096, 8192])
    longest = round(native * rng.uniform(1, 8 if small else 32))
    config |= {"max_position_embeddings": longest} | maybe(rng, ORIGINAL, *[native] * (family == "phi3") or ["absent"])
    if rng.random() < 0.2 or family == "phi3":
        config[ORIGINAL] = native
    share, thetas = rng.choice([1.0, 0.5, 0.25]), [1e4, 5e5, 1e6, 123456.0]
    default = {"gpt_neox": 0.25, "phi": 0.5, "stablelm": 0.25}.get(family, 1.0)
    beside, inside = rng.choice([(True, True), (True, False), (False, True), (False, False)])
    names = rng.choice([("rope_scaling",), ("rope_parameters",), ("rope_scaling", "rope_parameters"), ()])
    kind = [rng.choice(kinds) for _ in range(2)]
    if family in (*NESTED, "deepseek_v3") or (default == 1 and ("default" in kind or not names)):
        beside = inside = False  # unscaled, these families rotate whole heads with every config
    share = share if beside or inside else default
    pairs = int(head_dim * share) // 2
    sections = [random_section(rng, k, pairs, native, longest) for k in kind]
    for section in sections:
        section |= ({"partial_rotary_factor": share} if inside else {}) | maybe(rng, "rope_theta", *thetas)
    if beside:
        config["rotary_pct" if family == "gpt_neox" else "partial_rotary_factor"] = share
    config |= maybe(rng, "rotary_emb_base" if family == "gpt_neox" else "rope_theta", *thetas)
    nested = {
        "full_attention": sections[1],
        "sliding_attention": random_section(rng, "default", pairs, native, longest),
    }
    written = {"rope_scaling": sections[0], "rope_parameters": sections[1]}
    config |= {name: written[name] for name in names}
    if len(names) == 2 and rng.random() < 0.5:
        config["rope_parameters"] = dict(sections[0])
    if family in NESTED and "rope_parameters" in names:
        config["rope_parameters"] = nested
    if family == "gemma3_text":
        config |= maybe(rng, "rope_local_base_freq", 1e4, 2e4)
    return json.loads(json.dumps(config))


def brief(config: dict) -> str:
    kept = ("model_type", "head_dim", "max_position_embeddings", ORIGINAL, *ROPE_KEYS)
    return json.dumps({k: config[k] for k in kept if k in config})


def lengths_of(config: dict) -> list[int]:
    """Below, at and above whatever may be taken for the original length."""
    given = [config, *(config.get(k) or {} for k in ("rope_scaling", "rope_parameters"))]
    given += [v for v in (config.get("rope_parameters") or {}).values() if isinstance(v, dict)]
    ends = {g[ORIGINAL] for g in given if g.get(ORIGINAL)} | {config["max_position_embeddings"]}
    return [n for n in sorted({1} | ends | {end + 1 for end in ends}) if n <= config["max_position_embeddings"]]


def agree(found: EffectiveRope, real: Callable[[], Real], config: dict, kind: str = "") -> bool:
    """Assert that a reader agrees with the real code; returns whether the real code raises."""
    failure, expected = None, {}
    try:
        call = real()
        expected = {n: call(n) for n in lengths_of(config)}
    except Exception as error:  # whatever the real code raises is its refusal
        failure = repr(error)
    if failure is not None:
        assert found.refusal is not None, f"the reader accepts what fails with {failure}: {brief(config)}"
        return True
    assert found.refusal is None, f"the reader refuses ({found.refusal}) what the real code accepts: {brief(config)}"
    for length, (inv_freq, multiplier) in expected.items():
        table = [t for t in found.tables[kind] if length > t.above][-1]
        close(table.inv_freq, inv_freq, f"{length} tokens of {brief(config)}")
        assert table.multiplier == pytest.approx(multiplier, rel=1e-12), f"{length} tokens of {brief(config)}"
    return False


def close(ours: Tensor, theirs: Tensor, of: str) -> None:
    assert ours.shape == theirs.shape, of
    error = (ours.double() / theirs.double() - 1).abs().max().item()
    assert error < 1e-6, of


# transformers 5, as installed.


def hf_real(module: type, config: dict, kind: str = "") -> Real:
    made = module(CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config))))
    prefix = f"{kind}_" if kind else ""

    def real(length: int) -> tuple[Tensor, float]:
        made(torch.zeros(1), torch.tensor([[length - 1]]), *([kind] if kind else []))
        return getattr(made, f"{prefix}inv_freq").clone(), getattr(made, f"{prefix}attention_scaling")

    return real


@pytest.mark.parametrize("seed", range(4))
def test_transformers_5(seed):
    rng = random.Random(seed)
    refused = 0
    for _ in range(120):
        config = random_config(rng)
        refused += agree(reading("transformers", config), lambda c=config: hf_real(LlamaRotaryEmbedding, c), config)
    assert refused < 20


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3", "phi3", "gpt_neox", "phi", "cohere", "stablelm"])
def test_transformers_5_families(family):
    """Through the family's own config class and rotary module, each kind of layer."""
    parent, name = rotary_site(tiny_model(family))
    module = type(getattr(parent, name))
    kinds = ["full_attention", "sliding_attention"] if family in NESTED else [""]
    rng = random.Random(family)
    refused = 0
    for _ in range(60):
        config = random_config(rng, family=family)
        found = reading("transformers", config)
        for kind in kinds:
            refused += agree(found, lambda c=config, k=kind: hf_real(module, c, k), config, kind)
    assert refused < 30


# transformers 4: the one file that computes tables, under stub parents.


class Anything(Generic[TypeVar("T")]):
    """The value of every attribute of a stub module."""


class Stub(ModuleType):
    """A module with some values; every other attribute is `default`."""

    __path__ = ()

    def __init__(self, name: str, values: Mapping[str, object], default: object = Anything) -> None:
        super().__init__(name)
        self.values, self.default = values, default

    def __getattr__(self, key: str) -> object:
        if key.startswith("__"):
            raise AttributeError(key)
        return self.values.get(key, self.default)


def load(path: Path, name: str, **stubs: object) -> ModuleType:
    """A file as module `name`; everything else it imports from its package is a stub."""
    root = name.split(".")[0]
    tree = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("from .")]
    parts = name.split(".")
    names = {".".join(parts[:i]) for i in range(1, len(parts))} | {f"{root}.archs"}
    for target in tree:
        dots = len(target) - len(target.lstrip("."))
        names.add(".".join([*parts[:-dots], *filter(None, target.lstrip(".").split("."))]))
    fakes = {n: stubs.get(n) or Stub(n, stubs) for n in names}
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {**fakes, name: module}):
        spec.loader.exec_module(module)
    return module


def old_real(rope: ModuleType, config: dict) -> Real:
    """As LlamaConfig and LlamaRotaryEmbedding of transformers 4 do it."""
    seen = SimpleNamespace(**{"rope_theta": 1e4, "rope_scaling": None} | json.loads(json.dumps(config)))
    kind = seen.rope_scaling.get("rope_type", seen.rope_scaling.get("type")) if seen.rope_scaling else "default"

    class Rotary(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.rope_type, self.rope_init_fn = seen, kind, rope.ROPE_INIT_FUNCTIONS[kind]
            inv_freq, self.attention_scaling = self.rope_init_fn(seen, None)
            self.register_buffer("inv_freq", inv_freq, persistent=False)
            self.original_inv_freq = inv_freq

        @getattr(rope, "dynamic_rope_update", lambda forward: forward)
        def forward(self, x, position_ids):
            return self.inv_freq.clone(), self.attention_scaling

    made = Rotary()
    return lambda length: made(torch.zeros(1), torch.tensor([[length - 1]]))


def same(reals: list[Real]) -> Real:
    """What several releases agree on."""

    def real(length: int) -> tuple[Tensor, float]:
        first, *others = (one(length) for one in reals)
        for other in others:
            if not torch.equal(first[0], other[0]) or first[1] != other[1]:
                raise ValueError("releases differ")
        return first

    return real


def old_rope(version: str) -> ModuleType:
    path = engine(f"transformers-{version}/transformers/modeling_rope_utils.py")
    parts = {"is_torch_available": lambda: True, "logging": SimpleNamespace(get_logger=logging.getLogger)}
    return load(path, f"transformers_{version.replace('.', '_')}.modeling_rope_utils", **parts)


RELEASES = {
    "transformers-4.50": ("4.45.2", "4.50.3"),
    "transformers-4.55": ("4.51.3", "4.55.4"),
    "transformers-4.57": ("4.57.6",),
}


@pytest.mark.parametrize("stack", RELEASES)
def test_transformers_4(stack):
    """A config that a reader accepts is computed by every release of its row."""
    ropes, rng, refused = [old_rope(v) for v in RELEASES[stack]], random.Random(stack), 0
    for _ in range(300):
        config = random_config(rng)
        found = reading(stack, config)
        refused += agree(found, lambda c=config: same([old_real(rope, c) for rope in ropes]), config)
    assert refused < 90


# vLLM: one child process a release, for all configs.

TRAPS = {
    "rows": {"factor": 7.83, ORIGINAL: 4096, "max": 32768},
    "native": {"factor": 7.83, ORIGINAL: 4096, "max": 4096},
    "above": {"factor": 8.37, ORIGINAL: 4096, "max": 32768},
}


def trap(name: str) -> dict:
    section = {"rope_type": "yarn", **TRAPS[name]}
    return llama({"rope_theta": 1e4, **section}, section.pop("max"))


def llama(section: dict, longest: int) -> dict:
    config = tiny_config("llama", head_dim=64).to_dict() | {"max_position_embeddings": longest}
    return {k: v for k, v in config.items() if k not in ROPE_KEYS} | {"rope_scaling": section, "rope_theta": 1e4}


@pytest.mark.parametrize("release", ["0.32.0", "0.28.0"])
def test_vllm(release):
    python = engine("vllm/bin/python")
    extra = {} if release == "0.32.0" else {"PYTHONPATH": str(engine("vllm-0.28.0"))}
    stack, rng = ("vllm" if release == "0.32.0" else "vllm-0.29"), random.Random(release)
    families = ["llama"] * 150 + ["deepseek_v3"] * 60 + ["gemma3_text"] * 30 + ["cohere"] * 25
    families += ["phi3"] * 15 + ["stablelm", "qwen2"] * 15
    configs = [*map(trap, TRAPS), *(random_config(rng, small=True, family=family) for family in families)]
    done = subprocess.run(
        [python, Path(__file__).with_name("vllm_tables.py")], input=json.dumps(configs), text=True,
        capture_output=True, env=os.environ | QUIET | {"OMP_NUM_THREADS": "1"} | extra,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    refused = 0
    for config, said in zip(configs, json.loads(done.stdout.splitlines()[-1]), strict=True):
        found = reading(stack, config)
        for kind in said.get("tables", {"": None}):
            refused += agree(found, lambda s=said, k=kind: vllm_real(s, k), config, kind)
        if "error" not in said:
            assert found.window == said["window"], brief(config)
            rows = [t["rows"] for t in said["tables"].values()]
            assert None in rows or found.rows == min(rows), brief(config)
            gain = said["tables"].get("", {}).get("softmax_gain", 1.0)
            assert found.softmax_gain == pytest.approx(gain, rel=1e-12), brief(config)
    assert refused < len(configs) / 4


def vllm_real(said: dict, kind: str) -> Real:
    if "error" in said:
        raise ValueError(said["error"])
    table = said["tables"][kind]
    return lambda length: (torch.tensor(table["inv_freq"], dtype=torch.float64), table["multiplier"])


# LMDeploy: both engines' files, under stub parents. Its configs are those of transformers 5.


def lmdeploy_real(rotary: ModuleType, config: dict) -> Real:
    made = rotary.build_rotary_embedding_from_config(LlamaConfig.from_dict(json.loads(json.dumps(config))))

    def real(length: int) -> tuple[Tensor, float]:
        inv_freq, multiplier = made(torch.zeros(1), torch.tensor([[length - 1]]))
        return inv_freq, 1.0 if multiplier is None else multiplier

    return real


def served(position_ids, inv_freq, scaling_factor, mscale=None, **_):
    """In place of LMDeploy's last step, which would compute cos and sin from these."""
    return inv_freq / scaling_factor, mscale


def test_lmdeploy_pytorch():
    folder, name = "lmdeploy-0.18.0/lmdeploy/pytorch", "lmdeploy.pytorch"
    specs = load(engine(f"{folder}/backends/rotary_embedding.py"), f"{name}.backends.rotary_embedding")
    stubs = {f"{name}.backends.rotary_embedding": specs}
    path = engine(f"{folder}/backends/default/rotary_embedding.py")
    default = load(path, f"{name}.backends.default.rotary_embedding", **stubs)
    default._rotary_embedding_fwd = served
    backend = SimpleNamespace(build_op=lambda spec, **_: default._build_rotary_embedding(spec))
    stubs["get_backend"] = lambda: backend
    stubs["get_build_model_context"] = lambda: SimpleNamespace(enable_deterministic=False)
    rotary = load(engine(f"{folder}/nn/rotary_embedding.py"), f"{name}.nn.rotary_embedding", **stubs)
    rng, refused = random.Random("lmdeploy"), 0
    for _ in range(400):
        config = random_config(rng)
        refused += agree(reading("lmdeploy", config), lambda c=config: lmdeploy_real(rotary, c), config)
    assert refused < 130


def turbomind_real(utils: ModuleType, config: dict) -> Real:
    """What reaches the C++ side, computed as its source does: a rounded ramp over the length it is given."""
    seen, rope = LlamaConfig.from_dict(json.loads(json.dumps(config))), SimpleNamespace()
    utils.copy_rope_config(rope, *utils.parse_rope_param(seen, seen.head_dim))
    shape = (rope.base, rope.dim)
    if rope.type == utils.rope_type_to_int("yarn"):
        betas = rope.yarn_beta_fast, rope.yarn_beta_slow
        assert all(betas), "0 turns, or not a number"
        table = yarn_inv_freq(*shape, rope.factor, YarnRamp(rope.max_position_embeddings, *betas))
        return lambda length: (table, rope.yarn_attention_factor)
    if rope.type == utils.rope_type_to_int("llama3"):
        given = rope.llama3_low_freq_factor, rope.llama3_high_freq_factor
        table = llama3_inv_freq(*shape, rope.factor, *given, rope.llama3_original_max_position_embeddings)
    else:
        table = default_inv_freq(*shape) / rope.factor
    return lambda length: (table, 1.0)


def test_lmdeploy_turbomind():
    utils = load(engine("lmdeploy-0.18.0/lmdeploy/turbomind/models/utils.py"), "lmdeploy.turbomind.models.utils")
    rng, refused = random.Random("turbomind"), 0
    for _ in range(400):
        config = random_config(rng)
        refused += agree(reading("turbomind", config), lambda c=config: turbomind_real(utils, c), config)
    assert refused < 220


# SGLang: its package of rotary modules, under stub parents. Its configs are those of transformers 5.


@cache
def sglang_package() -> ModuleType:
    """`sglang.srt.layers.rotary_embedding` of 0.5.23, on a CPU without its kernels."""
    folder, name = engine("sglang-0.5.23/sglang/srt/layers/rotary_embedding"), "sglang.srt.layers.rotary_embedding"
    values = {"BaseFusedOp": torch.nn.Module, "publish_role": lambda: None, "get_device": lambda: "cpu",
              "get_compiler_backend": lambda: "eager", "is_cpu": lambda: True,
              "envs": SimpleNamespace(SGLANG_ROPE_CACHE_FP32=SimpleNamespace(get=lambda: True))}  # fmt: skip
    parts = ("", ".kernels", ".kernels.fused_op", ".kernels.ops", ".kernels.ops.attention", ".platforms", ".srt",
             ".kernels.ops.attention.rotary_triton", ".kernels.ops.attention.mrope", ".srt.environ", ".srt.layers",
             ".srt.platforms", ".srt.runtime_context", ".srt.utils")  # fmt: skip
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules |= {
        **{f"sglang{part}": Stub(f"sglang{part}", values, lambda *_: False) for part in parts},
        name: module,
    }
    try:
        spec.loader.exec_module(module)
    finally:
        for made in [key for key in sys.modules if key.split(".")[0] == "sglang"]:
            del sys.modules[made]
    return module


def sglang_real(package: ModuleType, config: dict) -> Real:
    """As LlamaDecoderLayer of its models/llama.py does it, and Qwen2DecoderLayer of its models/qwen2.py."""
    seen = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))
    section = seen.rope_parameters
    if getattr(seen, ORIGINAL, None) and config["model_type"] == "llama":
        section[ORIGINAL] = getattr(seen, ORIGINAL)
    rotated = int(section.get("partial_rotary_factor", 1.0) * seen.head_dim)
    theta = section.get("rope_theta", 10000)
    made = package.get_rope(seen.head_dim, rotated, seen.max_position_embeddings, theta, True, section)
    return sglang_table(made)


def sglang_table(made: torch.nn.Module) -> Real:
    """The numbers from which a rotary module of SGLang has computed cos and sin."""
    if type(made).__name__.startswith("Phi3LongRoPE"):
        short, long = ((getattr(made, f"{n}_factor"), getattr(made, f"{n}_mscale")) for n in ("short", "long"))

        def longrope(length: int) -> tuple[Tensor, float]:
            # It compares the last position, so that a prompt of O + 1 tokens takes the short table and, for its last
            # token, the first row of the long one. This one length is left out.
            factors, multiplier = long if length > made.original_max_position_embeddings else short
            return made._compute_inv_freq(factors), multiplier

        return longrope
    if type(made).__name__.startswith("LinearScaling"):
        (factor,) = made.scaling_factors
        return lambda length: (made._compute_inv_freq(made.base) / factor, 1.0)
    own = getattr(made, "scaling_factor", made.base) if hasattr(made, "mscale") else made.base
    return lambda length: (made._compute_inv_freq(own), getattr(made, "mscale", 1.0))


def sglang_gemma4(package: ModuleType, config: dict, kind: str) -> Real:
    """As Gemma4Attention of its models/gemma4_causal.py does it."""
    seen = CONFIG_MAPPING["gemma4_text"].from_dict(json.loads(json.dumps(config)))
    section = seen.rope_parameters[kind]
    size = seen.per_layer_config[seen.layer_types.index(kind)].head_dim
    made = package.get_rope(
        size, size, seen.max_position_embeddings, section["rope_theta"], True, {"rope_type": section["rope_type"]},
        partial_rotary_factor=section.get("partial_rotary_factor", 1.0),
    )  # fmt: skip
    return lambda length: (made._compute_inv_freq(made.base), 1.0)


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("extra", [{}, {"factor": 4.0}])
def test_sglang_gemma4(kind, share, extra):
    config = json.loads(json.dumps(tiny_config("gemma4_text").to_dict()))
    config["rope_parameters"]["full_attention"] = {
        "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": share, **extra
    }  # fmt: skip
    found = reading("sglang", config)
    assert found.refusal is None
    inv_freq, multiplier = sglang_gemma4(sglang_package(), config, kind)(1)
    (table,) = found.tables[kind]
    assert torch.allclose(table.inv_freq, inv_freq, rtol=1e-6, atol=0)
    assert table.multiplier == multiplier


def sglang_deepseek(package: ModuleType, scaling: Callable, config: dict) -> tuple[Real, float]:
    """As DeepseekV2DecoderLayer and DeepseekV2AttentionMLA of models/deepseek_v2.py do it; and the gain of logits."""
    section = CONFIG_MAPPING["deepseek_v3"].from_dict(json.loads(json.dumps(config))).rope_parameters
    size, longest, gain = config["qk_rope_head_dim"], config["max_position_embeddings"], 1.0
    if section.get("rope_type") == "default":
        made = package.get_rope_wrapper(size, size, longest, section["rope_theta"], False, None)
    else:
        section["rope_type"] = "deepseek_yarn"
        made = package.get_rope_wrapper(size, size, longest, section["rope_theta"], False, section)
        gain = scaling(section, 1.0)
    return sglang_table(made), gain


def functions(path: Path, *names: str) -> dict[str, Callable]:
    """Functions of a file whose other imports are not there."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    scope: dict = {"math": math, "logger": logging.getLogger("sglang")}
    exec(compile(tree, str(path), "exec"), scope)
    return {name: scope[name] for name in names}


def test_sglang_deepseek():
    package, rng, refused = sglang_package(), random.Random("sglang deepseek"), 0
    names = ("yarn_get_mscale", "compute_mla_mscale_scaling")
    scaling = functions(engine("sglang-0.5.23/sglang/srt/configs/model_config.py"), *names)[names[1]]
    for _ in range(300):
        config = random_config(rng, small=True, family="deepseek_v3")
        found = reading("sglang", config)
        raises = agree(found, lambda c=config: sglang_deepseek(package, scaling, c)[0], config)
        if not raises:
            gain = sglang_deepseek(package, scaling, config)[1]
            assert found.softmax_gain == pytest.approx(gain, rel=1e-12), brief(config)
        refused += raises
    assert refused < 150


def test_sglang():
    package, rng, refused = sglang_package(), random.Random("sglang"), 0
    for index in range(500):
        config = random_config(rng, small=True, family="qwen2" if index % 5 == 0 else "llama")
        refused += agree(reading("sglang", config), lambda c=config: sglang_real(package, c), config)
    assert refused < 130
