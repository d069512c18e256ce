"""Exports of every family and parameterisation, served by the real vLLM: the same log-probabilities as transformers.

One process of vLLM serves all checkpoints, because importing it takes longer than serving a tiny one.
"""

import gzip
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny import GROWING, THETA_ONLY, YARN_ALONE, finished_run, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from yarn_tune.cli.main import main
from yarn_tune.engines.agreement import agreement, compare_with_transformers, random_prompts, transformers_logprobs
from yarn_tune.engines.vllm_runner import QUIET, Job, vllm_logprobs
from yarn_tune.export.checkpoint import export
from yarn_tune.models.loading import config_json

DATA = Path(__file__).parents[2] / "data"
DEMO, HELDOUT = DATA / "tiny-base", DATA / "sample" / "heldout.jsonl.gz"
ASK = DATA.parent / "examples" / "ask.py"
NATIVE, WINDOW = 128, 1024
TOLERANCE = 1e-4
SIZE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": NATIVE,
}
SLIDING = {"head_dim": 64, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
LATENT = {
    "num_key_value_heads": 2, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
EXTRA = {
    "gpt_neox": {"rotary_pct": 0.25},
    "qwen3": {"head_dim": 64},
    "phi3": {"original_max_position_embeddings": NATIVE},
    "gemma3_text": {"head_dim": 64, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    **dict.fromkeys(("gemma", "glm", "glm4", "ernie4_5", "seed_oss", "qwen3_moe"), {"head_dim": 64}),
    **dict.fromkeys(("gemma2", "ministral"), SLIDING),
    "gpt_oss": SLIDING | {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 4.0, "beta_slow": 0.5,
            "truncate": False, "original_max_position_embeddings": NATIVE // 2,
        },
    },
    **dict.fromkeys(("glm4_moe", "helium"), {"head_dim": 64}),
    "ministral3": {
        "head_dim": 64, "rope_parameters": GROWING | {"original_max_position_embeddings": NATIVE // 2},
    },
    "flex_olmo": {"moe_intermediate_size": 192},  # vLLM takes this for the inner width, transformers intermediate_size
    "gemma3n_text": SLIDING | {"activation_sparsity_pattern": [0.0] * 2, "num_kv_shared_layers": 0},
    "solar_open": {"head_dim": 64, "first_k_dense_replace": 1},
    "cwm": SLIDING,
    "gemma4_text": SLIDING | {
        "global_head_dim": 128, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "hy_v3": {  # with keys of its releases that transformers does not write
        "head_dim": 64, "first_k_dense_replace": 1, "expert_hidden_dim": 32, "qk_norm": True, "route_norm": True,
        "num_shared_experts": 1,
    },
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), {
        "head_dim": 64, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
        "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    }),
    "vaultgemma": SLIDING | {"query_pre_attn_scalar": 64},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {**MAMBA, "head_dim": 64, "mamba_d_ssm": 256},
    "exaone4": {"layer_types": ["full_attention"] * 2},
    "falcon": {"num_kv_heads": 2},
    "deepseek_v2": LATENT | {"head_dim": 64},
    "deepseek_v3": LATENT | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": LATENT,
}  # fmt: skip
LEARNED = {
    "scale-below": ("scale", {"offsets.log_scale": -0.07}),
    "scale-above": ("scale", {"offsets.log_scale": 0.2}),
    "ramp": ("ramp", {"offsets.log_beta_fast": 0.31, "log_temperature": -0.3}),
    "per_pair": ("per_pair", {"log_temperature": -0.3}),
}
FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3_text", "cohere", "phi3")
"""With every parameterisation they have."""
ONCE = {
    **dict.fromkeys(
        ("arcee", "exaone4", "falcon", "gemma", "gemma2", "granite", "granitemoe", "ministral",
         "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "persimmon", "phi", "qwen2", "qwen2_moe",
         "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "cwm", "doge", "dots1", "falcon_h1",
         "flex_olmo", "gemma3n_text", "glm4_moe", "granitemoehybrid", "granitemoeshared", "hy_v3",
         "hyperclovax", "jais2", "ministral3", "olmoe", "solar_open", "vaultgemma"),
        "per_pair",
    ),
    **dict.fromkeys(
        ("bitnet", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "glm4_moe_lite",
         "gpt_oss", "helium"),
        "scale-above",
    ),
    "gemma4_text": "pair",
}  # fmt: skip
"""With one: lists of factors where vLLM takes them."""
IN_BFLOAT16 = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
"""vLLM's kernels for linear attention on a CPU compute in bfloat16 only."""
RUNGS = [
    *(("llama", rung) for rung in ("layer", "head", "pair", "pair_phase")),
    ("qwen2", "pair_phase"),  # with biases
    ("qwen3", "pair"),  # in the norm shared by the heads
    ("olmo3", "pair"),  # in the norm across heads
    ("gpt_neox", "pair_phase"),  # a quarter of each head, q, k and v of a head in one tensor
    ("phi3", "pair_phase"),  # q, k and v in one tensor
    ("gemma3_text", "pair"),  # 1 + weight
    ("cohere", "pair_phase"),  # interleaved pairs
    ("falcon", "pair_phase"),  # q, k and v of a group of heads in one tensor
    ("deepseek_v2", "pair_phase"),  # the rotary part of each head alone, interleaved
]
"""Temperatures by layer, head and pair, in the weights."""
BIASED = ("llama", "qwen2", "granite", "glm4", "stablelm", "starcoder2", "gpt_neox", "mistral")
BIASES = [(family, "qk_bias") for family in BIASED]
"""Learned biases of queries and keys, as biases of the projections; Mistral is written as a Llama."""
CASES = [*RUNGS, *BIASES, *ONCE.items(), ("ministral3", "scale-above")] + [
    (family, learned)
    for family in FAMILIES
    for learned in LEARNED
    if (family, learned) != ("cohere", "per_pair")  # refused: see test_export
    and (learned != "scale-above" or family in ("llama", "qwen3"))
]


DEMO_LEARNED = ("scale-below", "ramp", "per_pair", "pair", "pair_phase", "fixed-pair_phase")


def exported(folder: Path, family: str, learned: str, base: Path | None = None, window: int = WINDOW) -> Path:
    """A checkpoint of one parameterisation, or of one rung: on factors, on a scale, or (fixed-) on YaRN as it is."""
    rung = learned.removeprefix("fixed-") if learned not in LEARNED else "none"
    frequencies, offsets = LEARNED.get(learned, LEARNED["scale-above" if family in YARN_ALONE else "per_pair"])
    if rung != learned and rung != "none":
        frequencies, offsets = "fixed", {"log_temperature": 0.0, "offsets.log_scale": 0.0}
    if family in THETA_ONLY:
        frequencies, offsets = "fixed", {"log_temperature": 0.0}
    biases = learned == "qk_bias"
    if biases:
        rung, frequencies = "none", LEARNED["scale-above" if family in YARN_ALONE else "per_pair"][0]
        offsets = {"biases.query_size": 2.0, "biases.key_size": 2.0}
    folder.mkdir(parents=True, exist_ok=True)
    base = base or save_tiny(folder / "base", family, **{**SIZE, **EXTRA.get(family, {})})
    settings = (
        "export.tolerance=1e-3",
        f"rope.query_gains={rung}",
        f"rope.init={'ntk' if family in THETA_ONLY else 'yarn'}",
        f"rope.qk_bias={str(biases).lower()}",
        f"export.as_llama={str(biases and family == 'mistral').lower()}",
    )  # random weights; the comparison with vLLM is the test here
    return export(finished_run(folder, frequencies, family, window, base, settings, **offsets))


def job(checkpoint: Path, native: int = NATIVE, **options: object) -> Job:
    config = config_json(str(checkpoint))
    return Job(
        str(checkpoint), random_prompts(config["vocab_size"], native, config["max_position_embeddings"]), options
    )


def demo_job(checkpoint: Path, **options: object) -> Job:
    """Natural text: on random tokens this model's float32 is itself 1e-4 away from its float64."""
    lengths = [len(prompt) for prompt in job(checkpoint, 256).prompts]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with gzip.open(HELDOUT, "rt", encoding="utf-8") as file:
        texts = [tokenizer(json.loads(line)["text"])["input_ids"] for line in file]
    prompts = [texts[i % len(texts)][:length] for i, length in enumerate(lengths)]
    assert [len(prompt) for prompt in prompts] == lengths
    return Job(str(checkpoint), prompts, options)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("exports")
    made = {(family, learned): exported(folder / f"{family}-{learned}", family, learned) for family, learned in CASES}
    for learned in DEMO_LEARNED:
        made["demo", learned] = exported(folder / f"demo-{learned}", "llama", learned, DEMO, window=2048)
    return made


@pytest.fixture(scope="module")
def served(checkpoints, vllm_python):
    jobs = {case: demo_job(path) if case[0] == "demo" else job(path) for case, path in checkpoints.items()}
    long = demo_job(checkpoints["demo", "ramp"], kv_cache_dtype="fp8")
    jobs["fp8", "ramp"] = long
    jobs["fp8", "base"] = Job(str(DEMO), [prompt[:255] for prompt in long.prompts], long.options)
    said = vllm_logprobs(list(jobs.values()), vllm_python)
    return {case: (asked, answer) for (case, asked), answer in zip(jobs.items(), said, strict=True)}


@torch.no_grad()
def rounding(asked: Job) -> float:
    """What float32 costs transformers: the largest difference of a log-probability from float64."""
    model = AutoModelForCausalLM.from_pretrained(
        asked.checkpoint, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    worst = 0.0
    for prompt, ours in zip(asked.prompts, transformers_logprobs(asked.checkpoint, asked.prompts), strict=True):
        ids = torch.tensor(prompt)
        exact = model(ids[None], use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        worst = max(worst, (ours - exact).abs().max().item())
    return worst


EVERY = [*CASES, *(("demo", learned) for learned in DEMO_LEARNED)]


@pytest.mark.parametrize("case", EVERY, ids="-".join)
def test_vllm_computes_what_transformers_does(served, checkpoints, case):
    asked, said = served[case]
    found = agreement(asked, said)
    window = config_json(str(checkpoints[case]))["max_position_embeddings"]
    assert found.max_model_len == window
    assert max(found.differences) == window - 1
    assert len(found.differences) >= 4
    # Where the CPU's kernels make float32 itself coarser than that, both engines are as far from float64.
    assert found.worst <= TOLERANCE or found.worst <= 2 * rounding(asked) <= 4e-4, found


@torch.no_grad()
def in_bfloat16(asked: Job, compute: torch.dtype, **config: object) -> torch.Tensor:
    """Log-probabilities by transformers of all prompts, with weights rounded to bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(asked.checkpoint, dtype=torch.bfloat16, **config).to(compute).eval()
    found = []
    for prompt in asked.prompts:
        ids = torch.tensor(prompt)
        logits = model(ids[None], use_cache=False).logits[0, :-1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    return torch.cat(found)


@pytest.fixture(scope="module")
def served_in_bfloat16(vllm_python, tmp_path_factory):
    """With an empty torchvision, since vLLM has Qwen3.5 with experts in the module of the multimodal model."""
    folder = tmp_path_factory.mktemp("bfloat16")
    jobs = [job(exported(folder / family, family, "per_pair"), dtype="bfloat16") for family in IN_BFLOAT16]
    said = vllm_logprobs(jobs, vllm_python, str(Path(__file__).with_name("without_torchvision")))
    return dict(zip(IN_BFLOAT16, zip(jobs, said, strict=True), strict=True))


@pytest.mark.parametrize("family", IN_BFLOAT16)
def test_linear_attention_is_as_far_from_float32_as_transformers_in_bfloat16(served_in_bfloat16, family):
    """In the mean square over all tokens, of which single ones move by up to 1; a wrong RoPE moves them further."""
    asked, said = served_in_bfloat16[family]
    exact = in_bfloat16(asked, torch.float32)

    def apart(other: torch.Tensor) -> float:
        return (other - exact).square().mean().sqrt().item()

    rounding = apart(in_bfloat16(asked, torch.bfloat16))
    base = config_json(str(Path(asked.checkpoint).parents[1] / "base"))
    assert apart(in_bfloat16(asked, torch.float32, rope_parameters=base["rope_parameters"])) > 2 * rounding
    assert "error" not in said, said
    assert apart(torch.tensor([each for prompt in said["logprobs"] for each in prompt])) < 1.5 * rounding


@pytest.fixture(scope="module")
def old_served(checkpoints, vllm_python, old_vllm_path, tmp_path_factory):
    """vLLM 0.28 on the Llama exports, and on one without the key that only old readers know."""
    jobs = {learned: job(checkpoints["llama", learned]) for learned in LEARNED}
    lossy = tmp_path_factory.mktemp("lossy") / "ramp"
    shutil.copytree(checkpoints["llama", "ramp"], lossy)
    config = json.loads((lossy / "config.json").read_text())
    for section in (config["rope_parameters"], config["rope_scaling"]):
        del section["attn_factor"]
    (lossy / "config.json").write_text(json.dumps(config))
    jobs["lossy"] = job(lossy)
    said = vllm_logprobs(list(jobs.values()), vllm_python, old_vllm_path)
    return {name: (asked, answer) for (name, asked), answer in zip(jobs.items(), said, strict=True)}


@pytest.mark.parametrize("learned", LEARNED)
def test_vllm_0_28_computes_it_too(old_served, learned):
    found = agreement(*old_served[learned])
    assert found.worst <= TOLERANCE, found


def test_without_attn_factor_vllm_0_28_serves_something_else(old_served):
    """The comparison can fail: 0.28 reads no attention_factor, and transformers no attn_factor."""
    assert agreement(*old_served["lossy"]).worst > 1e-2


def test_an_fp8_cache_serves_the_export(served):
    """Keys are quantised after rotation, so nothing about the export changes; means, as single tokens move more."""

    def cost(name: str) -> list[float]:
        asked, said = served["fp8", name]
        if "requires x86 with AVX-512" in said.get("error", ""):
            pytest.skip(said["error"])
        exact = transformers_logprobs(asked.checkpoint, asked.prompts)
        return [(a - torch.tensor(b)).mean().item() for a, b in zip(exact, said["logprobs"], strict=True)]

    base, tuned = cost("base"), cost("ramp")
    assert max(map(abs, base)) > 1e-3, "or the cache was not quantised"
    assert max(map(abs, tuned)) < 0.15, (tuned, base)  # a wrong rope costs 1 and more


def test_verify_asks_the_engine(checkpoints, vllm_python):
    found = compare_with_transformers(str(checkpoints["llama", "ramp"]), vllm_python)
    assert found.worst <= TOLERANCE
    assert len(found.differences) == 5


def test_the_users_own_way(checkpoints, vllm_python, tmp_path, capsys):
    """`vllm serve` on the demo, asked by examples/ask.py (the openai client) a prompt longer than the native window."""
    path = checkpoints["demo", "scale-below"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = tokenizer.decode(demo_job(path).prompts[-1][:700])
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 2 * 256
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    vllm = Path(vllm_python).with_name("vllm")
    command = [vllm_python, str(vllm), "serve", str(path), "--host", "127.0.0.1", "--port", str(port),
               "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]  # fmt: skip
    environment = os.environ | QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "server.log")
        asked = [vllm_python, str(ASK), str(path), "-", "--url", f"http://127.0.0.1:{port}/v1", "--max-tokens", "8"]
        answer = subprocess.run(asked, input=prompt, text=True, capture_output=True, check=True)
        assert f"read {ids.shape[1]} tokens, wrote 8" in answer.stderr
        assert answer.stdout == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
        # The same needles, through the server and through transformers.
        grid = ["--lengths", "240,480,960", "--depths", "0.5,1", "--per-cell", "2", "--wording", "demo"]
        asked = ["retrieve", str(path), str(HELDOUT), *grid, "--dtype", "float32", "--json"]
        found = []
        for engine in (["--engine", "vllm", "--url", f"http://127.0.0.1:{port}"], []):
            assert main([*asked, *engine]) == 0
            found.append(json.loads(capsys.readouterr().out)["cells"])
        assert found[0] == found[1]
        assert sum(cell["right"] for cell in found[0]) > 0
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])
