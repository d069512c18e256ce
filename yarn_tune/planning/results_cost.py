"""What `compare` and `export` cost after training: operations, from the number of excerpts, methods and passes.

Every row of a comparison reads every excerpt: in one pass over the longest length, or with its native window slid over
it. Dynamic NTK is read at every length, since its table depends on the length. Retrieval reads each prompt with the
base, search-free YaRN and the learned numbers. Results that are kept already (`evaluation/nll_cache.py`) cost nothing.
"""

from dataclasses import dataclass, replace

from ..data import excerpt_lengths, grid_lengths
from ..evaluation import has_control, servable
from ..export import prompt_lengths
from ..models import GIB
from ..recipe import Recipe
from ..training import windows
from .operations import Forward, step_operations
from .shape import Shape


@dataclass(frozen=True)
class ResultsCost:
    """The cost of one `compare` and one `export` of a run."""

    excerpts: int
    """Held-out excerpts that are read, if the documents are long enough."""
    methods: int
    """Rows of the table."""
    passes: int
    """Forward passes over excerpts or windows of them, of all rows."""
    prompts: int
    """Retrieval prompts per method."""
    readers: int
    """Methods that answer them: the base, search-free YaRN where a config can carry it, and the learned numbers."""
    compare_flops: float
    """With the training of the control (`eval.native_adapted`)."""
    export_flops: float
    """In float32, in which the export is compared with the tuned model."""
    export_gib: float
    """Size of the files that are written."""


def estimate_results(recipe: Recipe, shape: Shape) -> ResultsCost:
    """The cost of the steps after training.

    Args:
        recipe: recipe of the run.
        shape: sizes of its base model.
    """
    settings, forward = recipe.eval, Forward.of(shape)
    native, window = recipe.rope.native or shape.native, recipe.rope.window
    lengths = excerpt_lengths(settings, native, window)
    longest = max(lengths)
    inside = min(native, longest)
    slid = windows(longest, native, settings.stride_over(native))
    search_free = {*servable(("none", "yarn", *settings.methods), shape.theta_only)}
    control = has_control(recipe)
    at_lengths = sorted({*lengths, inside} - {longest}) if "dynamic" in search_free else []
    slid_rows = 3 if control else 2  # of the base, of the learned numbers, of the control
    whole_rows = len(search_free) + 1
    excerpts = settings.documents * (2 if recipe.data.heldout_unlike else 1)
    of_excerpt = whole_rows * forward(longest) + sum(map(forward, at_lengths)) + slid_rows * len(slid) * forward(inside)
    prompts, readers = [], 1 + len({"none", "yarn"} & search_free)
    if settings.retrieval is not None:
        grid = settings.retrieval
        per_length = len(grid.tasks) * len(set(grid.depths)) * grid.per_cell
        prompts = grid_lengths(grid, native, window) * per_length
    training = 0.0
    if control:
        rows = replace(recipe, data=replace(recipe.data, lengths=[native] if recipe.row_tokens() > native else None))
        training = recipe.train.steps * step_operations(rows, shape)
    return ResultsCost(
        excerpts=excerpts,
        methods=whole_rows + slid_rows,
        passes=excerpts * (whole_rows + len(at_lengths) + slid_rows * len(slid)),
        prompts=len(prompts),
        readers=readers,
        compare_flops=excerpts * of_excerpt + readers * sum(map(forward, prompts)) + training,
        export_flops=2 * sum(map(forward, prompt_lengths(native, window))),
        export_gib=shape.parameters * (2 if recipe.base.dtype == "bfloat16" else 4) / GIB,
    )
