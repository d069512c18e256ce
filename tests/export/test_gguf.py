"""GGUF for llama.cpp: the plumbing with a stand-in for its converter, the numbers with the real one.

The tests marked `llama_cpp` want a llama.cpp checkout (LLAMA_CPP) and an interpreter that has llama-cpp-python
(LLAMA_CPP_PYTHON; this one by default).
"""

import json
import math
import os
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import finished_run, save_tiny, tiny_model
from transformers import AutoModelForCausalLM
from yarn_tune.errors import CheckFailed, UserError
from yarn_tune.export import gguf as ours
from yarn_tune.export.checkpoint import export
from yarn_tune.export.gguf import ARCHITECTURES, BY_FLAGS, convert, find_converter, served_by_llama_cpp
from yarn_tune.rope import YarnRamp, default_inv_freq, longrope_inv_freq, yarn_attention_factor, yarn_inv_freq
from yarn_tune.runs.learned import learned_of

gguf = pytest.importorskip("gguf")

NATIVE, WINDOW, VOCABULARY, DIM, THETA = 256, 2048, 512, 64, 10000.0
MULTIPLIER = 1.317
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
}
EXTRA = {"mixtral": {"head_dim": DIM}, "qwen3": {"head_dim": DIM}}
ORIGINAL, FACTOR = 260, WINDOW / 260
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": FACTOR, "original_max_position_embeddings": ORIGINAL}
BETAS = {"beta_fast": 18.0, "beta_slow": 0.7}


def factors() -> list[float]:
    generator = torch.Generator().manual_seed(1)
    return (torch.linspace(1, 8, DIM // 2) * torch.exp(0.3 * torch.randn(DIM // 2, generator=generator))).tolist()


def longrope() -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "factor": 8.0,
        "original_max_position_embeddings": NATIVE,
        "short_factor": factors(),
        "long_factor": factors(),
        "attention_factor": MULTIPLIER,
    }


def learned_inv_freq() -> torch.Tensor:
    return longrope_inv_freq(THETA, DIM, factors())


def checkpoint(folder: Path, family: str = "llama", section: dict[str, object] | None = None) -> Path:
    """Weights, and a config whose rope section is the learned one."""
    extra = SIZE | EXTRA.get(family, {}) | {"rope_parameters": section or longrope()}
    tiny_model(family, **extra).save_pretrained(folder)
    return folder


# With a stand-in for the converter.

STAND_IN = """
import argparse, json, sys
from pathlib import Path
import gguf, numpy as np
parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path), parser.add_argument("--outfile"), parser.add_argument("--outtype")
args = parser.parse_args()
config = json.loads((args.folder / "config.json").read_text())
writer = gguf.GGUFWriter(args.outfile, "llama")
writer.add_context_length(config["max_position_embeddings"])
writer.add_rope_dimension_count(64)
writer.add_rope_freq_base(config["rope_theta"])
writer.add_bool("test.bool", True)
writer.add_int64("test.int64", -(2**40))
writer.add_float64("test.float64", 0.1)
writer.add_string("test.config", json.dumps(config))
writer.add_string("test.folder", args.folder.name)
writer.add_string("test.outtype", args.outtype)
writer.add_array("test.files", sorted(p.name for p in args.folder.iterdir()))
writer.add_token_scores([0.1, -2.5e-8, 3.0])
writer.add_token_types([1, 2, 3])
rng = np.random.default_rng(0)
writer.add_tensor("a.f32", rng.standard_normal((3, 5), dtype=np.float32))
writer.add_tensor("b.f16", rng.standard_normal((7, 4)).astype(np.float16))
for name, kind in {"c.q8_0": "Q8_0", "d.bf16": "BF16"}.items():
    kind = gguf.GGMLQuantizationType[kind]
    values = gguf.quants.quantize(rng.standard_normal((2, 64), dtype=np.float32), kind)
    writer.add_tensor(name, values, raw_dtype=kind)
if OLD_FREQS:
    writer.add_tensor("rope_freqs.weight", np.full(32, 7.0, np.float32))
writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
writer.close()
if KEPT:
    Path(KEPT).write_bytes(Path(args.outfile).read_bytes())
"""


def stand_in(folder: Path, old_freqs: bool = False, change: tuple[str, str] = ("", "")) -> Path:
    script = folder / "convert_hf_to_gguf.py"
    head = f"OLD_FREQS, KEPT = {old_freqs}, {str(folder / 'as-converted.gguf')!r}\n"
    script.write_text(head + STAND_IN.replace(*change) if change[0] else head + STAND_IN)
    return script


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("plain") / "export")


def converted(plain: Path, folder: Path, **options: object) -> Path:
    settings = {"inv_freq": learned_inv_freq(), "multiplier": MULTIPLIER} | options
    return convert(plain, folder / "to" / "model.gguf", **settings)


@pytest.mark.parametrize("old_freqs", [False, True])
def test_every_key_and_tensor_but_the_learned_ones_is_the_converters(plain, tmp_path, old_freqs):
    out = converted(plain, tmp_path, converter=stand_in(tmp_path, old_freqs))
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]
    before, after = gguf.GGUFReader(tmp_path / "as-converted.gguf"), gguf.GGUFReader(out)
    learned = {
        "llama.context_length": WINDOW,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.attn_factor": pytest.approx(MULTIPLIER, rel=1e-7),
    }
    for name, field in before.fields.items():
        if name not in learned and not name.startswith("GGUF."):
            assert after.fields[name].types == field.types, name
            assert after.fields[name].contents() == field.contents(), name
    assert {n: after.fields[n].contents() for n in learned} == learned
    assert set(after.fields) == set(before.fields) | set(learned)
    tensors = {t.name: t for t in after.tensors}
    for tensor in before.tensors:
        if tensor.name != "rope_freqs.weight":
            copy = tensors[tensor.name]
            assert copy.tensor_type == tensor.tensor_type
            assert copy.shape.tolist() == tensor.shape.tolist()
            assert copy.data.tobytes() == tensor.data.tobytes()
    assert set(tensors) == {t.name for t in before.tensors} | {"rope_freqs.weight"}


def test_divisors_are_base_over_learned(plain, tmp_path):
    out = converted(plain, tmp_path, converter=stand_in(tmp_path))
    (tensor,) = [t for t in gguf.GGUFReader(out).tensors if t.name == "rope_freqs.weight"]
    assert tensor.data.dtype == np.float32
    assert tensor.data == pytest.approx(np.array(factors()), rel=3e-7)  # a few roundings to float32
    found, multiplier = served_by_llama_cpp(out)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, learned_inv_freq(), rtol=3e-7, atol=0)
    assert multiplier == pytest.approx(MULTIPLIER, rel=1e-7)


def test_the_converter_sees_no_rope_scaling_and_all_other_files(plain, tmp_path):
    out = converted(plain, tmp_path, converter=stand_in(tmp_path), outtype="bf16")
    said = {name: field.contents() for name, field in gguf.GGUFReader(out).fields.items() if name.startswith("test.")}
    config, written = json.loads(said["test.config"]), json.loads((plain / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": THETA}
    assert config["rope_theta"] == THETA
    assert "rope_scaling" not in config
    rope = ("rope_parameters", "rope_scaling", "rope_theta")
    assert {k: v for k, v in config.items() if k not in rope} == {k: v for k, v in written.items() if k not in rope}
    assert said["test.files"] == sorted(path.name for path in plain.iterdir())
    assert (said["test.folder"], said["test.outtype"]) == ("model", "bf16")


def test_what_would_be_served_otherwise_is_not_written(plain, tmp_path):
    """Theta and dimensions are read back from the file, not believed."""
    for change in [('config["rope_theta"]', "5e5"), ("dimension_count(64)", "dimension_count(32)")]:
        with pytest.raises(
            (CheckFailed, UserError), match="frequencies off by|needs 16 numbers in rope_freqs.weight; found 32"
        ):
            converted(plain, tmp_path, converter=stand_in(tmp_path, change=change))
        assert not list((tmp_path / "to").iterdir())


def test_a_converter_that_fails_leaves_the_old_file(plain, tmp_path):
    out = converted(plain, tmp_path, converter=stand_in(tmp_path))
    before = out.read_bytes()
    script = tmp_path / "failing.py"
    script.write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')")
    with pytest.raises(UserError, match=r"failing\.py could not convert.*\n(.*\n)*.*pre-tokenizer was not recognized"):
        converted(plain, tmp_path, converter=script, multiplier=1.0)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


def test_another_architecture_than_the_one_checked(plain, tmp_path):
    script = stand_in(tmp_path, change=('outfile, "llama"', 'outfile, "mistral3"'))
    with pytest.raises(
        UserError, match="the converter wrote the architecture 'mistral3', but only 'llama' was checked"
    ):
        converted(plain, tmp_path, converter=script)


def test_a_missing_converter_says_how_to_get_it(plain, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path, tmp_path / "none", None):
        with pytest.raises(UserError, match="git clone --depth 1 .*llama.cpp\n  export LLAMA_CPP="):
            converted(plain, tmp_path, converter=given)
    script = stand_in(tmp_path)
    assert find_converter(script) == find_converter(tmp_path) == script
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert find_converter() == script


def test_without_the_gguf_package(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "gguf", None)
    for call in (lambda: converted(plain, tmp_path, converter=None), lambda: served_by_llama_cpp(tmp_path)):
        with pytest.raises(UserError, match="pip install gguf"):
            call()


def refused(folder: Path, family: str, section: dict[str, object], inv_freq: torch.Tensor) -> str:
    path = checkpoint(folder, family, section)
    with pytest.raises(UserError) as caught:
        convert(path, folder / "model.gguf", converter=None, inv_freq=inv_freq, multiplier=MULTIPLIER)
    assert not (folder / "model.gguf").exists()
    return str(caught.value)


def flags(message: str) -> dict[str, str]:
    return dict(re.findall(r"(-c|--[\w-]+) (\S+)", message.split("makes of the export:\n")[1]))


def test_qwen2_with_a_rounded_ramp_is_refused_with_flags(tmp_path):
    wanted = yarn_inv_freq(THETA, DIM, FACTOR, YarnRamp(ORIGINAL, **BETAS))
    message = refused(tmp_path, "qwen2", YARN | BETAS | {"attention_factor": MULTIPLIER}, wanted)
    assert "for granite, llama, mistral, mixtral only; a GGUF of qwen2 (Qwen2ForCausalLM) loses" in message
    assert "loses the learned frequencies and the multiplier 1.317 of cos and sin; these flags carry both" in message
    found = flags(message)
    betas = [float(found[f"--yarn-beta-{name}"]) for name in ("fast", "slow")]
    assert (found["-c"], found["--rope-scale"], found["--yarn-orig-ctx"]) == ("2048", "7.87692308", "260")
    key, value = found["--override-kv"].split("=float:")
    assert key == "qwen2.rope.scaling.attn_factor"
    assert float(value) * (0.1 * math.log(FACTOR) + 1) == pytest.approx(MULTIPLIER)
    for hair in (0.98, 1.02):  # well inside: float32 must not round to another pair
        assert torch.equal(
            yarn_inv_freq(THETA, DIM, FACTOR, YarnRamp(ORIGINAL, betas[0] * hair, betas[1] * hair)), wanted
        )


def test_an_export_of_a_learned_scale_can_be_served_by_flags(tmp_path):
    base = save_tiny(tmp_path / "base", "qwen2", **SIZE | {"max_position_embeddings": NATIVE})
    run = finished_run(tmp_path, "scale", "qwen2", WINDOW, base, ("export.tolerance=1e-3",))
    numbers = learned_of(run)
    with pytest.raises(UserError) as caught:
        convert(export(run), tmp_path / "model.gguf", converter=None, inv_freq=numbers.inv_freq(), multiplier=1.2)
    found = flags(str(caught.value))
    assert float(found["--rope-scale"]) == pytest.approx(numbers.scale)
    assert int(found["--yarn-orig-ctx"]) == numbers.original


def test_qwen_with_any_other_table_is_refused_without_flags(tmp_path):
    unrounded = YARN | BETAS | {"truncate": False, "attention_factor": MULTIPLIER}
    wanted = yarn_inv_freq(THETA, DIM, FACTOR, YarnRamp(ORIGINAL, truncate=False, **BETAS))
    for i, (family, section, table) in enumerate(
        [("qwen2", unrounded, wanted), ("qwen3", longrope(), learned_inv_freq())]
    ):
        message = refused(tmp_path / str(i), family, section, table)
        assert "whole pairs (rope.frequencies: scale), which this is not" in message
        assert "--rope-scal" not in message


def test_others_are_refused(tmp_path):
    message = refused(tmp_path, "olmo2", longrope(), learned_inv_freq())
    assert "olmo2 (Olmo2ForCausalLM)" in message
    assert "no flags of llama.cpp were checked" in message


def test_reading_what_a_converter_alone_makes(tmp_path):
    def written(**keys: object) -> tuple[torch.Tensor, float]:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", keys.pop("arch", "llama"))
        writer.add_rope_dimension_count(DIM)
        for name, value in keys.items():
            getattr(writer, f"add_rope_{name}")(value)
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        writer.close()
        return served_by_llama_cpp(tmp_path / "model.gguf")

    base, kinds = default_inv_freq(THETA, DIM), gguf.RopeScalingType
    table, multiplier = written(scaling_factor=4.0)
    torch.testing.assert_close(table, base / 4, rtol=3e-7, atol=0)  # linear is the default
    assert multiplier == 1.0
    torch.testing.assert_close(written(scaling_type=kinds.NONE, scaling_factor=4.0)[0], base, rtol=3e-7, atol=0)
    yarn = {"scaling_type": kinds.YARN, "scaling_factor": 8.0, "scaling_orig_ctx_len": 256}
    ignored = {"scaling_yarn_beta_fast": 21.0, "scaling_yarn_attn_factor": 3.0}
    table, multiplier = written(**yarn, **ignored, scaling_attn_factors=1.1)
    torch.testing.assert_close(table, yarn_inv_freq(THETA, DIM, 8.0, YarnRamp(256)), rtol=3e-7, atol=0)
    assert multiplier == pytest.approx(1.1 * yarn_attention_factor(8.0), rel=1e-7)
    for bad in ({"arch": "qwen2"}, {"scaling_type": kinds.LONGROPE}):
        with pytest.raises(UserError, match="what llama.cpp computes for (qwen2|llama) .* is not known here"):
            written(**bad)


# With llama.cpp.

CHILD = """
import json, sys
import numpy as np
from llama_cpp import Llama
order = json.load(sys.stdin)
model = Llama(order["model"], n_ctx=2048, n_threads=1, n_threads_batch=1, logits_all=True, type_k=0, type_v=0,
              verbose=False, **order["options"])
found = {}
for tokens in order["prompts"]:
    model.reset()
    model.eval(tokens)
    found[str(len(tokens))] = model.scores[: len(tokens)].copy()
np.savez(order["output"], **found)
"""
LENGTHS = (100, 400, 1500, 2040)
FLOOR, ALIKE, WRONG = 5e-2, 1e-3, 0.3
"""Of any log-probability in the vocabulary: what two ways of rounding float32 angles make of the same model (at 2040
tokens of a Llama both are 3e-3 to 5e-3 from float64), what is left of that where transformers rounds as llama.cpp
does, and what another rope makes."""


@lru_cache
def llama_cpp() -> tuple[str, Path]:
    """Interpreter and converter."""
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no llama.cpp checkout")
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"{python} has no llama_cpp (LLAMA_CPP_PYTHON names another)")
    return python, find_converter()


def vocabulary(folder: Path) -> Path:
    """A tokenizer.model, which the converter takes as it is; a BPE's pre-tokenizer it would have to know."""
    pieces = pytest.importorskip("sentencepiece")
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4000, 7), generator=generator).tolist()
    with open(folder / "tokenizer.model", "wb") as file:
        pieces.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(map(chr, row)) + "".join(map(chr, row)) for row in letters),
            model_writer=file,
            vocab_size=VOCABULARY,
            byte_fallback=True,
            minloglevel=2,
        )
    return folder


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def as_llama_cpp_rounds(stock: torch.nn.Module, model: Path) -> None:
    """Angles by repeated multiplication in float32, divided by the factors in the file."""
    (divisors,) = [t.data for t in gguf.GGUFReader(model).tensors if t.name == "rope_freqs.weight"]
    ratio = np.float32(THETA) ** np.float32(-2 / DIM)

    def forward(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle, angles = position_ids[0].numpy().astype(np.float32), []
        for divisor in divisors:
            angles.append(angle / divisor)
            angle = angle * ratio
        both = torch.from_numpy(np.stack(angles * 2, axis=-1))[None]
        return both.cos() * MULTIPLIER, both.sin() * MULTIPLIER

    stock.model.rotary_emb.forward = forward


@torch.no_grad()
def differences(path: Path, model: Path, same_rounding: bool = False, **options: object) -> dict[int, float]:
    """Largest difference of any log-probability from transformers', by length."""
    output = model.with_suffix(".npz")
    order = {"model": str(model), "prompts": prompts(), "options": options, "output": str(output)}
    done = subprocess.run([llama_cpp()[0], "-c", CHILD], input=json.dumps(order), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if same_rounding:
        as_llama_cpp_rounds(stock, model)
    found = {}
    with np.load(output) as said:
        for tokens in prompts():
            expected = stock(torch.tensor([tokens])).logits[0].log_softmax(-1)
            answer = torch.from_numpy(said[str(len(tokens))]).log_softmax(-1)
            found[len(tokens)] = (answer - expected).abs().max().item()
    print(model.name, "same rounding" if same_rounding else "", {n: f"{d:.1e}" for n, d in found.items()})
    return found


def by_converter_alone(path: Path, folder: Path) -> Path:
    model = folder / "converter-alone.gguf"
    command = [sys.executable, str(llama_cpp()[1]), str(path), "--outfile", str(model), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True)
    return model


@pytest.mark.llama_cpp
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_llama_cpp_computes_what_transformers_does(tmp_path, family):
    _, script = llama_cpp()
    path = vocabulary(checkpoint(tmp_path / "export", family))
    model = convert(
        path,
        tmp_path / f"{family}.gguf",
        converter=script,
        inv_freq=learned_inv_freq(),
        multiplier=MULTIPLIER,
        outtype="f32",
    )
    assert max(differences(path, model).values()) < FLOOR
    assert max(differences(path, model, same_rounding=True).values()) < ALIKE
    assert min(differences(path, by_converter_alone(path, tmp_path)).values()) > WRONG


@pytest.mark.llama_cpp
def test_llama_cpp_reads_the_multiplier_beside_type_none(tmp_path):
    """The frequencies alone are not enough; `served_by_llama_cpp` agrees with what llama.cpp computes."""
    _, script = llama_cpp()
    path = vocabulary(checkpoint(tmp_path / "export"))
    settings = {"converter": script, "inv_freq": learned_inv_freq(), "outtype": "f32"}
    model = convert(path, tmp_path / "no-multiplier.gguf", multiplier=1.0, **settings)
    assert min(differences(path, model).values()) > WRONG
    key = {"llama.rope.scaling.attn_factor": MULTIPLIER}
    assert max(differences(path, model, kv_overrides=key).values()) < FLOOR


@pytest.mark.llama_cpp
@pytest.mark.parametrize("family", BY_FLAGS)
def test_the_flags_of_a_refusal_work(tmp_path, family):
    llama_cpp()
    wanted = yarn_inv_freq(THETA, DIM, FACTOR, YarnRamp(ORIGINAL, **BETAS))
    section = YARN | BETAS | {"attention_factor": MULTIPLIER}
    message = refused(tmp_path, family, section, wanted)
    path = vocabulary(checkpoint(tmp_path / "export", family, section))
    model, found = by_converter_alone(path, tmp_path), flags(message)
    key, value = found["--override-kv"].split("=float:")
    options = {
        "rope_scaling_type": 2,
        "rope_freq_scale": 1 / float(found["--rope-scale"]),
        "yarn_orig_ctx": int(found["--yarn-orig-ctx"]),
        "yarn_beta_fast": float(found["--yarn-beta-fast"]),
        "yarn_beta_slow": float(found["--yarn-beta-slow"]),
        "kv_overrides": {key: float(value)},
    }
    assert max(differences(path, model, **options).values()) < FLOOR
    assert min(differences(path, model).values()) > WRONG
