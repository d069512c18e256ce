"""Pictures show the numbers they are of."""

import pytest
import torch
from matplotlib.image import imread
from yarn_tune.evaluation.retrieval import Cell, Retrieval
from yarn_tune.report.pictures import heat_map


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
    # The line stands where the colour changes: right of the first third.
    columns = ((pictures[256] - torch.tensor([213, 94, 0]) / 255).abs().amax(-1) < 0.02).float().mean(0)
    yellow = ((pictures[256] - torch.tensor([253, 231, 37]) / 255).abs().amax(-1) < 0.02).float().mean(0)
    purple = ((pictures[256] - torch.tensor([68, 1, 84]) / 255).abs().amax(-1) < 0.02).float().mean(0)
    line = int(columns.argmax())
    assert yellow[line - 8] > 0.5
    assert purple[line + 8] > 0.5
