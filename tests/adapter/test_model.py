"""The learned numbers as a PEFT adapter: the same logits, the same file whoever loads it, the same export."""

import copy
import enum
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save, save_file
from tiny import NATIVE, VOCABULARY, finished_run, recipe_tree, save_tiny, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from yarn_tune.adapter.config import extended
from yarn_tune.adapter.files import read_sections, write_adapter
from yarn_tune.adapter.layer import YarnTuneLayer, place_of
from yarn_tune.adapter.model import YarnTuneConfig
from yarn_tune.cli.main import main
from yarn_tune.errors import UserError
from yarn_tune.export.checkpoint import export
from yarn_tune.export.hub import prepare_upload
from yarn_tune.files import read_tensors
from yarn_tune.models.rope_config import rope_facts
from yarn_tune.recipe.loading import parse_recipe
from yarn_tune.recipe.schema import Rope
from yarn_tune.runs.folder import AdapterRun, Run
from yarn_tune.runs.learned import learned_of
from yarn_tune.training.loop import train
from yarn_tune.tunable.attachment import attach
from yarn_tune.tunable.kinds import adjustments_for
from yarn_tune.tunable.parameters import Start
from yarn_tune.tunable.rotary import TunableRotary, at_start

IDS = torch.randint(1, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0))
KINDS = [("fixed", "pair_phase"), ("scale", "none"), ("ramp", "layer"), ("per_pair", "none"), ("per_pair", "pair")]


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapted(model, window=4 * NATIVE, seed=0, **values):
    """An adapter that has learned something definite."""
    made = get_peft_model(model, YarnTuneConfig(window=window, **values))
    scatter(made, seed)
    return made


def scatter(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)


def adapter_of(run):
    """The adapter that training would have left in a finished run."""
    rotary = at_start(run.base, run.recipe.rope)
    rotary.load_numbers(read_tensors(run.numbers_path))
    folder = run.folder / "adapter"
    write_adapter(folder, run.recipe, rotary, place_of(load(run.recipe.base.model)))
    return folder


@pytest.mark.parametrize(("frequencies", "query_gains"), KINDS)
def test_it_computes_what_attach_does(frequencies, query_gains):
    """Logits and gradients, with and without checkpointing, bit for bit."""
    model = tiny_model()
    made = adapted(model, frequencies=frequencies, query_gains=query_gains)
    made.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    made.train()
    found = made(IDS, use_cache=False).logits
    found.square().mean().backward()
    own = {n.rpartition(".")[2]: p for n, p in made.named_parameters() if p.requires_grad}

    plain = tiny_model()
    start = Start.of(rope_facts(plain.config), Rope(window=4 * NATIVE))
    rotary = attach(
        plain,
        start,
        frequencies,
        adjustments_for(plain.config.to_dict(), Rope(window=4 * NATIVE, query_gains=query_gains)),
    )
    trainable = {n.rpartition(".")[2]: p for n, p in rotary.named_parameters() if p.requires_grad}
    assert set(own) == set(trainable)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(own[name])
    expected = plain(IDS, use_cache=False).logits
    expected.square().mean().backward()
    assert torch.equal(found, expected)
    assert all(torch.equal(own[name].grad, p.grad) for name, p in trainable.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frequencies", "query_gains"), KINDS)
def test_every_way_of_loading_gives_the_same_model(tmp_path, frequencies, query_gains, dtype):
    save_tiny(tmp_path / "base")
    made = adapted(load(tmp_path / "base", dtype), frequencies=frequencies, query_gains=query_gains)
    expected, folder = logits(made), tmp_path / "adapter"
    made.save_pretrained(folder)
    injected = load(tmp_path / "base", dtype)
    injected.load_adapter(folder)
    for model in (
        PeftModel.from_pretrained(load(tmp_path / "base", dtype), folder),
        PeftModel.from_pretrained(load(tmp_path / "base", dtype), folder, low_cpu_mem_usage=True),
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        injected,
    ):
        assert torch.equal(logits(model), expected)
        assert {p.dtype for n, p in model.named_parameters() if "yarn_tune_" in n} == {torch.float32}
    if query_gains == "none":
        assert (folder / "adapter_model.safetensors").stat().st_size < 1024
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["native"], config["factor"], config["window"]) == (NATIVE, 4.0, 4 * NATIVE)
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("query_gains", "limit"), [("none", 1024), ("head", 8192), ("pair", 2**19), ("pair_phase", 2**20)]
)
def test_an_adapter_of_a_7b_stays_small(query_gains, limit):
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32}
    config = tiny_config("llama", max_position_embeddings=4096, intermediate_size=11008, **sizes)
    gains = adjustments_for(config.to_dict(), Rope(window=32768, query_gains=query_gains))
    rotary = TunableRotary(torch.nn.Identity(), Start.of(rope_facts(config), Rope(window=32768)), "per_pair", gains)
    assert len(save(rotary.numbers())) < limit


def test_the_revision_of_the_base_is_kept(tmp_path):
    made = get_peft_model(tiny_model(), YarnTuneConfig(window=256), revision="abc")
    made.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).revision == "abc"
    folder = adapter_of(finished_run(tmp_path, settings=("base.revision=abc",)))
    assert PeftConfig.from_pretrained(folder).revision == "abc"
    assert read_sections(folder).base.revision == "abc"


def test_disabled_and_unloaded_it_is_the_base():
    model = tiny_model()
    plain = logits(model)
    made = adapted(model, query_gains="pair_phase")
    tuned = logits(made)
    with made.disable_adapter():
        assert torch.equal(logits(made), plain)
    assert torch.equal(logits(made), tuned)
    assert not torch.equal(tuned, plain)
    assert torch.equal(logits(made.unload()), plain)
    assert set(model.state_dict()) == set(tiny_model().state_dict())


def test_adapters_for_several_windows_take_turns():
    made = adapted(tiny_model(), query_gains="head")
    first = logits(made)
    made.add_adapter("long", YarnTuneConfig(window=8 * NATIVE, query_gains="pair"))
    assert torch.equal(logits(made), first)
    made.set_adapter("long")
    scatter(made, seed=1)
    second = logits(made)
    expected = adapted(tiny_model(), window=8 * NATIVE, query_gains="pair", seed=1)
    assert torch.equal(second, logits(expected))
    made.set_adapter("default")
    assert torch.equal(logits(made), first)
    with pytest.raises(UserError, match="default, long each define a rotary table; only one can be active"):
        made.base_model.set_adapter(["default", "long"])
    made.delete_adapter("default")
    made.set_adapter("long")
    assert torch.equal(logits(made), second)


def test_numbers_stay_float32_and_the_table_with_them():
    made = adapted(tiny_model(), query_gains="pair")
    layer = next(m for m in made.modules() if isinstance(m, YarnTuneLayer))
    table = layer.rotary("default").table()[0]
    made.to(torch.bfloat16)
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(layer.rotary("default").table()[0], table)
    assert made.dtype == torch.bfloat16


def test_what_is_not_learned_stays_frozen():
    made = adapted(tiny_model(), frequencies="fixed", query_gains="head")
    assert {n.rpartition(".")[2] for n, p in made.named_parameters() if p.requires_grad} == {"log_gain"}
    with made.disable_adapter():
        pass
    made.base_model.set_requires_grad("default")
    assert {n.rpartition(".")[2] for n, p in made.named_parameters() if p.requires_grad} == {"log_gain"}


MERGED = [
    ("llama", "per_pair", "pair_phase"),
    ("qwen3", "per_pair", "pair"),
    ("gemma3_text", "scale", "layer"),
    ("phi3", "per_pair", "none"),
    ("gpt_neox", "ramp", "head"),
    ("cohere", "scale", "pair_phase"),
    ("smollm3", "fixed", "head"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "frequencies", "query_gains"), MERGED)
def test_merged_it_is_the_export(tmp_path, family, frequencies, query_gains, dtype):
    """Config, weights and logits; the weights bit for bit, also where bfloat16 rounds what is folded."""
    base = save_tiny(tmp_path / "base", family)
    load(base, dtype).save_pretrained(base)
    run = finished_run(tmp_path, frequencies, family, base=base, settings=(f"rope.query_gains={query_gains}",))
    made = PeftModel.from_pretrained(load(base, dtype), adapter_of(run))
    merged = made.merge_and_unload()
    exported = load(export(run), dtype)
    assert torch.equal(logits(merged), logits(exported))
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", dtype)
    assert torch.equal(logits(again), logits(exported))
    one, other = (model.state_dict() for model in (again, exported))
    assert set(one) == set(other)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    one, other = (AutoConfig.from_pretrained(at).to_dict() for at in (tmp_path / "merged", run.folder / "export"))
    for bookkeeping in ("_name_or_path", "transformers_version", "use_cache"):
        one.pop(bookkeeping, None), other.pop(bookkeeping, None)
    assert one == other


def test_merging_in_place_is_refused():
    with pytest.raises(NotImplementedError, match="merged by merge_and_unload"):
        adapted(tiny_model()).merge_adapter()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with LoRA beside the numbers, the base's folder, and logits of its export."""
    folder = tmp_path_factory.mktemp("trained")
    base = save_tiny(folder / "base")
    settings = ["lora.rank=4", "rope.query_gains=pair_phase", "train.learning_rate={lora: 0.02}"]
    run = Run(parse_recipe(recipe_tree(base, folder, steps=3), settings), folder / "run")
    train(run)
    return run, base, logits(load(export(run)))


@pytest.mark.parametrize("order", [("rope", "lora"), ("lora", "rope")])
def test_lora_is_an_adapter_beside_it(trained, order):
    """In whatever order they are loaded: gains also multiply what LoRA adds to the queries."""
    run, base, expected = trained
    folders = {"rope": run.folder / "adapter", "lora": run.folder / "adapter" / "lora"}
    model = load(base)
    for name in order:
        model.load_adapter(folders[name], adapter_name=name)
        logits(model)  # used once before the other comes and wraps what it is hooked to
    model.set_adapter(["rope", "lora"])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    learning = {
        name.split("yarn_tune_")[0].split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad
    }
    assert len(learning) == 1 + 3 * 4
    model.disable_adapters()
    assert torch.equal(logits(model), logits(load(base)))


def test_lora_and_numbers_are_merged_one_after_the_other(trained):
    run, base, expected = trained
    folder = run.folder / "adapter"
    lora = PeftModel.from_pretrained(load(base), folder / "lora").merge_and_unload()
    assert torch.equal(logits(PeftModel.from_pretrained(lora, folder).merge_and_unload()), expected)
    beside = PeftModel.from_pretrained(load(base), folder / "lora", adapter_name="lora").get_base_model()
    both = PeftModel.from_pretrained(beside, folder, adapter_name="rope").merge_and_unload()
    assert torch.equal(logits(both), expected)
    assert set(both.state_dict()) == set(load(base).state_dict())


def test_the_adapter_is_exported_as_the_run_is(trained, tmp_path, capsys):
    run, _, expected = trained
    folder = shutil.copytree(run.folder / "adapter", tmp_path / "adapter")
    assert main(["export", str(folder), "--json"]) == 0
    assert torch.equal(logits(load(folder / "export")), expected)
    found = learned_of(AdapterRun(read_sections(folder), folder))
    assert found.as_json() == learned_of(run).as_json()
    with pytest.raises(UserError, match="learned with other settings"):
        learned_of(AdapterRun(read_sections(folder, ["rope.window=512"]), folder))
    made = prepare_upload(folder, "someone/adapter", "someone/base")
    assert sorted(made.files) == sorted(
        ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        + [f"lora/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")] * (folder / "lora").is_dir()
    )
    capsys.readouterr()


def spoil(folder, change=None, **config):
    """The adapter with other numbers or config values."""
    numbers = load_file(folder / "adapter_model.safetensors")
    save_file(change(numbers) if change else numbers, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def only(numbers, ending, value):
    return {name: value(t) if name.endswith(ending) else t for name, t in numbers.items()}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda n: only(n, "log_factor", lambda t: t * float("nan")), {}, "saved numbers contain NaN or Inf"),
        (
            lambda n: only(n, "log_factor", lambda t: t[:3]),
            {},
            r"log_factor': \(3,\).* do not fit rope.frequencies='per_pair'",
        ),
        (
            lambda n: {k: t for k, t in n.items() if not k.endswith("log_gain")},
            {},
            "do not fit rope.frequencies='per_pair'",
        ),
        (None, {"query_gains": "none"}, "saved numbers have log_gain, which|do not fit rope.frequencies='per_pair'"),
        (None, {"rope_theta": 5e5}, "learned on a base with rope_theta 500000.0, this model has 10000.0; load"),
        (None, {"base_model_type": "qwen2"}, "learned on a base with base_model_type qwen2, this model has llama"),
        (None, {"window": 32}, "rope.window: 32 is smaller than|rope.native: the native window must not exceed"),
        (
            None,
            {"frequencies": "magic"},
            "rope.frequencies: must be one of fixed, scale, ramp, per_pair; found 'magic'",
        ),
    ],
)
def test_foreign_and_damaged_adapters_are_refused(tmp_path, capsys, change, config, message):
    folder = adapter_of(finished_run(tmp_path, settings=("rope.query_gains=head",)))
    spoil(folder, change, **config)
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(load(tmp_path / "base"), folder)
    assert main(["export", str(folder)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_weights_of_another_adapter_are_named_by_peft(tmp_path):
    folder = adapter_of(finished_run(tmp_path))
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys.*log_factor"):
        PeftModel.from_pretrained(load(tmp_path / "base"), folder)
    assert main(["export", str(folder)]) == 2


def test_transformers_loads_no_nan_either(tmp_path):
    """PEFT's loader calls no method of a module, so the numbers are checked at their first use."""
    folder = adapter_of(finished_run(tmp_path))
    spoil(folder, lambda n: only(n, "log_factor", lambda t: t * float("nan")))
    model = load(tmp_path / "base")
    model.load_adapter(folder)
    with pytest.raises(UserError, match="saved numbers contain NaN or Inf"):
        logits(model)


def test_other_files_are_refused_by_name(tmp_path, capsys):
    folder = adapter_of(finished_run(tmp_path))
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-9])
    assert main(["export", str(folder)]) == 2
    assert "adapter_model.safetensors cannot be read" in capsys.readouterr().err
    (folder / "adapter_model.safetensors").write_bytes(whole)
    spoil(folder, peft_type="LORA")
    assert main(["export", str(folder)]) == 2
    assert "peft_type 'LORA' is not yarn_tune's" in capsys.readouterr().err
    (folder / "adapter_config.json").write_text("{")
    assert main(["export", str(folder)]) == 2
    assert "adapter_config.json cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match="YarnTuneConfig: 1 problem\n  - rope.window: must be at least 2"):
        YarnTuneConfig()


def test_lora_with_another_scale_is_not_merged_by_the_export(tmp_path):
    folder = adapter_of(finished_run(tmp_path))
    LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], use_dora=True).save_pretrained(folder / "lora")
    with pytest.raises(UserError, match="plain LoRA only, and here use_dora True is not False, lora_alpha 8 is not 4"):
        read_sections(folder)


def test_the_snippet_of_the_documents_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "adapter.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(tmp_path)
    base = save_tiny(tmp_path / "data" / "tiny-base")
    for window, name in ((256, "tiny-demo"), (512, "tiny-demo-4k")):
        made = adapter_of(finished_run(tmp_path / name, window=window, base=base))
        shutil.copytree(made, tmp_path / "runs" / name / "adapter")
    names = {}
    exec(snippet, names)
    assert 512 <= load(tmp_path / "merged").config.max_position_embeddings < 1024
    assert {n.rpartition(".")[2] for n, p in names["model"].named_parameters() if p.requires_grad} == {
        "log_factor", "log_temperature", "log_gain", "phase"}  # fmt: skip


def test_the_type_is_a_member_like_any_other():
    member = PeftType("YARN_TUNE")
    assert member is PeftType.YARN_TUNE is PeftType["YARN_TUNE"]
    assert member in list(PeftType)
    assert (member.name, member.value, member) == ("YARN_TUNE", "YARN_TUNE", "YARN_TUNE")
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert extended(PeftType, "YARN_TUNE") is member
    assert extended(PeftType, "LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="'YARN' is not a valid PeftType"):
        PeftType("YARN")


def test_an_enum_that_takes_no_member_is_an_import_error():
    class Numbers(enum.IntEnum):
        ONE = 1

    with pytest.raises(ImportError, match="cannot add YARN_TUNE to Numbers"):
        extended(Numbers, "YARN_TUNE")
    assert list(Numbers) == [Numbers.ONE]


OLD_KINDS = [
    (("fixed", "layer"), ("yarn", "layer")),
    (("scale", "none"), ("scale", "global")),
    (("ramp", "head"), ("ramp", "head")),
    (("per_pair", "pair"), ("frequency", "spectral")),
    (("per_pair", "pair_phase"), ("frequency", "phase")),
]


@pytest.mark.parametrize(("now", "then"), OLD_KINDS)
def test_adapters_of_0_1_0_load(tmp_path, now, then):
    """Their config has `learn` and `temperature` in place of today's keys, and their numbers have no checksum."""
    run = finished_run(tmp_path, now[0], settings=(f"rope.query_gains={now[1]}",))
    folder = adapter_of(run)
    expected = learned_of(AdapterRun(read_sections(folder), folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config.pop("frequencies"), config.pop("query_gains")) == now
    assert not {"learn", "temperature"} & config.keys()
    old = config | {"learn": then[0], "temperature": then[1]}
    (folder / "adapter_config.json").write_text(json.dumps(old))
    numbers = load_file(folder / "adapter_model.safetensors")
    save_file(numbers, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    sections = read_sections(folder)
    assert (sections.rope.frequencies, sections.rope.query_gains) == now
    assert learned_of(AdapterRun(sections, folder)).as_json() == expected.as_json()
    loaded = PeftModel.from_pretrained(load(run.recipe.base.model), str(folder))
    assert (loaded.peft_config["default"].frequencies, loaded.peft_config["default"].query_gains) == now
    layer = next(module for module in loaded.modules() if isinstance(module, YarnTuneLayer))
    own, saved = layer.rotary("default").numbers(), read_tensors(run.numbers_path)
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[name], saved[name]) for name in saved)


def test_an_unknown_value_of_0_1_0_is_named():
    with pytest.raises(UserError, match="learn: 'all' is none of yarn, scale, ramp, frequency"):
        YarnTuneConfig(window=512, learn="all")
