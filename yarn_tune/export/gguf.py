"""Write a GGUF that llama.cpp serves as tuned: the output of its own converter, with the learned numbers added.

No config.json is enough: the converter drops longrope's lists, and hardly any loader reads the attention factor and
betas that it writes for YaRN. What llama.cpp computes for a Llama (as vendored in llama-cpp-python 0.3.36):

    angle of pair i at position p   p x theta^(-2i/d) / rope_freqs.weight[i]; Llama 3.1's own table is carried so
    multiplier of cos and sin       {arch}.rope.scaling.attn_factor, times 1 + 0.1 ln s under type yarn only
    window                          {arch}.context_length

So the checkpoint is converted without its rope section, and these three are written beside `type = none`. A known
limitation: shifting the cache (`--context-shift`, `--cache-reuse`; off by default) multiplies the keys again.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckFailed, UserError
from ..models import FAMILIES, config_json, layout_of
from ..rope import YarnRamp, default_inv_freq, snapped_betas, yarn_attention_factor, yarn_inv_freq
from ..serving import FREQUENCY_TOLERANCE, MULTIPLIER_TOLERANCE, frequency_error, v5_sections

try:
    import gguf
except ImportError:
    gguf = None  # type: ignore[assignment, unused-ignore]

ARCHITECTURES = {kind: row.gguf for kind, row in FAMILIES.items() if row.gguf}
"""Model type -> llama.cpp's architecture, for those whose loader reads `rope_freqs.weight` and whose result was run."""
BY_FLAGS = tuple(kind for kind, row in FAMILIES.items() if row.gguf_flags)
"""Model types whose loader refuses `rope_freqs.weight` but accepts a rounded YaRN ramp as flags (result was run)."""
DIVISORS, CONVERTER = "rope_freqs.weight", "convert_hf_to_gguf.py"


def convert(
    checkpoint: Path, out: Path, *, converter: Path | None, inv_freq: Tensor, multiplier: float, outtype: str = "f16"
) -> Path:
    """Write a checkpoint as a GGUF that serves these frequencies and this multiplier.

    Args:
        checkpoint: an export; its `max_position_embeddings` is the window, of its rope section only theta is read.
        out: the file to write; replaced whole or not at all.
        converter: see `find_converter`.
        inv_freq: `[d/2]` in radians per token.
        multiplier: multiplier of cos and sin, without what is folded into the weights of `checkpoint`.
        outtype: type of the weights, as for the converter (f32, f16, bf16, q8_0, auto).

    Raises:
        UserError: if llama.cpp cannot serve this model type in this way, or its converter is missing or fails.
        CheckFailed: if the file that was written serves other numbers.
    """
    _installed()
    config, inv_freq = config_json(str(checkpoint)), inv_freq.detach().cpu()
    section = v5_sections(config, layout_of(config)).get("", {})
    if config["model_type"] not in ARCHITECTURES:
        raise UserError(_refusal(config, section, inv_freq, multiplier))
    script, arch, theta = find_converter(converter), ARCHITECTURES[config["model_type"]], section["rope_theta"]
    divisors = default_inv_freq(theta, 2 * len(inv_freq), torch.float64) / inv_freq.double()
    learned = {
        f"{arch}.context_length": (config["max_position_embeddings"], "UINT32"),
        f"{arch}.rope.scaling.type": ("none", "STRING"),
        f"{arch}.rope.scaling.attn_factor": (multiplier, "FLOAT32"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=out.parent) as scratch:
        plain, partial, folder = Path(scratch) / "plain", Path(scratch) / "partial", Path(scratch) / "hf" / out.stem
        _without_rope(checkpoint, config, theta, folder)
        command = [sys.executable, str(script), str(folder), "--outfile", str(plain), "--outtype", outtype]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = "\n  ".join(done.stderr.strip().splitlines()[-3:]) or "it ended without a message"
            raise UserError(f"export --gguf: {script} could not convert the checkpoint:\n  {reason}")
        _rewrite(plain, partial, arch, learned, divisors)
        found, gain = served_by_llama_cpp(partial)
        error = frequency_error(found, inv_freq)
        if not (error <= FREQUENCY_TOLERANCE and abs(gain / multiplier - 1) <= MULTIPLIER_TOLERANCE):
            raise CheckFailed(
                f"export --gguf: llama.cpp would serve frequencies off by {error:.1e} (relative) and the multiplier "
                f"{gain:.6g} instead of {multiplier:.6g}; {out} was not written"
            )
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, out)
    return out


def find_converter(given: Path | None = None) -> Path:
    """llama.cpp's converter: the script, or the checkout it is in; by default the checkout named by $LLAMA_CPP.

    Raises:
        UserError: if it is not there.
    """
    place = given or Path(os.environ.get("LLAMA_CPP") or "llama.cpp")
    script = place if place.is_file() else place / CONVERTER
    if not script.is_file():
        raise UserError(
            f"export --gguf: llama.cpp's {CONVERTER} is not at {place}. Get it with\n"
            "  git clone --depth 1 https://github.com/ggml-org/llama.cpp\n  export LLAMA_CPP=$PWD/llama.cpp"
        )
    return script


def served_by_llama_cpp(path: Path) -> tuple[Tensor, float]:
    """Inverse frequencies (float32 `[d/2]`) and multiplier of cos and sin that llama.cpp computes from a GGUF.

    Raises:
        UserError: for architectures and scaling types that are not known here.
    """
    _installed()
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    rope = {n.removeprefix(f"{arch}.rope."): f.contents() for n, f in reader.fields.items() if f"{arch}.rope." in n}
    kind, factor = rope.get("scaling.type", "linear"), rope.get("scaling.factor") or 1.0
    if arch not in ARCHITECTURES.values() or kind not in ("none", "linear", "yarn"):
        raise UserError(f"{path}: what llama.cpp computes for {arch} with rope scaling {kind!r} is not known here")
    theta, dim, multiplier = rope.get("freq_base", 1e4), rope["dimension_count"], rope.get("scaling.attn_factor", 1.0)
    table = default_inv_freq(theta, dim, torch.float64) / (factor if kind == "linear" else 1.0)
    if kind == "yarn":  # rounded, over the betas 32 and 1, whatever keys there are for them
        table = yarn_inv_freq(
            theta, dim, factor, YarnRamp(rope["scaling.original_context_length"]), dtype=torch.float64
        )
        multiplier *= yarn_attention_factor(factor)
    for divisors in (tensor.data for tensor in reader.tensors if tensor.name == DIVISORS):
        if divisors.shape != table.shape:
            raise UserError(f"{path}: llama.cpp needs {len(table)} numbers in {DIVISORS}; found {len(divisors)}")
        table = table / torch.from_numpy(np.array(divisors, dtype=np.float64))
    return table.float(), multiplier


def _installed() -> None:
    if gguf is None:
        raise UserError("export --gguf: the gguf package is not installed; pip install gguf sentencepiece")


def _without_rope(checkpoint: Path, config: dict[str, Any], theta: float, folder: Path) -> None:
    """Make a folder with the checkpoint without rope scaling, its files as links; the model gets the folder's name."""
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    kept = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}
    kept |= {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def _rewrite(source: Path, target: Path, arch: str, learned: dict[str, tuple[Any, str]], divisors: Tensor) -> None:
    """Copy a GGUF without changes, except for the learned keys and the divisors."""
    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    made = fields.pop("general.architecture").contents()
    if made != arch:
        raise UserError(f"export --gguf: the converter wrote the architecture {made!r}, but only {arch!r} was checked")
    writer = gguf.GGUFWriter(target, arch, endianess=reader.endianess)
    writer.data_alignment = int(reader.alignment)
    values = {name: (field.contents(), field.types[0], field.types[-1]) for name, field in fields.items()}
    new = {name: (value, gguf.GGUFValueType[kind], None) for name, (value, kind) in learned.items()}
    for name, (value, kind, inner) in (values | new).items():
        writer.add_key_value(name, value, kind, inner if kind == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        if tensor.name != DIVISORS:
            writer.add_tensor(tensor.name, tensor.data, None, tensor.tensor_type, reader.endianess)
    writer.add_tensor(DIVISORS, divisors.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _refusal(config: dict[str, Any], section: dict[str, Any], inv_freq: Tensor, multiplier: float) -> str:
    """The error message: what a GGUF would lose, and the flags of llama.cpp that replace it, if there are any."""
    kind = config["model_type"]
    text = (
        f"export --gguf: llama.cpp is known to read a table of frequencies for {', '.join(ARCHITECTURES)} only; a "
        f"GGUF of {kind} ({', '.join(config.get('architectures') or '?')}) loses the learned frequencies and the "
        f"multiplier {multiplier:.6g} of cos and sin"
    )
    if kind not in BY_FLAGS:
        return f"{text}, and no flags of llama.cpp were checked for it"
    if section.get("rope_type") == "yarn":
        scale, original, theta = section["factor"], section["original_max_position_embeddings"], section["rope_theta"]
        betas = section.get("beta_fast") or 32.0, section.get("beta_slow") or 1.0
        fast, slow = snapped_betas(theta, 2 * len(inv_freq), original, *betas)
        half = theta ** (0.5 / len(inv_freq))
        fast, slow = fast / half, slow * half  # half a pair inwards: llama.cpp rounds outwards, in float32
        table = yarn_inv_freq(theta, 2 * len(inv_freq), scale, YarnRamp(original, fast, slow))
        if frequency_error(table, inv_freq) <= FREQUENCY_TOLERANCE:
            return (
                f"{text}; these flags carry both, with what {CONVERTER} makes of the export:\n"
                f"  -c {config['max_position_embeddings']} --rope-scaling yarn --rope-scale {scale:.9g} "
                f"--yarn-orig-ctx {original} --yarn-beta-fast {fast:.9g} --yarn-beta-slow {slow:.9g} --override-kv "
                f"{kind}.rope.scaling.attn_factor=float:{multiplier / yarn_attention_factor(scale):.9g}"
            )
    return f"{text}; flags can carry a YaRN ramp that ends at whole pairs (rope.frequencies: scale), which this is not"
