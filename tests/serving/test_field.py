"""Configs as people have them: reproductions of public reports, each with the answer that `verify` must give.

`field/` holds one config.json per case. The answers were established by hand, from the code of the stacks and the
reports; what vLLM 0.32's own code computes from each config is in `vllm_0.32_reads.json`.
"""

import json
import math
import re
from pathlib import Path

import pytest
from tiny import write_documents
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.models.loading import load_config
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.models.wrappers import text_section, with_text_section
from yarn_tune.models.written_config import check_types
from yarn_tune.serving.verification import reading_of, verify

pytestmark = pytest.mark.rope_warnings
FIELD = Path(__file__).parent / "field"
READS = json.loads((FIELD.parent / "vllm_0.32_reads.json").read_text())
"""Window and multiplier of cos and sin per kind of layer, or the error."""

REACH = "so that factor 4 has no effect; write max_position_embeddings 131072"
MULTIPLIED = "vLLM multiplies the window by the factor"
CANNOT = "RoPE cannot extend it"
NO_ORIGINAL = "original_max_position_embeddings is missing"
ANSWERS: dict[str, tuple[int, list[str], list[str]]] = {
    # case: exit code, texts that must appear, texts that must not
    "01-qwen25-card-recipe": (3, ["max_position_embeddings left at native", REACH], []),
    "01b-qwen25-raised": (0, ["all stacks serve it"], ["ERROR"]),
    "01c-qwen3-card-recipe": (3, [REACH, "(>= 0.30) | 0.0e+00 | 1.13863 | 40960 |"], ["left at native"]),
    "01d-qwen3-raised": (0, ["all stacks serve it"], ["ERROR"]),
    "02-r1-qwen3-attn_factor": (3, ["attn_factor ignored", "multiply cos and sin by 1.13863", "use 1."], ["ERROR"]),
    "03-original-missing": (3, [NO_ORIGINAL, "Write original_max_position_embeddings"], ["4 has no effect"]),
    "03b-original-missing-raised": (3, [NO_ORIGINAL, "524288 tokens"], ["4 has no effect", "write 524288"]),
    "04-factor-int": (0, ["all stacks serve it"], ["ERROR"]),
    "04b-factor-string": (2, ['rope_scaling.factor is "4.0", a string', "write 4.0 without quotes"], []),
    "04c-factor-int-yarn": (0, ["all stacks serve it"], ["ERROR"]),
    "04d-original-string": (2, ['original_max_position_embeddings is "32768", a string', "write 32768 without"], []),
    "04e-original-float": (0, ["all stacks serve it"], ["ERROR"]),
    "04f-max-string": (2, ['max_position_embeddings is "131072", a string', "write 131072 without quotes"], []),
    "04g-max-float": (2, ["max_position_embeddings is 131072.0, where a whole number is needed", "write 131072"], []),
    "04j-theta-string": (2, ['rope_theta is "1000000", a string', "write 1000000 without quotes"], []),
    "05-v5-save-default": (
        3,
        [
            "vllm-0.19 (0.12 to 0.19, on transformers 4) | 9.1e+01",
            "written for transformers 5",
        ],
        [],
    ),
    "05c-theta-lost-hf-override": (3, ["theta lost", "falls back to 10000"], []),
    "05d-theta-lost-llama": (3, ["theta lost", "falls back to 10000"], []),
    "05f-theta-default-family-nothing": (0, ["rope_theta is not written", "unusual for a window of 131072"], ["lost"]),
    "05g-scaling-and-parameters-differ": (0, ["rope_scaling and rope_parameters differ"], []),
    "06-type-and-rope_type-differ": (3, ["does not load: rope_type is 'yarn' and type is 'linear'"], []),
    "06b-type-yarn-rope_type-default": (3, ["does not load: rope_type is 'default' and type is 'yarn'"], []),
    "06c-hyphen-key": (3, ["'rope-scaling' is a key that no stack reads", "'rope_scaling' may be meant"], []),
    "06d-uppercase": (2, ["does not support rope_type 'YaRN'", "write 'yarn'"], ["| ok |"]),
    "06e-rope_type-null": (3, ["does not load: rope_type is null", "rope_type is None and type is 'yarn'"], []),
    "07-dynamic-type": (3, ["(>= 5.0) | 0.0e+00 | 1 | 4096 | ok", "| 8192 |", MULTIPLIED, "NaN beyond"], []),
    "07c-dynamic-alpha-hunyuan": (0, ["not established"], ["MISMATCH"]),
    "08-qwen25vl": (0, ["| 128000 | ok |"], ["no rotary"]),
    "08c-qwen35": (0, ["| 262144 | ok |", "transformers-4.57 has no qwen3_5_text"], ["no rotary", "theta 10000"]),
    "08f-qwen35-override-toplevel": (
        2,
        [
            "rope_parameters is at the top level of a qwen3_5 config",
            "text_config",
        ],
        ["no rotary"],
    ),
    "08g-qwen3vl": (0, ["| 262144 | ok |"], ["no rotary"]),
    "09-gemma3-4b": (0, ["| 131072 | ok |"], ["no rotary", "theta"]),
    "09b-gemma3-text": (0, ["all stacks serve it"], ["ERROR"]),
    "09c-gemma3-text-v5": (3, ["frequencies off by 7.0e+00 (relative) in full_attention layers"], ["ERROR"]),
    "09d-gemma3-text-yarn": (0, ["the section extends to 262144 tokens, but max_position_embeddings is 131072"], []),
    "09e-gemma3-1b": (0, ["| 32768 | ok |"], []),
    "10b-gemma4-text": (0, ["| 262144 | ok |"], ["ERROR"]),
    "11-mistral3-mm": (
        3,
        [
            "multiplies queries by 1 + 0.1 ln(1 + floor(position / 8192))",
            "llama_4_scaling",
        ],
        ["no rotary"],
    ),
    "11c-ministral3-scaling-beta": (3, ["multiplies no queries by their position", "top-level llama_4_scaling"], []),
    "11d-mistral-nemo": (0, ["| 1024000 | ok |"], []),
    "12-deepseek-v3": (0, ["all stacks serve it"], ["ERROR"]),
    "12b-kimi-k2": (0, ["not run by this release", "(>= 0.30) | 0.0e+00 | 1 | 262144 | ok |"], ["MISMATCH"]),
    "12c-kimi-as-deepseek_v3": (0, ["all stacks serve it"], []),
    "12d-deepseek-v2-lite": (0, ["transformers-4.57 ignores mscale_all_dim"], ["MISMATCH"]),
    "12e-deepseek-v32": (0, ["on transformers 5) | 0.0e+00 | 1 | 163840 | ok |"], ["MISMATCH", "1.36889"]),
    "12f-deepseek-mscale_all_dim0": (0, ["| 1.36889 | 163840 | ok |"], []),
    "13-phi35-mini": (3, ["short_factor and long_factor differ"], ["ERROR"]),
    "13b-phi3-su": (
        3,
        [
            "does not recognise type 'su'",
            "write 'longrope'",
            "(4.56 to 4.57) | 0.0e+00 | 1.19024 | 131072 | ok",
        ],
        ["Missing required keys"],
    ),
    "13c-phi3-original-missing": (3, ["(>= 5.0) | 0.0e+00 | 1.19024 | 131072 | ok |"], [NO_ORIGINAL]),
    "13d-phi4-mini": (3, ["(>= 5.0) | 0.0e+00 | 1.19024 | 131072 | ok |"], []),
    "13e-phi3-mscale": (3, ["multiplies cos and sin by 1.1 instead of 1.19024"], []),
    "13f-phi3-original-inside": (3, ["(>= 5.0) | 0.0e+00 | 1.19024 | 131072 | ok |"], []),
    "13g-phi3-yarn": (2, ["turns yarn into longrope", "short_factor"], []),
    "14-gpt-oss": (0, ["all stacks serve it"], []),
    "14b-gpt-oss-override": (3, ["does not load: it takes beta_fast and beta_slow from the rope section"], []),
    "15-olmo3": (0, ["| 1.20794 | 65536 | ok |"], []),
    "16-llama4": (0, [CANNOT, "attend to 8192 tokens only"], ["no rotary"]),
    "17-exaone4-32b": (0, [CANNOT, "full-attention layers have no positions"], []),
    "17c-granite4h": (0, [CANNOT, "position_embedding_type: nope"], []),
    "17d-qwen3-next-yarn": (3, ["max_position_embeddings left at native", "write max_position_embeddings 1048576"], []),
    "17g-chatglm": (0, ["not run by this release: transformers has no model type 'chatglm'"], ["theta 10000"]),
    "17h-command-r": (0, ["(>= 0.30) | 0.0e+00 | 1 | 131072 | ok |", "so it is the native one"], []),
    "17j-smollm3-yarn": (0, ["all stacks serve it"], []),
    "17k-nemotron-h": (2, ["nemotron_h has no rotary position embeddings"], []),
    "17l-qwen1": (0, ["not run by this release: transformers has no model type 'qwen'"], ["MISMATCH"]),
    "18-awq-resave": (0, ["all stacks serve it"], []),
    "18c-tokenizer-max": (0, ["all stacks serve it"], []),
    "18e-config-seq_length": (
        3,
        [
            "seq_length is 8192 and max_position_embeddings 131072",
            "at most 8192 tokens instead of",
        ],
        [],
    ),
    "19-linear-vicuna16k": (0, ["4096 x 4 = 16384 tokens", MULTIPLIED], ["ERROR"]),
    "19b-yarn-llama2-128k": (0, ["all stacks serve it"], []),
    "19c-longlora-linear-raised": (0, ["32768 x 8 = 262144 tokens", "multiplied once more"], []),
    "20-qwen2-sliding-on": (0, [CANNOT, "the last 32768 tokens only"], []),
    "20c-mistral-v01": (0, [CANNOT, "every layer attends to the last 4096 tokens only"], []),
    "20d-mistral-v01-yarn": (0, ["all stacks serve it"], [CANNOT]),
    "21-factor-bigger": (3, [REACH], []),
    "21b-factor-too-small": (3, ["table too short", "NaN", "write a factor of at least 4"], []),
    "21e-attention_factor1": (3, ["attention_factor ignored", "attn_factor = 0.878249"], []),
    "21f-factor-null": (3, ["factor is null", "does not load"], []),
    "21g-factor-missing": (2, ["Missing required keys", "'factor'"], []),
    "21h-beta-null": (3, ["a beta of 0 or null"], []),
    "21j-factor-below-1": (3, ["table too short"], []),
    "22-rope_scaling-list": (2, ["rope_scaling is [", "where an object is needed"], []),
    "22c-rope_scaling-empty": (0, ["all stacks serve it"], []),
    "22e-rope_scaling-false": (0, ["all stacks serve it"], []),
    "23-original-top-level": (3, ["transformers-4.57 (4.56 to 4.57) | 1.2e+00"], [NO_ORIGINAL]),
    "23b-original-top-and-inside-differ": (3, ["131072 at the top level and 8192 in the rope section"], []),
    "24c-llama3-missing-keys": (2, ["Missing required keys", "low_freq_factor"], []),
    "25a-gemma3-flat-rope_parameters": (3, ["ERROR: rope_parameters is one section", "is dropped (multiplier 1)"], []),
    "25c-max_position-missing": (0, ["| 2048 | ok |"], []),
    "25d-parameters-no-type": (3, ["no rope_type: nothing is scaled", "| 524288 |"], []),
    "25e-linear-missing-factor": (2, ["Missing required keys", "'factor'"], []),
    "25f-phi3-su-and-longrope": (3, ["short_factor and long_factor differ"], []),
    "26-kimi-k25": (
        0,
        [
            "transformers (>= 5.0) | 0.0e+00 | 1 | 262144 | ok |",
            "vllm (>= 0.30) | 0.0e+00 | 1 | 262144 | ok |",
            "not checked: transformers-4.57 has no kimi_k25 in these releases",
        ],
        ["MISMATCH", "no model type", "custom code"],
    ),
}  # fmt: skip


def checkpoint(folder: Path, config: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def config_of(case: str) -> dict:
    return json.loads((FIELD / f"{case}.json").read_text())


def test_every_case_has_an_answer():
    assert set(ANSWERS) == {path.stem for path in FIELD.glob("*.json")}


@pytest.mark.parametrize("case", ANSWERS)
def test_verify_answers(case, tmp_path, capsys):
    code, expected, absent = ANSWERS[case]
    assert main(["verify", checkpoint(tmp_path, config_of(case)), "--all"]) == code
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "Traceback" not in said
    for text in expected:
        assert text in said
    for text in absent:
        assert text not in said


@pytest.mark.parametrize("case", READS)
def test_the_vllm_row_is_what_vllm_computes(case):
    """vLLM 0.32: the window exactly, multipliers to float32; where its code raises, the row is no reading."""
    config, reads = config_of(case), READS[case]
    try:
        check_types(config)
        found = reading_of("vllm", config)
    except UserError:
        assert "error" in reads or case == "17k-nemotron-h"  # a hybrid whose attention has no positions
        return
    if "error" in reads:
        assert found.state != "read"
    elif found.state == "read":
        assert found.window == reads["window"]
        for kind, multiplier in reads["multipliers"].items():
            assert found.tables[kind][-1].multiplier == pytest.approx(multiplier, rel=1e-6)
    else:
        assert case == "14b-gpt-oss-override"  # its model file, which was not run there, needs two more keys


@pytest.mark.parametrize(
    "case", ["05d-theta-lost-llama", "21b-factor-too-small", "25d-parameters-no-type", "06c-hyphen-key"]
)
def test_init_and_plan_say_what_verify_calls_an_error(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = checkpoint(tmp_path / "base", config_of(case))
    (error, *_) = verify(base).errors
    files = [str(write_documents(tmp_path / name, [50], seed=i)) for i, name in enumerate(["a.jsonl", "b.jsonl"])]
    order = ["init", base, "--window", "524288", "--train", files[0], "--heldout", files[1]]
    assert main([*order, "--gpu-memory", "100000", "--out", "made.yaml"]) == 0
    assert f"# WARNING: the base's config.json: {error}" in Path("made.yaml").read_text()


@pytest.mark.parametrize(
    "case", ["04b-factor-string", "04d-original-string", "04f-max-string", "04j-theta-string", "22-rope_scaling-list"]
)
def test_init_refuses_wrong_types_as_verify_does(case, tmp_path, capsys):
    base = checkpoint(tmp_path, config_of(case))
    files = [str(write_documents(tmp_path / name, [50], seed=i)) for i, name in enumerate(["a.jsonl", "b.jsonl"])]
    assert main(["init", base, "--window", "524288", "--train", files[0], "--heldout", files[1]]) == 2
    said = capsys.readouterr().err
    assert main(["verify", base]) == 2
    other = capsys.readouterr().err
    assert said.replace("rope_parameters", "rope_scaling").split(" is ")[1] == other.split(" is ")[1]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("08f-qwen35-override-toplevel", "rope_parameters is at the top level of a qwen3_5 config"),
        ("13b-phi3-su", "rope_scaling has type 'su', by which transformers 5 does not find the original length"),
    ],
)
def test_init_says_why_transformers_does_not_load_it(case, reason, tmp_path):
    with pytest.raises(UserError, match=re.escape(reason)):
        load_config(checkpoint(tmp_path, config_of(case)))


# What vLLM 0.32 makes of --hf-overrides: window and theta from its own ModelConfig.

PLAIN, NEMO, WRAPPED, SHORT = "22c-rope_scaling-empty", "11d-mistral-nemo", "08c-qwen35", "18e-config-seq_length"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LEGACY = {"type": "yarn", "factor": 4.0, "rope_theta": 1e6}
BARE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
WHOLE = {"rope_parameters": YARN | {"rope_theta": 1e6}, "max_position_embeddings": 131072}
OLD = {"rope_scaling": YARN, "max_position_embeddings": 131072}
INSIDE = {"rope_parameters": YARN | {"original_max_position_embeddings": 262144}, "max_position_embeddings": 1048576}
OVERRIDES = {
    "a section without theta": (PLAIN, {"rope_parameters": YARN}, "differs", 40960, 'add "rope_theta": 1e+06'),
    "a whole section": (PLAIN, WHOLE, "ok", 131072, "draft"),
    "the old name": (PLAIN, OLD, "differs", 131072, 'add "rope_theta"'),
    "type for rope_type": (PLAIN, {"rope_parameters": LEGACY}, "does not load", None, "KeyError: 'rope_type'"),
    "no original length": (PLAIN, {"rope_parameters": BARE}, "does not load", None, "KeyError: 'original_max"),
    "theta alone": (NEMO, {"rope_theta": 5e5}, "differs", 1024000, "rope_theta beside the section has no effect"),
    "the window alone": (NEMO, {"max_position_embeddings": 4096}, "ok", 4096, "draft"),
    "the top level of a wrapper": (WRAPPED, {"rope_parameters": YARN}, "differs", 262144, 'write {"text_config"'),
    "inside a text config": (WRAPPED, {"text_config": INSIDE}, "ok", 1048576, "this checkpoint has such layers"),
    "another key of the window": (SHORT, {"seq_length": 131072}, "ok", 131072, "draft"),
}
"""Case, overrides, status of the vLLM row, its window, and what must be said."""


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(name, tmp_path, capsys):
    case, overrides, status, window, said = OVERRIDES[name]
    folder = checkpoint(tmp_path, config_of(case))
    made = verify(folder, ["vllm"], overrides)
    (line,) = made.lines
    assert line.status == status
    assert window is None or line.window == window
    # vLLM 0.29 moves YaRN's ramp where positions have axes.
    agrees = made.passed and name != "inside a text config"
    assert main(["verify", folder, "--all", "--hf-overrides", json.dumps(overrides)]) == (0 if agrees else 3)
    assert said in capsys.readouterr().out


def test_overrides_are_vllms_and_json(tmp_path, capsys):
    folder = checkpoint(tmp_path, config_of("22c-rope_scaling-empty"))
    assert main(["verify", folder, "--for", "sglang", "--hf-overrides", "{}"]) == 2
    assert "sglang does not take it" in capsys.readouterr().err
    assert main(["verify", folder, "--hf-overrides", "{rope"]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert main(["verify", folder, "--hf-overrides", "[1]"]) == 2
    assert "is not a JSON object" in capsys.readouterr().err


# Neighbours of the cases: the same kinds of mistake under other keys, types and families.

THETA_FREE = {"rope_theta": ...}
"""`...` takes a key out of the config."""
FLAT_LINEAR = {"rope_scaling": ..., "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
KINDS = {"rope_parameters": {"full_attention": YARN | {"rope_theta": 1e6}}}
MILLION = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
TYPO = {"rope_type": "yarn", "factor": 4.0, "orignal_max_position_embeddings": 32768}
DEFAULT = {"rope_type": "default", "factor": 4.0}
GEMMA = "09b-gemma3-text"
NEIGHBOURS: dict[str, tuple[str, dict, int, str]] = {
    "ropeScaling": (PLAIN, {"ropeScaling": YARN}, 3, "'ropeScaling' is a key that no stack reads"),
    "rope_scalling": (PLAIN, {"rope_scalling": YARN}, 3, "'rope_scaling' may be meant"),
    "another name": (PLAIN, {"yarn": YARN}, 3, "'yarn' is a key that no stack reads"),
    "rope-theta": (PLAIN, THETA_FREE | {"rope-theta": 1e6}, 3, "'rope_theta' may be meant"),
    "a key inside": (PLAIN, {"rope_scaling": TYPO}, 3, "'orignal_max_position_embeddings' in rope_scaling"),
    "beta as a string": (PLAIN, {"rope_scaling": YARN | {"beta_fast": "32"}}, 2, 'beta_fast is "32", a string'),
    "truncate as a string": (PLAIN, {"rope_scaling": YARN | {"truncate": "false"}}, 2, "true or false without quotes"),
    "head size as a string": (PLAIN, {"head_dim": "128"}, 2, 'head_dim is "128", a string'),
    "a list of heads": (PLAIN, {"num_attention_heads": [32]}, 2, "num_attention_heads is [32]"),
    "null window": (PLAIN, {"max_position_embeddings": None}, 2, "max_position_embeddings is null"),
    "null theta": (PLAIN, {"rope_theta": None}, 2, "rope_theta is null, where a number is needed"),
    "negative factor": (PLAIN, {"rope_scaling": YARN | {"factor": -4}}, 2, "where a number above 0 is needed"),
    "JSON in a string": (PLAIN, {"rope_scaling": json.dumps(YARN)}, 2, "where an object is needed"),
    "a type that is a number": (PLAIN, {"rope_scaling": YARN | {"rope_type": 3}}, 2, "where a name is needed"),
    "factor under default": (PLAIN, {"rope_scaling": DEFAULT}, 3, "NaN beyond them"),
    "n_positions": (PLAIN, {"n_positions": 2048}, 3, "vLLM takes n_positions for the window"),
    "max_seq_len": (PLAIN, {"max_seq_len": 8192}, 3, "vLLM and SGLang take max_seq_len"),
    "model_max_length": (PLAIN, {"model_max_length": 262144}, 3, "40960 positions but takes prompts of 262144"),
    "a million of 4 x 262144": (PLAIN, {"max_position_embeddings": 1010000, "rope_scaling": MILLION}, 0, "all stacks"),
    "kinds on one table": (PLAIN, KINDS, 3, "all layers of qwen3 share one"),
    "one table on kinds": (GEMMA, FLAT_LINEAR, 3, "its linear scaling is dropped"),
    "ntk": (
        PLAIN,
        {"rope_scaling": {"type": "ntk", "factor": 4.0}},
        2,
        "transformers: does not load: it does not support",
    ),
    "all layers slide": (
        PLAIN,
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0},
        0,
        "every layer attends to the last 4096 tokens only",
    ),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours(name, tmp_path, capsys):
    case, changes, code, text = NEIGHBOURS[name]
    config = config_of(case) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    assert main(["verify", checkpoint(tmp_path, config), "--all"]) == code
    captured = capsys.readouterr()
    assert text in captured.out + captured.err


@pytest.mark.parametrize("wrapper", ["llava", "mistral3", "gemma3", "qwen3_vl", "internvl"])
def test_a_wrapped_model_reads_as_its_language_model(wrapper, tmp_path):
    """The text config of each of these wrappers may be of any type; here it is Qwen 3 with YaRN."""
    text = config_of("01d-qwen3-raised")
    inner = {"qwen3_vl": "qwen3_vl_text", "gemma3": "gemma3_text"}.get(wrapper, "qwen3")
    config = {"model_type": wrapper, "text_config": text | {"model_type": inner}}
    alone = verify(checkpoint(tmp_path / "alone", text | {"model_type": inner}), ["transformers", "vllm"])
    wrapped = verify(checkpoint(tmp_path / "wrapped", config), ["transformers", "vllm"])
    assert [line for line in wrapped.lines] == [line for line in alone.lines]
    assert wrapped.lines[0].window == 131072


def test_init_takes_a_shorter_native_window_than_the_config_states(tmp_path, capsys, monkeypatch):
    """Mistral Nemo states 1,024,000 tokens and was trained with 131,072."""
    monkeypatch.chdir(tmp_path)
    base = checkpoint(tmp_path / "base", config_of("11d-mistral-nemo"))
    files = [str(write_documents(tmp_path / name, [50], seed=i)) for i, name in enumerate(["a.jsonl", "b.jsonl"])]
    order = ["init", base, "--window", "524288", "--train", files[0], "--heldout", files[1], "--out", "made.yaml"]
    assert main([*order, "--gpu-memory", "100000"]) == 2
    assert "native window must not exceed" in capsys.readouterr().err
    assert main([*order, "--gpu-memory", "100000", "--native", "131072"]) == 0
    assert "native: 131072" in Path("made.yaml").read_text()


def test_kimi_k25_is_planned_as_released(tmp_path, capsys):
    """The text model has the type kimi_k2 and custom code. Nothing is folded into its quantised weights."""
    base = checkpoint(tmp_path / "base", config_of("26-kimi-k25"))
    facts = rope_facts(load_config(base))
    assert (facts.model_type, facts.native, facts.ramp.factor, facts.ramp.original) == (
        "deepseek_v3", 262144, 64.0, 4096
    )  # fmt: skip
    assert facts.softmax_gain == pytest.approx((0.1 * math.log(64) + 1) ** 2)
    text = text_section(config_of("26-kimi-k25"))
    changed = with_text_section(config_of("26-kimi-k25"), text | {"max_position_embeddings": 524288})
    written = config_of("26-kimi-k25")
    written["text_config"]["max_position_embeddings"] = 524288
    assert changed == written, "the name of the text model stays kimi_k2"
    files = [str(write_documents(tmp_path / name, [50], seed=i)) for i, name in enumerate(["a.jsonl", "b.jsonl"])]
    order = ["init", base, "--window", "524288", "--train", files[0], "--heldout", files[1], "--gpu-memory", "100000"]
    assert main([*order, "--out", str(tmp_path / "made.yaml")]) == 0
    made = (tmp_path / "made.yaml").read_text()
    assert "those of a quantised base (compressed-tensors) are left as they are; tune the unquantised base" in made
    assert "frequencies: scale\n  query_gains: none" in made


def test_kimi_k2_is_told_to_be_renamed_and_then_works(tmp_path, capsys):
    """transformers has no kimi_k2; the same config as deepseek_v3 is planned, with its YaRN continued."""
    base = checkpoint(tmp_path / "base", config_of("12b-kimi-k2"))
    files = [str(write_documents(tmp_path / name, [50], seed=i)) for i, name in enumerate(["a.jsonl", "b.jsonl"])]
    order = ["init", base, "--window", "524288", "--train", files[0], "--heldout", files[1], "--gpu-memory", "100000"]
    assert main([*order, "--out", str(tmp_path / "made.yaml")]) == 2
    assert "no model type 'kimi_k2', which is a deepseek_v3 under another name" in capsys.readouterr().err
    renamed = config_of("12b-kimi-k2") | {"model_type": "deepseek_v3"}
    del renamed["auto_map"]
    facts = rope_facts(load_config(checkpoint(tmp_path / "renamed", renamed)))
    assert (facts.native, facts.ramp.factor, facts.ramp.original) == (262144, 64.0, 4096)
    assert facts.softmax_gain == pytest.approx((0.1 * math.log(64) + 1) ** 2)
