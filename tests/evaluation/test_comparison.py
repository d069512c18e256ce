"""The comparison: every method is measured on the same tokens, under its own table."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import NATIVE, recipe_tree, save_tiny, tiny_config, write_documents
from transformers import AutoModelForCausalLM
from yarn_tune.data import heldout
from yarn_tune.data.heldout import heldout_excerpts
from yarn_tune.errors import UserError
from yarn_tune.evaluation import retrieval
from yarn_tune.evaluation.comparison import compare, named_rows
from yarn_tune.evaluation.methods import Method
from yarn_tune.evaluation.native_adapted import learn_native_adapted, native_adapted_run
from yarn_tune.evaluation.perplexity import full_nll
from yarn_tune.evaluation.results import CompareRow, Comparison, TextResult, table, tables, with_key_tokens
from yarn_tune.evaluation.verdict import Contrast
from yarn_tune.files import write_checked
from yarn_tune.recipe.loading import load_recipe, parse_recipe
from yarn_tune.recipe.results_schema import Retrieve
from yarn_tune.recipe.schema import Recipe
from yarn_tune.runs.folder import Run
from yarn_tune.runs.learned import tuned_row
from yarn_tune.training.loop import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    base = save_tiny(folder / "base")
    run = Run(parse_recipe(recipe_tree(base, folder), []), folder / "run")
    train(run)
    return run, compare(run, {"tuned": tuned_row(run)})


def test_methods_and_figures(finished):
    run, comparison = finished
    names = [row.method for row in comparison.rows]
    assert names == ["none", "native-window", "linear", "ntk", "dynamic", "yarn", "tuned", "tuned-slid"]
    kinds = ["search-free", "slid", *["search-free"] * 4, "learned", "slid"]
    assert [row.kind for row in comparison.rows] == kinds
    assert comparison.edges == [32 * i for i in range(9)]
    for row in comparison.rows:
        assert set(row.nll) == {NATIVE, 2 * NATIVE, 256}
        # Buckets hold 32 tokens each but the first, which lacks the token nothing predicts.
        weights = [31, *[32] * 7]
        mean = sum(w * v for w, v in zip(weights, row.by_position, strict=True)) / 255
        assert mean == pytest.approx(row.nll[256], rel=1e-9)
        assert len(row.by_excerpt) == len(comparison.like.excerpts)
        assert sum(row.by_excerpt) / len(row.by_excerpt) == pytest.approx(row.nll[256], rel=1e-9)
        assert row.tokens_spent == (4 * 2 * 256 if row.method.startswith("tuned") else 0)
    assert Comparison.load(run.folder / "compare.json") == comparison


@pytest.mark.rope_warnings
@pytest.mark.parametrize("method", ["none", "linear", "dynamic", "yarn"])
def test_each_method_equals_transformers_own(finished, method):
    """The same documents through a stock model whose config names the method."""
    run, comparison = finished
    section = {"rope_theta": 10000.0}
    length = 256
    if method == "none":
        section |= {"rope_type": "default"}
    elif method == "yarn":
        section |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE}
    else:
        section |= {"rope_type": method, "factor": 4.0}
    config = tiny_config("llama", rope_parameters=section)
    config.max_position_embeddings = NATIVE
    model = AutoModelForCausalLM.from_pretrained(run.recipe.base.model, config=config).eval()
    excerpts = heldout_excerpts(run.recipe.data, run.base, length, 2)
    nats = [full_nll(model, ids) for _, ids in excerpts]
    expected = torch.cat(nats).double().mean().item()
    # `dynamic` reads length - 1 tokens (the last is only predicted), as the harness does.
    assert comparison.row(method).nll[256] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every search-free method, both kinds of text, the control, gains and phases."""
    folder = tmp_path_factory.mktemp("everything")
    base = save_tiny(folder / "base")
    write_documents(folder / "unlike.jsonl", [400, 300], seed=90)
    settings = [
        f"data.heldout_unlike=[{folder}/unlike.jsonl]",
        "eval.methods=[linear, ntk, dynamic, ntk-by-parts, llama3, abf, cope]",
        "eval.native_adapted=true",
        "rope.query_gains=pair_phase",
        "train.steps=2",
        "train.checkpoint_every=1",
    ]
    run = Run(parse_recipe(recipe_tree(base, folder), settings), folder / "run")
    train(run)
    return run, compare(run, {"tuned": tuned_row(run)})


def test_every_row_is_in_both_tables(everything):
    _, comparison = everything
    names = [row.method for row in comparison.rows]
    assert names == [
        "none", "native-window", "native-adapted", "linear", "ntk", "dynamic", "abf", "llama3", "cope", "ntk-by-parts",
        "yarn", "tuned", "tuned-slid",
    ]  # fmt: skip
    assert [row.method for row in comparison.unlike.rows] == names
    for row, other in zip(comparison.rows, comparison.unlike.rows, strict=True):
        assert len(row.by_excerpt) == len(other.by_excerpt) == 2
        assert row.nll != other.nll
    assert [len(each.contrasts) for each in comparison.verdict().texts] == [3, 3]


OWN = {"rope_theta": 10000.0}
NEVER_TURNS = 1e12
"""A longrope factor of a pair whose frequency is 0: lists of factors cannot hold infinity."""


@pytest.mark.rope_warnings
@pytest.mark.parametrize("method", ["abf", "llama3", "ntk-by-parts", "cope"])
def test_more_methods_are_what_a_stock_config_computes(everything, method):
    """A checkpoint can be served with each of these methods."""
    run, comparison = everything
    section = {
        "abf": {"rope_type": "default", "rope_theta": 10000 ** (math.log(256 / math.tau) / math.log(64 / math.tau))},
        "llama3": OWN | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": NATIVE},
        "ntk-by-parts": OWN | {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0,
                               "original_max_position_embeddings": NATIVE},
        "cope": OWN | {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0,
                       "original_max_position_embeddings": NATIVE},
    }[method]  # fmt: skip
    if method == "cope":  # head size 16: all 8 pairs are clipped
        shares = [(1 + math.cos(math.pi * pair / 7)) / 2 for pair in range(7)]
        factors = [*(1 / share for share in shares), NEVER_TURNS]
        section |= {"short_factor": factors, "long_factor": factors}
    config = tiny_config("llama", rope_parameters=section, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_pretrained(run.recipe.base.model, config=config).eval()
    excerpts = heldout_excerpts(run.recipe.data, run.base, 256, 2, "data.heldout_unlike")
    means = [full_nll(model, ids).double().mean().item() for _, ids in excerpts]
    assert comparison.unlike.row(method).by_excerpt == pytest.approx(means, rel=1e-5)


def test_the_control_is_learned_at_the_native_window_from_the_same_tokens(everything):
    """The control keeps the base's table; its NLL is computed by hand with a window slid over one excerpt."""
    run, comparison = everything
    folder = run.folder / "native-adapted"
    control, row = Run(load_recipe(folder / "recipe.yaml"), folder), comparison.row("native-adapted")
    assert row.tokens_spent == comparison.row("tuned").tokens_spent == 2 * 2 * 256
    learned = tuned_row(control).learned
    torch.testing.assert_close(learned.inv_freq(), run.base.facts.table(NATIVE)[0], rtol=1e-6, atol=0)
    assert learned.attention_factor == pytest.approx(1.0)
    assert learned.gains.is_complex()
    assert learned.gains.abs().sub(1).abs().max() > 1e-3
    model, stride = run.base.load(), NATIVE // 4
    _, ids = heldout_excerpts(run.recipe.data, run.base, 256, 1)[0]
    with Method.of(learned).on(model):
        parts = [full_nll(model, ids[:NATIVE])]
        parts += [full_nll(model, ids[end - NATIVE : end])[-stride:] for end in range(NATIVE + stride, 257, stride)]
    assert row.by_excerpt[0] == pytest.approx(torch.cat(parts).double().mean().item(), rel=1e-6)
    assert row.by_excerpt != comparison.row("native-window").by_excerpt


def test_a_finished_control_is_not_trained_again_and_an_interrupted_one_continues(everything, tmp_path, monkeypatch):
    run, comparison = everything
    monkeypatch.setattr("yarn_tune.evaluation.native_adapted.train", None)
    assert compare(run, {"tuned": tuned_row(run)}) == comparison
    other = Run(run.recipe, tmp_path / "run")
    shutil.copytree(run.folder / "native-adapted", other.folder / "native-adapted")
    learned = (other.folder / "native-adapted" / "learned.safetensors").read_bytes()
    (other.folder / "native-adapted" / "learned.safetensors").unlink()
    shutil.rmtree(other.folder / "native-adapted" / "checkpoints" / "step-000002")
    monkeypatch.undo()
    learn_native_adapted(other)
    assert (other.folder / "native-adapted" / "learned.safetensors").read_bytes() == learned


def test_a_control_that_would_learn_nothing_is_left_out(finished):
    """Only frequencies are learned, which the control has not: it would be the slid base."""
    run, _ = finished
    recipe = parse_recipe(run.recipe.to_dict(), ["eval.native_adapted=true"])
    assert native_adapted_run(Run(recipe, run.folder)) is None


def test_the_control_reads_rows_of_the_same_lengths_and_is_not_held_to_the_base(everything):
    run, _ = everything
    settings = ["train.short_context_kl=1.0", "train.objective=preserve"]
    for rows, lengths, expected in (
        (NATIVE, [NATIVE, NATIVE // 2], [NATIVE, NATIVE // 2]),
        (NATIVE // 2, None, None),
        (256, [256, NATIVE // 2], [NATIVE]),
    ):
        recipe = parse_recipe(run.recipe.to_dict(), [f"data.row_tokens={rows}", *settings])
        recipe = replace(recipe, data=replace(recipe.data, lengths=lengths))
        control = native_adapted_run(Run(recipe, run.folder)).recipe
        assert control.data.lengths == expected
        assert (control.train.objective, control.train.short_context_kl) == ("next-token", 0.0)


@pytest.mark.parametrize("family", ["gpt_oss", "mistral"])
@pytest.mark.parametrize("settings", [["lora.rank=2"], ["rope.query_gains=head"]])
def test_a_control_over_other_bases_starts_as_the_base(tmp_path, family, settings):
    """Also over a base that ships YaRN (gpt_oss here), whose own factor is kept."""
    base = save_tiny(tmp_path / "base", family)
    recipe = parse_recipe(recipe_tree(base, tmp_path, steps=1), [*settings, "eval.native_adapted=true"])
    run = Run(recipe, tmp_path / "run")
    control = learn_native_adapted(run)
    own, multiplier = run.base.facts.table(NATIVE)
    torch.testing.assert_close(control.learned.inv_freq(), own, rtol=1e-6, atol=0)
    assert control.learned.attention_factor == pytest.approx(multiplier, rel=1e-6)
    assert control.tokens == 2 * 256


def test_rows_that_cannot_be_cut_into_native_windows_are_refused(everything):
    run, _ = everything
    recipe = parse_recipe(run.recipe.to_dict(), ["data.row_tokens=200"])
    with pytest.raises(UserError, match=r"eval.native_adapted: rows of 200 tokens .* native windows of 64"):
        native_adapted_run(Run(recipe, run.folder))


def test_the_slid_window_inside_the_native_one_is_the_base(finished):
    _, comparison = finished
    assert comparison.row("native-window").short_nll == pytest.approx(comparison.row("none").short_nll, rel=1e-6)
    assert comparison.row("dynamic").short_nll == pytest.approx(comparison.row("none").short_nll, rel=1e-6)


def test_the_change_inside_the_native_window_without_the_row_of_the_base(finished):
    """The slid base stands in for it: inside its window they are the same."""
    found = finished[1].like
    assert found.base_short_nll() == found.row("none").short_nll
    without = replace(found, rows=[row for row in found.rows if row.method != "none"])
    assert without.base_short_nll() == pytest.approx(found.base_short_nll(), abs=1e-5)
    assert math.isnan(replace(found, rows=found.find("yarn")).base_short_nll())


def test_what_was_measured_is_not_measured_again(finished, monkeypatch):
    run, comparison = finished
    monkeypatch.setattr("yarn_tune.models.base.load_model", None)
    assert compare(run, {"tuned": tuned_row(run)}) == comparison
    longer = Run(parse_recipe(run.recipe.to_dict(), ["eval.lengths=[200]"]), run.folder)
    with pytest.raises(TypeError):
        compare(longer, {"tuned": tuned_row(run)})


def test_lengths_are_the_native_window_doubled_up_to_the_window():
    assert heldout.doubled(64, 256) == [64, 128, 256]
    assert heldout.doubled(64, 300) == [64, 128, 256, 300]
    assert heldout.grid_lengths(Retrieve(), 64, 300) == [48, 112, 240, 284]
    assert heldout.grid_lengths(Retrieve(), 64, 64) == [48]
    assert heldout.grid_lengths(Retrieve(lengths=[200, 100, 200]), 64, 300) == [100, 200]


def test_half_a_comparison_leaves_no_file(finished, tmp_path, monkeypatch):
    """An export's card reads compare.json, and counts on every method."""
    run, comparison = finished
    tuned, other = {"tuned": tuned_row(run)}, Run(run.recipe, tmp_path)
    shutil.copytree(run.folder / "nll", tmp_path / "nll")
    assert compare(other, tuned, only=["none", "tuned"]).rows == [comparison.row("none"), comparison.row("tuned")]
    assert not (tmp_path / "compare.json").exists()
    monkeypatch.setattr("yarn_tune.evaluation.methods.dynamic_ntk_inv_freq", lambda *numbers: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(other, tuned)
    assert not (tmp_path / "compare.json").exists()
    monkeypatch.undo()
    compare(other, tuned)
    assert (tmp_path / "compare.json").read_bytes() == (run.folder / "compare.json").read_bytes()


def test_a_torn_measurement_is_made_again(finished):
    run, comparison = finished
    for path in (run.folder / "nll").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    again = compare(run, {"tuned": tuned_row(run)})
    assert [replace(row, seconds=0) for row in again.rows] == [replace(row, seconds=0) for row in comparison.rows]


def test_the_slid_tuned_model_is_the_tuned_model_on_every_window(finished):
    """By hand: the tuned model reads each window of 64 tokens alone."""
    run, comparison = finished
    model, stride = run.base.load(), NATIVE // 4
    means = []
    for _, ids in heldout_excerpts(run.recipe.data, run.base, 256, 2):
        with Method.of(tuned_row(run).learned).on(model):
            parts = [full_nll(model, ids[:NATIVE])]
            for end in range(NATIVE + stride, 257, stride):
                parts.append(full_nll(model, ids[end - NATIVE : end])[-stride:])
        means.append(torch.cat(parts).double().mean().item())
    assert comparison.row("tuned-slid").by_excerpt == pytest.approx(means, rel=1e-6)
    assert comparison.row("tuned-slid").nll[256] != pytest.approx(comparison.row("native-window").nll[256], rel=1e-6)


def test_needles_are_asked_of_the_model_that_was_measured(tmp_path, monkeypatch):
    """It is loaded once, and asked again only when the weights are others."""
    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "cache"))
    base = save_tiny(tmp_path / "base")
    recipe = parse_recipe(recipe_tree(base, tmp_path), ["eval.retrieval={per_cell: 1, depths: [0.5]}"])
    run, loaded, asked = Run(recipe, tmp_path / "run"), [], []
    load, score = AutoModelForCausalLM.from_pretrained, retrieval.score_transformers
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(1) or load(*a, **k))
    monkeypatch.setattr(retrieval, "score_transformers", lambda *a: asked.append(1) or score(*a))
    first = compare(run, {}, only=["none", "yarn"])
    assert (len(loaded), len(asked)) == (1, 2 * 3)
    assert compare(run, {}, only=["none", "yarn"]) == first
    assert (len(loaded), len(asked)) == (1, 2 * 3)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    compare(Run(recipe, tmp_path / "run"), {}, only=["none", "yarn"])
    assert (len(loaded), len(asked)) == (2, 4 * 3)


def test_runs_on_another_base_are_refused(finished, tmp_path):
    """Their numbers would be measured on this one."""
    run, _ = finished
    (tmp_path / "link").symlink_to(run.recipe.base.model)
    other = save_tiny(tmp_path / "base", "qwen2")
    for settings in ([f"base.model={other}"], ["base.revision=main"]):
        recipe = parse_recipe(run.recipe.to_dict(), settings)
        with pytest.raises(UserError, match=r"base.model .* is not the base that is measured here"):
            named_rows(run, [copied(run, recipe, tmp_path / "other")])
    recipe = parse_recipe(run.recipe.to_dict(), [f"base.model={tmp_path / 'link'}"])
    assert set(named_rows(run, [copied(run, recipe, tmp_path / "same")])[0]) == {"tuned-run", "tuned-same"}


def test_rows_of_one_name_are_refused(finished, tmp_path):
    run, _ = finished
    other = copied(run, run.recipe, tmp_path / "run")
    for others in ([other], [run.folder]):
        with pytest.raises(UserError, match="compare: tuned-run would be the name of two rows"):
            named_rows(run, others)
    bases = [save_tiny(tmp_path / name / "runs" / "export") for name in ("a", "b")]
    with pytest.raises(UserError, match="checkpoint runs/export would be the name of two rows"):
        named_rows(run, bases)


def copied(run: Run, recipe: Recipe, folder: Path) -> Path:
    """A finished run of another recipe."""
    shutil.copytree(run.folder, folder, dirs_exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return folder


KINDS = {"native-window": "slid", "native-adapted": "slid", "tuned": "learned"}


def result_with(**nll: list[float]) -> TextResult:
    """Rows with these NLL values, one per excerpt."""
    rows = []
    for key, values in nll.items():
        name, mean = key.replace("_", "-"), sum(values) / len(values)
        kind = KINDS.get(name, "search-free")
        rows.append(CompareRow(name, kind, {256: mean}, [mean], mean, by_excerpt=values))
    return TextResult([f"document {i + 1}, part 1" for i in range(len(next(iter(nll.values()))))], rows)


def comparison_with(**nll: list[float]) -> Comparison:
    return Comparison(64, 256, [0, 256], result_with(**nll))


def test_the_table_by_hand():
    lines = table(result_with(none=[5.0], native_window=[3.3], yarn=[3.4], tuned=[3.2]), [0, 256]).splitlines()
    assert lines[0] == "| method | 0-256 | mean | PPL | short tax | tokens spent |"
    assert lines[-1] == "| tuned | 3.200 | 3.200 | 24.53 | -1.800 | 0 |"


def test_the_verdict_compares_excerpt_by_excerpt():
    """Lower on 4 of 8 excerpts is no win, whatever the mean; lower on 9 of 9 is one."""
    yarn = [3.0 + i / 10 for i in range(9)]
    slid = [value - 0.05 for value in yarn]
    tuned = [a + (-0.3 if i < 4 else 0.01) for i, a in enumerate(slid)]
    found = comparison_with(none=[5.0] * 9, native_window=slid, yarn=yarn, tuned=tuned)
    assert found.subject() == "tuned"
    against = {each.other: each for each in found.verdict().texts[0].contrasts}
    assert set(against) == {"yarn", "native-window"}
    assert (against["yarn"].outcome, against["yarn"].below, against["yarn"].excerpts) == ("better", 9, 9)
    assert against["yarn"].p == pytest.approx(2 / 2**9)
    close = against["native-window"]
    assert (close.outcome, close.below) == ("too close to call", 4)
    assert close.difference == pytest.approx((4 * -0.3 + 5 * 0.01) / 9)
    assert close.p == pytest.approx(1.0)  # 2 x P(at most 4 of 9) > 1
    assert "against native-window too close to call (lower on 4 of 9 excerpts, -0.128, p = 1)" in str(found.verdict())
    assert "beats" not in str(found.verdict())
    worse = comparison_with(none=[5.0] * 9, native_window=slid, yarn=yarn, tuned=[v + 0.2 for v in yarn]).verdict()
    assert [each.outcome for each in worse.texts[0].contrasts] == ["worse", "worse"]


def test_the_verdict_of_a_base_without_learned_rows_is_about_yarn():
    found = comparison_with(none=[5.0, 5.2], native_window=[3.0, 3.1], yarn=[2.9, 3.2])
    assert found.subject() == "yarn"
    lines = found.verdict().lines()
    assert list(lines) == ["Prediction", "Needles", "Short texts"]
    assert "against native-window too close to call (lower on 1 of 2 excerpts" in lines["Prediction"]
    assert lines["Needles"] == "not measured (eval.retrieval)."
    assert lines["Short texts"] == "yarn changes the NLL inside 64 tokens by -2.050."


def test_both_kinds_of_text_are_in_verdict_table_and_file(tmp_path):
    like = result_with(none=[5.0] * 6, native_window=[3.0] * 6, yarn=[3.4] * 6, tuned=[3.2] * 6)
    unlike = result_with(none=[6.0] * 7, native_window=[4.0] * 7, yarn=[4.4] * 7, tuned=[4.6] * 7)
    found = Comparison(64, 256, [0, 256], like, unlike, prompts=30)
    found.save(tmp_path / "compare.json")
    assert Comparison.load(tmp_path / "compare.json") == found
    text = tables(found)
    assert text.index("| tuned | 3.200") < text.index("unlike the training text (7 excerpts)") < text.index("| 4.600")
    first, second = found.verdict().texts
    assert [each.outcome for each in first.contrasts] == ["better", "worse"]
    assert [each.outcome for each in second.contrasts] == ["worse", "worse"]


@pytest.mark.parametrize("tree", [{}, {"like": None, "unlike": None}, {"like": 3}])
def test_a_file_that_is_no_comparison_is_named(tmp_path, tree):
    path = tmp_path / "compare.json"
    write_checked(path, tree)
    with pytest.raises(UserError, match=r"compare.json: not a comparison .* run `yarn-tune compare` again"):
        Comparison.load(path)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(
        UserError, match=r"compare.json cannot be read .*; delete it, and run `yarn-tune compare` again"
    ):
        Comparison.load(path)


def test_key_tokens_by_hand():
    """Of five tokens, far context helps the second and the fourth enough, and the fourth is still predicted badly."""
    near = torch.tensor([1.0, 3.5, 2.9, 6.0, 0.5])
    far = torch.tensor([1.0, 1.9, 1.0, 3.0, 0.9])
    tuned = torch.tensor([9.0, 0.25, 9.0, 9.0, 9.0])
    result = result_with(native_window=[3.0], yarn=[2.0], tuned=[2.0])
    nll = {"native-window": [near], "yarn": [far], "tuned": [tuned]}
    found = with_key_tokens(result, nll, gain=2.0, floor=2.0)
    assert [row.key_nll for row in found.rows] == pytest.approx([3.5, 1.9, 0.25])
    assert {row.key_tokens for row in found.rows} == {1}
    assert with_key_tokens(result, nll, gain=4.0, floor=2.0) == result
    assert math.isclose(with_key_tokens(result, nll, gain=2.0, floor=3.0).row("tuned").key_nll, (0.25 + 9.0) / 2)


def test_a_slid_row_does_not_choose_key_tokens():
    """A slid row reads near context only, so that it does not choose key tokens."""
    near, far = torch.tensor([4.0, 4.0]), torch.tensor([1.0, 4.0])
    result = result_with(native_window=[3.0], yarn=[2.0], native_adapted=[2.0])
    nll = {"native-window": [near], "yarn": [far], "native-adapted": [torch.tensor([4.0, 0.5])]}
    assert with_key_tokens(result, nll, gain=2.0, floor=2.0).row("yarn").key_tokens == 1


def test_ties_count_for_neither_side():
    """Six excerpts better, fourteen alike: better, p = 0.03."""
    found = Contrast.of("yarn", [0.9] * 6 + [1.0] * 14, [1.0] * 20)
    assert (found.below, found.ties, found.excerpts) == (6, 14, 20)
    assert found.outcome == "better"
    assert Contrast.of("yarn", [1.1] * 6 + [1.0] * 14, [1.0] * 20).outcome == "worse"
    assert Contrast.of("yarn", [1.0] * 20, [1.0] * 20).outcome == "too close to call"


def test_a_checkpoint_that_changes_with_the_length_is_read_at_each_length(tmp_path):
    """longrope has another table up to its original window, as dynamic NTK has for every length."""
    base = save_tiny(tmp_path / "base")
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8, "attention_factor": 1.0, "original_max_position_embeddings": NATIVE}  # fmt: skip
    save_tiny(tmp_path / "long", rope_parameters=rope, max_position_embeddings=4 * NATIVE)
    run = Run(parse_recipe(recipe_tree(base, tmp_path), []), tmp_path / "run")
    found = compare(run, {}, [tmp_path / "long"])
    checkpoint, none = found.rows[-1], found.row("none")
    assert checkpoint.kind == "checkpoint"
    assert checkpoint.short_nll == pytest.approx(none.short_nll, rel=1e-5)
