"""Tiny random models of every family, tiny documents, recipes and finished runs for the tests."""

import copy
import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from yarn_tune.data.positions import Placed
from yarn_tune.data.rows import RowRequest, RowSet, build_rows
from yarn_tune.files import save_tensors
from yarn_tune.models.base import BaseModel
from yarn_tune.models.families import FAMILIES
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Base, Recipe
from yarn_tune.runs.folder import Run, claim_folder
from yarn_tune.runs.metrics import metrics_line
from yarn_tune.serving.selection import Target, make_representable
from yarn_tune.tunable.rotary import at_start

NATIVE = 64
VOCABULARY = 128

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": NATIVE,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 32, "num_key_value_heads": 4, "n_shared_experts": 1,
}  # fmt: skip
INDEXED = {**LATENT, "q_lora_rank": 24, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 512}
GROWING = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": NATIVE // 2, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
"""Queries grow with the position."""
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
ROUTED = {**EXPERTS, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
CONVOLUTION = {"layer_types": ["conv", "full_attention", "full_attention"]}
FAMILY_SIZES: dict[str, dict[str, object]] = {
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "arcee": {},
    "aria_text": {"moe_num_experts": 2, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**LATENT, "q_lora_rank": 24},
    "axk2": INDEXED,
    "bailing_hybrid": {**LATENT, **HYBRID, **EXPERTS, "head_dim": 16},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 2]},
    "bitnet": {},
    "cohere": {},
    "cwm": {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **SLIDING},
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "q_lora_rank": 24},
    "deepseek_v32": INDEXED,
    "diffllama": {},
    "doge": {},
    "dots1": {**ROUTED, "first_k_dense_replace": 1},
    "ernie4_5": {"head_dim": 16},
    "ernie4_5_moe": {
        "moe_num_experts": 2, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon_h1": {**MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 64, "head_dim": 16},
    "flex_olmo": EXPERTS,
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "gemma3n_text": {
        "head_dim": 16, **SLIDING, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCABULARY, "activation_sparsity_pattern": [0.0] * 3,
    },
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "glm4_moe": {**ROUTED, "head_dim": 16, "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": {**LATENT, "q_lora_rank": 24},
    "glm_moe_dsa": INDEXED,
    "gpt_neox": {"rotary_pct": 0.25, "hidden_size": 128},
    "gpt_neox_japanese": {"hidden_size": 128},
    "gpt_oss": {
        "head_dim": 16, **EXPERTS, **SLIDING,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 4.0, "beta_slow": 0.5,
            "truncate": False, "original_max_position_embeddings": NATIVE // 2,
        },
    },
    "granite": {"attention_multiplier": 0.25},
    "granitemoe": {**EXPERTS, "attention_multiplier": 0.25},
    "granitemoehybrid": {
        **EXPERTS, **MAMBA, **HYBRID, "attention_multiplier": 0.25, "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {**EXPERTS, "attention_multiplier": 0.25, "shared_intermediate_size": 32},
    "helium": {"head_dim": 16},
    "hy_v3": {**EXPERTS, "head_dim": 16},
    "hy_v4": INDEXED,
    "hyperclovax": {},
    "internlm3": {"head_dim": 16},
    "iquestcoder": {"head_dim": 16},
    "jais2": {},
    "jetmoe": {**EXPERTS, "kv_channels": 16},
    "lfm2": CONVOLUTION,
    "lfm2_moe": {**EXPERTS, **CONVOLUTION, "num_dense_layers": 1},
    "llama": {},
    "longcat_flash": {
        **LATENT, "q_lora_rank": 24, "num_layers": 2, "num_hidden_layers": 4, "head_dim": 16, "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32, "zero_expert_num": 1, "moe_topk": 2,
    },
    "minimax": {**EXPERTS, **HYBRID, "head_dim": 16, "block_size": 64},
    "minimax_m2": {**EXPERTS, "head_dim": 16, "rotary_dim": 8},
    "ministral": {"head_dim": 16, **SLIDING},
    "ministral3": {"head_dim": 16, "rope_parameters": GROWING},
    "mistral": {"sliding_window": None},
    "mixtral": EXPERTS,
    "nemotron": {"partial_rotary_factor": 0.5},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmo_hybrid": {**HYBRID, **DELTA},
    "olmoe": EXPERTS,
    "persimmon": {"partial_rotary_factor": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": NATIVE},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 32},
    "qwen3_5_moe_text": {
        **EXPERTS, **HYBRID, **DELTA, "head_dim": 32, "partial_rotary_factor": 0.25,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_5_text": {**HYBRID, **DELTA, "head_dim": 32, "partial_rotary_factor": 0.25},
    "qwen3_moe": {**EXPERTS, "head_dim": 32},
    "qwen3_next": {
        **EXPERTS, "head_dim": 32, "partial_rotary_factor": 0.25, "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
    },
    "seed_oss": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 4},
    "solar_open": {**ROUTED, "head_dim": 16},
    "stablelm": {"partial_rotary_factor": 0.25, "hidden_size": 128},
    "starcoder2": {"sliding_window": None},
    "vaultgemma": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "youtu": {**LATENT, "tie_word_embeddings": False},
}  # fmt: skip
"""What a small config of each supported family needs beyond `SMALL`."""


THETA_ONLY: dict[str, dict[str, object]] = {
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 32, "sliding_window": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gemma4_unified_text": {
        "head_dim": 16, "global_head_dim": 32, "sliding_window": 32, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "lfm3": {
        "head_dim": 32, "sliding_window": 32, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "conv", "full_attention"],
    },
}  # fmt: skip
"""The same for families whose configs carry only another theta."""
YARN_ALONE = sorted({each for each in FAMILY_SIZES if FAMILIES[each].interleaved} | {"gpt_oss"})
"""Families for which vLLM takes no lists of factors."""


def tiny_config(family: str, **extra: object):
    # A copy: config objects keep the dicts they are given, and tests change these.
    settings = {**SMALL, **(FAMILY_SIZES | THETA_ONLY).get(family, {}), **extra}
    return AutoConfig.for_model(family, **copy.deepcopy(settings))


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **extra: object):
    """A small random model whose attention is sharp enough for positions to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **extra), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif "bias" in name:
                parameter.normal_(0, 0.02)
    model.config.use_cache = False
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word `w0` .. `w126`; id 0 ends a text."""
    vocabulary = {"<end>": 0, **{f"w{i}": i + 1 for i in range(VOCABULARY - 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", model_max_length=NATIVE)


def save_tiny(folder: Path, family: str = "llama", **extra: object) -> Path:
    """A checkpoint folder with model and tokenizer."""
    tiny_model(family, **extra).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def base_with(tokenizer: PreTrainedTokenizerBase, folder: Path) -> BaseModel:
    """A base without weights: the config of a tiny model and this tokenizer, saved into `folder`."""
    tiny_config("llama", vocab_size=max(VOCABULARY, len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BaseModel(Base(model=str(folder), dtype="float32"))


def rows_of(recipe: Recipe, base: BaseModel) -> RowSet:
    """The rows that a run of the recipe reads, without planted questions."""
    return build_rows(recipe.data, base, RowRequest(recipe.row_tokens(), recipe.rows(), recipe.train.seed))


def as_lists(rows: list[Placed]) -> list[tuple[list[int], list[int], list[int], int]]:
    """Rows in a form that `==` compares."""
    return [(r.input_ids.tolist(), r.position_ids.tolist(), r.labels.tolist(), r.answers) for r in rows]


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(VOCABULARY - 1, (count,), generator=generator).tolist())


def write_documents(path: Path, lengths: list[int], seed: int = 0, ids: bool = False) -> Path:
    """One document a line, as words or (for families that bring a tokenizer class of their own) as token ids."""
    texts = [words(n, seed + i) for i, n in enumerate(lengths)]
    records = [{"input_ids": tiny_tokenizer()(t)["input_ids"]} if ids else {"text": t} for t in texts]
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe_tree(base: Path, folder: Path, ids: bool = False, **train: object) -> dict[str, object]:
    """A small valid recipe over `base`, with documents written into `folder`."""
    return {
        "name": "small",
        "base": {"model": str(base), "dtype": "float32"},
        "rope": {"window": 256},
        "data": {
            "train": [str(write_documents(folder / "train.jsonl", [700, 300, 90, 40], ids=ids))],
            "heldout": [str(write_documents(folder / "heldout.jsonl", [600, 300], seed=50, ids=ids))],
        },
        "train": {"steps": 4, "batch_size": 2, "checkpoint_every": 2, **train},
        "eval": {"documents": 2},
    }


def finished_run(
    folder: Path,
    frequencies: str = "per_pair",
    family: str = "llama",
    window: int = 256,
    base: Path | None = None,
    settings: tuple[str, ...] = (),
    **offsets: float,
) -> Run:
    """A run that has learned something definite, without the training."""
    folder.mkdir(parents=True, exist_ok=True)
    base = base or save_tiny(folder / "base", family)
    overrides = [f"rope.frequencies={frequencies}", f"rope.window={window}", *settings]
    recipe = parse_recipe(recipe_tree(base, folder), overrides)
    run = Run(recipe, folder / "run")
    claim_folder(run)
    rotary = at_start(run.base, recipe.rope)
    generator = torch.Generator().manual_seed(0)
    numbers = {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in rotary.numbers().items()}
    numbers |= {name: torch.full_like(numbers[name], value) for name, value in offsets.items()}
    rotary.load_numbers(numbers)
    if frequencies != "per_pair":
        settled = make_representable(rotary.learned(), Target.of_model(run.base, recipe.export, recipe.rope))
        if settled.scale is not None:
            rotary.set_scale(settled.scale)
    run.numbers_path.write_bytes(save_tensors(rotary.numbers()))
    return run


def write_metrics(folder: Path, steps: int, tokens: int = 2048, seconds: float = 1.5) -> None:
    """The record of a run of so many steps."""
    values = {"loss": 1.0, "gradient_norm": 1.0, "tokens": tokens, "seconds": seconds, "learned": {"temperature": 1.0}}
    folder.joinpath("metrics.jsonl").write_bytes(
        b"".join(metrics_line({"step": n + 1, **values}) for n in range(steps))
    )


ENGINES = Path(os.environ.get("YARN_TUNE_ENGINES", Path(__file__).parents[1] / ".engines")).resolve()
