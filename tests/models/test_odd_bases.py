"""Malicious and damaged base checkpoints: a message each, no traceback, no code run, no file read elsewhere."""

import json
import struct
from pathlib import Path

import pytest
import yaml
from tiny import recipe_tree, save_tiny
from yarn_tune.cli.main import main
from yarn_tune.models import loading

CONFIGS = {
    "layers none": {"num_hidden_layers": 0},
    "layers text": {"num_hidden_layers": "3"},
    "layers negative": {"num_hidden_layers": -1},
    "layers huge": {"num_hidden_layers": 10**9},
    "heads none": {"num_attention_heads": 0},
    "heads null": {"num_attention_heads": None},
    "heads list": {"num_attention_heads": [4]},
    "hidden text": {"hidden_size": "x"},
    "hidden odd": {"hidden_size": 63},
    "hidden huge": {"hidden_size": 2**40},
    "vocabulary negative": {"vocab_size": -1},
    "vocabulary text": {"vocab_size": "128"},
    "window none": {"max_position_embeddings": 0},
    "window text": {"max_position_embeddings": "64"},
    "window null": {"max_position_embeddings": None},
    "window huge": {"max_position_embeddings": 10**30},
    "theta none": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "theta negative": {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
    "theta text": {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
    "theta infinite": {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
    "rope a number": {"rope_parameters": 3},
    "rope a list": {"rope_parameters": ["default"]},
    "rope unknown": {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}},
    "rope nested": {"rope_parameters": {"rope_type": {"rope_type": "yarn"}}},
    "factor none": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 0}},
    "factor text": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}},
    "factor nan": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": float("nan")}},
    "type unknown": {"model_type": "evil"},
    "type null": {"model_type": None},
    "type a path": {"model_type": "../../evil"},
    "architecture": {"architectures": ["os.system"]},
    "activation": {"hidden_act": "__import__('os')"},
    "dtype": {"torch_dtype": "object", "dtype": "object"},
    "code": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "own"},
    "code of another": {"auto_map": {"AutoConfig": "lab/evil--evil.Config"}, "model_type": "own"},
    "quantised oddly": {"quantization_config": {"quant_method": "evil"}},
    "quantised a text": {"quantization_config": "fp8"},
    "deep": {"extra": json.loads("[" * 400 + "]" * 400)},
    "not an object": None,
}
HEADERS = {
    "empty": b"",
    "short": b"\x08\x00",
    "length huge": struct.pack("<Q", 2**62) + b"{}",
    "length negative": b"\xff" * 8 + b"{}",
    "header no JSON": struct.pack("<Q", 4) + b"evil",
    "header a list": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 20_000) + b"[" * 20_000,
    "offsets outside": None,
    "offsets crossed": None,
    "shape huge": None,
    "dtype unknown": None,
    "a pickle": b"\x80\x04cposix\nsystem\n",
}
TENSORS = {
    "offsets outside": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]},
    "offsets crossed": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
    "shape huge": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
    "dtype unknown": {"dtype": "EVIL", "shape": [4], "data_offsets": [0, 16]},
}
TOKENIZERS = {
    "no JSON": ("tokenizer.json", "{"),
    "empty": ("tokenizer.json", ""),
    "other JSON": ("tokenizer.json", "[1, 2]"),
    "settings no JSON": ("tokenizer_config.json", "{"),
    "settings a list": ("tokenizer_config.json", "[]"),
    "class unknown": ("tokenizer_config.json", '{"tokenizer_class": "Evil"}'),
    "code": (
        "tokenizer_config.json",
        '{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}, "tokenizer_class": "Own"}',
    ),
    "special tokens": ("special_tokens_map.json", "{"),
}
ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "raises": "{{ raise_exception('no') }}",
    "undefined": "{{ messages[9].content.x.y }}",
    "syntax": "{% for %}",
    "endless": ENDLESS,
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "another file": "{% include '/etc/passwd' %}",
}


pytestmark = pytest.mark.rope_warnings  # of odd configs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("odd") / "base")


@pytest.fixture
def base(whole, tmp_path, monkeypatch) -> Path:
    """A copy to damage, a recipe over it, and code beside it that must not run."""
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    for path in whole.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe_tree(base, tmp_path, steps=1)))
    return base


def tried(capsys, *settings: str) -> str:
    """Train; returns the output. Training works, or ends with a message that has the reason."""
    code = main(["train", "recipe.yaml", *settings])
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert not Path("ran").exists()
    assert "root:" not in said
    return said if code else ""


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_configs(base, capsys, name):
    config = json.loads((base / "config.json").read_text())
    changed = CONFIGS[name]
    (base / "config.json").write_text("[]" if changed is None else json.dumps(config | changed))
    tried(capsys)


@pytest.mark.parametrize("name", HEADERS)
def test_odd_safetensors(base, capsys, name):
    content = HEADERS[name]
    if content is None:
        header = json.dumps({"model.norm.weight": TENSORS[name]}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(16)
    (base / "model.safetensors").write_bytes(content)
    assert "base.model" in tried(capsys)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_odd_tokenizers(base, capsys, name):
    file, content = TOKENIZERS[name]
    (base / file).write_text(content)
    tried(capsys)


@pytest.mark.parametrize("name", TEMPLATES)
def test_odd_templates(base, capsys, monkeypatch, name):
    """Documents that are conversations are rendered by the base's template."""
    monkeypatch.setattr(loading, "LONGEST_RENDERING", 0.5)
    (base / "chat_template.jinja").write_text(TEMPLATES[name])
    chats = [{"messages": [{"role": "user", "content": "w1 w2 w3"}]}] * 3
    Path("train.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    said = tried(capsys)
    assert "chat template" in said
    assert name != "endless" or "it takes longer than 0.5 seconds" in said
