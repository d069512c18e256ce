"""Rows without learned numbers are measured once for all runs on the same base and documents."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import finished_run, save_tiny, write_documents, write_metrics
from yarn_tune.evaluation import compare
from yarn_tune.evaluation import perplexity as of_perplexity
from yarn_tune.evaluation import retrieval as of_retrieval
from yarn_tune.evaluation.results import Comparison
from yarn_tune.planning import Shape, estimate_results
from yarn_tune.runs import tuned_row

DOCUMENTS, WINDOWS = 2, 1 + (256 - 64) // 16
"""Excerpts, and passes over each with a window of 64 tokens slid by 16 over 256."""
OWN = DOCUMENTS * (1 + WINDOWS)
"""Passes of a run's own rows: `tuned` in one pass, `tuned-slid` with a sliding window."""
SETTINGS = ("eval.retrieval={lengths: [100], depths: [0.5], per_cell: 3}",)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Make a run over one base, and compare it; returns the result, passes over excerpts, and passes over prompts."""
    monkeypatch.setenv("YARN_TUNE_CACHE", str(tmp_path / "cache"))
    base = save_tiny(tmp_path / "base")
    passes = {"nll": 0, "prompts": 0}

    def counted(original, kind):
        def count(*arguments, **options):
            passes[kind] += 1
            return original(*arguments, **options)

        return count

    monkeypatch.setattr(of_perplexity, "hidden_states", counted(of_perplexity.hidden_states, "nll"))
    monkeypatch.setattr(of_retrieval, "score_transformers", counted(of_retrieval.score_transformers, "prompts"))

    def measure(name: str, *settings: str, **offsets: float) -> tuple[Comparison, int, int]:
        run = finished_run(tmp_path / name, base=base, settings=(*SETTINGS, *settings), **offsets)
        write_metrics(run.folder, 4)
        measure.runs[name] = run
        passes.update(nll=0, prompts=0)
        return compare(run, {"tuned": tuned_row(run)}), passes["nll"], passes["prompts"]

    measure.runs = {}
    return measure


def plain(comparison: Comparison) -> list[object]:
    """The rows that depend on no run, without the time of measuring."""
    return [replace(row, seconds=0) for row in comparison.rows if not row.method.startswith("tuned")]


def test_a_second_run_measures_its_own_rows_only(world):
    one, passes, prompts = world("one")
    # none, linear, ntk, yarn in one pass; dynamic in one for each of 64, 128 and 256 tokens; the slid native window
    assert passes == DOCUMENTS * (4 + 3 + WINDOWS) + OWN
    assert prompts == 3 * 3
    planned = estimate_results(world.runs["one"].recipe, Shape.of(world.runs["one"].base.text_config))
    assert (planned.passes, 3 * planned.prompts) == (passes, prompts)
    other, passes, prompts = world("other", log_temperature=0.3)
    assert passes == OWN
    assert prompts == 3
    assert plain(other) == plain(one)
    assert other.row("tuned").nll != one.row("tuned").nll
    assert {row.method: row.retrieved for row in other.rows if row.method in ("none", "yarn")} == {
        row.method: row.retrieved for row in one.rows if row.method in ("none", "yarn")
    }


def test_other_documents_or_another_window_are_measured(world, tmp_path):
    world("one")
    _, passes, _ = world("longer", "rope.window=320", "eval.lengths=[256]")
    # Of the rows, `none` and the slid window do not depend on the factor.
    assert passes == DOCUMENTS * (3 + 2 - 1) + OWN
    heldout = write_documents(tmp_path / "others.jsonl", [600, 300], seed=90)
    _, passes, prompts = world("others", f"data.heldout=[{heldout}]")
    assert passes == DOCUMENTS * (4 + 3 + WINDOWS) + OWN
    assert prompts == 3 * 3


def test_damaged_entries_are_measured_again(world, tmp_path):
    one, _, _ = world("one")
    for folder, changed, expected in (("nll", 1, None), ("retrieval", 1, 3 + 3)):
        path = sorted(Path(tmp_path / "cache" / folder).iterdir())[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= changed
        path.write_bytes(content)
        again, passes, prompts = world(f"after-{folder}")
        assert plain(again) == plain(one)
        if expected is None:
            assert passes - OWN in (1, WINDOWS)
        else:
            assert (passes, prompts) == (OWN, expected)


def test_a_cache_that_cannot_be_written_leaves_them_in_the_run_folder(world, tmp_path):
    (tmp_path / "cache").mkdir()
    for name in ("nll", "retrieval"):
        (tmp_path / "cache" / name).write_text("in the way")
    one, first, _ = world("one")
    run_files = len(list((tmp_path / "one" / "run" / "nll").iterdir()))
    assert run_files == DOCUMENTS * (4 + 3 + 1 + 2)
    again, passes, prompts = world("one")
    assert (passes, prompts) == (0, 0)
    assert again == one
    assert first > OWN
