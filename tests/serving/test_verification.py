"""Any checkpoint's config, read as each stack reads it: the known faults are named, ours pass."""

import json

import pytest
import torch
from tiny import finished_run, save_tiny
from transformers import AutoModelForCausalLM
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.serving.stacks import STACKS, default_stacks
from yarn_tune.serving.verification import verify

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 32768,
    "rope_theta": 1e4,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}
LISTS = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
FAULTS = {
    "attention_factor only": (
        LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.45}},
        {"vllm-0.29": "multiplies cos and sin by 1.20794 instead of 1.45", "sglang": "1.20794 instead of 1.45"},
        "attention_factor ignored",
    ),
    "factor below the window": (
        LLAMA | {"rope_scaling": YARN | {"factor": 7.83}},
        {"vllm": "32072 positions but takes prompts of 32768: NaN", "vllm-0.29": "at most 32071 tokens"},
        "table too short",
    ),
    "no theta": (
        {k: v for k, v in LLAMA.items() if k != "rope_theta"} | {"rope_scaling": YARN},
        {},
        "theta lost",
    ),
    "nested truncate": (
        LLAMA
        | {
            "model_type": "gemma3_text",
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 1e6, "truncate": False, "beta_fast": 21.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {"vllm": "frequencies off by 4.3e-01 (relative) in full_attention layers"},
        "truncate nested",
    ),
    "unequal lists": (
        LLAMA | {"rope_scaling": YARN | LISTS | {"rope_type": "longrope", "attention_factor": 1.3}},
        {"vllm": "multiplies cos and sin by 1.11803 instead of 1.3", "sglang": "1.11803 instead of 1.3"},
        "short_factor and long_factor differ",
    ),
    "window left at native": (
        LLAMA | {"rope_scaling": YARN, "max_position_embeddings": 4096},
        {},
        "max_position_embeddings left at native",
    ),
}


def written(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.rope_warnings
@pytest.mark.parametrize("name", FAULTS)
def test_known_faults_are_named(tmp_path, capsys, name):
    config, expected, trap = FAULTS[name]
    folder = written(tmp_path, config)
    found = {line.stack: "; ".join(line.problems) for line in verify(folder).lines}
    assert not found["transformers"]
    for stack, words in expected.items():
        assert words in found[stack]
    assert main(["verify", folder]) == 3
    out = capsys.readouterr().out
    assert trap in out
    assert "MISMATCH" in out


def test_the_same_configs_mended_pass(tmp_path):
    both = YARN | {"attention_factor": 1.45, "attn_factor": 1.45 / 1.2079441541679836}
    good = LLAMA | {"rope_scaling": both, "rope_parameters": both | {"rope_theta": 1e4}}
    good["rope_scaling"] = good["rope_parameters"]
    made = verify(written(tmp_path, good))
    assert made.passed
    assert [line.stack for line in made.lines] == list(default_stacks())
    assert made.traps == made.errors == []


@pytest.mark.parametrize("frequencies", ["scale", "ramp", "per_pair"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo3", "gpt_neox"])
def test_our_exports_pass_against_what_was_learned(tmp_path, family, frequencies):
    target = export(finished_run(tmp_path, frequencies, family))
    made = verify(str(target))
    assert made.reference == "fidelity.json"
    assert made.passed, made.text()


def test_a_re_save_with_transformers_5_is_caught(tmp_path):
    """Quantisers and merges do this: rope_scaling and rope_theta are gone, and transformers 4 reads plain RoPE."""
    base = save_tiny(tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    target = export(finished_run(tmp_path, "ramp", base=base))
    AutoModelForCausalLM.from_pretrained(target).save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "fidelity.json").write_bytes((target / "fidelity.json").read_bytes())
    made = verify(str(tmp_path / "again"))
    problems = {line.stack: line.problems for line in made.lines}
    assert problems["transformers"] == problems["vllm"] == []
    assert any("frequencies off by" in text for text in problems["transformers-4.57"])
    assert any("written for transformers 5 only" in text for text in made.traps)


@pytest.mark.rope_warnings
def test_a_tampered_export_is_caught(tmp_path):
    target = export(finished_run(tmp_path, "scale"))
    config = json.loads((target / "config.json").read_text())
    for section in (config["rope_parameters"], config["rope_scaling"]):
        section["factor"] *= 1.01
    (target / "config.json").write_text(json.dumps(config))
    assert any("frequencies off" in text for text in verify(str(target), ["transformers"]).lines[0].problems)


def test_a_folded_export_counts_the_fold(tmp_path):
    target = export(finished_run(tmp_path, "scale", settings=("export.fold=always",)))
    made = verify(str(target))
    assert made.passed
    learned = json.loads((target / "fidelity.json").read_text())["attention_factor"]
    assert all(line.multiplier == pytest.approx(learned, rel=1e-6) for line in made.lines)


def test_all_stacks_and_unknown_ones(tmp_path, capsys):
    folder = written(tmp_path, LLAMA)
    assert [line.stack for line in verify(folder, ["all"]).lines] == list(STACKS)
    assert main(["verify", folder, "--for", "vlm"]) == 2
    assert "unknown stack 'vlm'" in capsys.readouterr().err
    with pytest.raises(UserError, match="gpt2 has no rotary"):
        verify(written(tmp_path / "gpt2", {"model_type": "gpt2"}))


def test_json(tmp_path, capsys):
    assert main(["verify", written(tmp_path, LLAMA), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["passed"]
    assert value["lines"][0]["frequencies"] == 0.0
    assert torch.tensor(value["lines"][0]["window"]) == 32768


def test_overrides_for_all_stacks_are_those_of_vllm(tmp_path, capsys):
    save_tiny(tmp_path / "base")
    given = '{"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}'
    assert main(["verify", str(tmp_path / "base"), "--for", "all", "--hf-overrides", given, "--json"]) == 0
    stacks = [line["stack"] for line in json.loads(capsys.readouterr().out)["lines"]]
    assert stacks == [name for name, stack in STACKS.items() if stack.overrides]
    for wrong in ('{"text_config": "x"}', '{"rope_parameters": 4}'):
        assert main(["verify", str(tmp_path / "base"), "--hf-overrides", wrong]) == 2
        assert "must be an object" in capsys.readouterr().err


def test_an_export_without_checksums_is_read_like_any_checkpoint(tmp_path):
    """Version 0.1.0 wrote no checksums: its fidelity.json is not used, and its export still passes."""
    target = export(finished_run(tmp_path, "per_pair"))
    (target / "checksums.json").unlink()
    fidelity = json.loads((target / "fidelity.json").read_text())
    del fidelity["sha256"]
    (target / "fidelity.json").write_text(json.dumps(fidelity))
    found = verify(str(target))
    assert found.passed
    assert found.reference == "transformers 5"


@pytest.mark.parametrize(
    "content",
    ['{"model.safetensors": "abc"}', '["model.safetensors"]', "3", "null"],
    ids=["object", "list", "3", "null"],
)
@pytest.mark.parametrize("name", ["checksums.json", "fidelity.json"])
def test_files_of_another_tool_under_our_names(tmp_path, name, content):
    """They are none of ours, so the checkpoint is read like any other."""
    folder = written(tmp_path, LLAMA)
    (tmp_path / name).write_text(content)
    found = verify(folder)
    assert found.passed
    assert found.reference == "transformers 5"


@pytest.mark.parametrize("key", ["files", "sha256"])
def test_a_list_of_checksums_with_a_damaged_key_is_not_another_tools(tmp_path, key):
    target = export(finished_run(tmp_path, "per_pair"))
    listed = target / "checksums.json"
    listed.write_text(listed.read_text().replace(f'"{key}"', f'"{key[:-1]}x"'))
    with pytest.raises(UserError, match="its checksum does not match its content"):
        verify(str(target))
