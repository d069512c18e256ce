"""Pictures show the numbers they are of."""

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from tiny import finished_run
from yarn_tune.evaluation.results import CompareRow, Comparison, TextResult
from yarn_tune.evaluation.retrieval import Cell, Retrieval
from yarn_tune.report.pictures import heat_map
from yarn_tune.report.summary_picture import plot_summary
from yarn_tune.report.training_pictures import plot_learned
from yarn_tune.runs.learned import learned_of
from yarn_tune.tunable import Start


def test_the_heat_map_shows_the_shares_and_the_native_window(tmp_path):
    found = Retrieval([Cell(n, d, 10 if n == 128 else 0, 10) for n in (128, 512, 1024) for d in (0.0, 0.5, 1.0)])

    def share_of(picture: torch.Tensor, colour: str) -> float:
        """Of the pixels (the coordinate `colour` is `#rrggbb`)."""
        wanted = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return ((picture - wanted).abs().amax(-1) < 0.02).float().mean().item()

    pictures = {}
    for native in (None, 256):
        heat_map(found, tmp_path / "map.png", "a title", native)
        pictures[native] = torch.from_numpy(imread(tmp_path / "map.png"))[..., :3]
    for picture in pictures.values():
        all_right, none_right = share_of(picture, "#fde725"), share_of(picture, "#440154")  # viridis' ends
        assert none_right == pytest.approx(2 * all_right, rel=0.1)
        assert all_right > 0.1
    vermilion = {native: share_of(picture, "#d55e00") for native, picture in pictures.items()}
    assert vermilion[None] < 1e-4 < 1e-3 < vermilion[256]
    # The line is where the colour changes: right of the first third.
    columns = ((pictures[256] - torch.tensor([213, 94, 0]) / 255).abs().amax(-1) < 0.02).float().mean(0)
    yellow = ((pictures[256] - torch.tensor([253, 231, 37]) / 255).abs().amax(-1) < 0.02).float().mean(0)
    purple = ((pictures[256] - torch.tensor([68, 1, 84]) / 255).abs().amax(-1) < 0.02).float().mean(0)
    line = int(columns.argmax())
    assert yellow[line - 8] > 0.5
    assert purple[line + 8] > 0.5


def row(method: str, kind: str, values: list[float]) -> CompareRow:
    return CompareRow(method, kind, {256: sum(values) / len(values)}, values, values[0], by_excerpt=[1.0] * 6)


@pytest.mark.parametrize("measured", [True, False], ids=["with needles", "without"])
def test_the_summary_shows_needles_of_base_yarn_and_tuned_beside_the_nll(tmp_path, measured):
    """A strip is yellow where all are found and purple where none is; the picture names its source."""
    rows = [
        row("none", "search-free", [3.0, 9.0]),
        row("yarn", "search-free", [3.3, 3.4]),
        row("tuned", "learned", [3.0, 3.1]),
        row("linear", "search-free", [5.0, 5.0]),
    ]
    comparison = Comparison(64, 256, [0, 128, 256], TextResult(["one"] * 6, rows))
    shares = {"none": 0, "yarn": 0, "tuned": 10, "other": 10} if measured else {}
    needles = {name: Retrieval([Cell(n, 0.5, right, 10) for n in (48, 240)]) for name, right in shares.items()}
    plot_summary(comparison, needles, tmp_path / "s.png", "of these")
    assert Image.open(tmp_path / "s.png").text["Source"] == "of these"
    picture = torch.from_numpy(imread(tmp_path / "s.png"))[..., :3]

    def share_of(colour: tuple[int, int, int]) -> float:
        return ((picture - torch.tensor(colour) / 255).abs().amax(-1) < 0.02).float().mean().item()

    yellow, purple, orange = share_of((253, 231, 37)), share_of((68, 1, 84)), share_of((230, 159, 0))
    assert (purple == pytest.approx(2 * yellow, rel=0.1) and yellow > 0.05) if measured else yellow == purple == 0
    assert orange < 1e-3, "linear has no line"


@pytest.mark.parametrize("gains", ["none", "layer", "pair", "pair_phase"])
def test_what_was_learned_is_drawn_for_every_kind(tmp_path, gains):
    run = finished_run(tmp_path, settings=(f"rope.query_gains={gains}",))
    plot_learned(learned_of(run), Start.of(run.base.facts, run.recipe.rope), tmp_path / "l.png")
    panels = {"none": 1, "layer": 2, "pair": 2, "pair_phase": 3}[gains]
    expected = 120 * (2.6 + 0.3 * panels + (panels - 1) * (1.1 + 0.16 * 4))
    assert imread(tmp_path / "l.png").shape[0] == pytest.approx(expected, abs=2)
