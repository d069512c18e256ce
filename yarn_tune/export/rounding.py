"""What it costs to round folded weights to the dtype of the checkpoint, in NLL on held-out documents."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data import heldout_excerpts
from ..errors import UserError
from ..evaluation import full_nll
from ..models import load_config, load_model, to_device
from ..recipe import missing_files
from ..runs import Run
from ..tunable import set_parameters
from .fidelity import Comparison, RoundingCost

DOCUMENTS, MOST_TOKENS = 2, 4096
"""Number of excerpts, and tokens of the longest one."""


def rounding_cost(run: Run, compared: Comparison) -> RoundingCost | None:
    """Measure the cost on the beginning of the run's held-out documents.

    Args:
        run: the run, whose recipe names the documents.
        compared: the exported folder and the model in memory, after they were compared.

    Returns:
        None if no weight was rounded, or the documents cannot be read any more.
    """
    if compared.base.config.dtype == torch.float32 or missing_files(run.recipe.data.heldout):
        return None
    length = min(MOST_TOKENS, max(run.recipe.eval.lengths or [compared.learned.window]))
    try:
        excerpts = [ids for _, ids in heldout_excerpts(run.recipe.data, run.base, length, DOCUMENTS)]
    except UserError:
        return None
    exact = compared.exact
    dtype = str(load_config(str(compared.folder)).dtype).removeprefix("torch.")
    model = to_device(load_model(str(compared.folder), dtype="float32"))
    named = dict(model.named_parameters())
    if all(torch.equal(named[name].cpu(), tensor) for name, tensor in exact.items()):
        return None
    rounded = _mean_nll(model, excerpts)
    set_parameters(model, exact)
    tokens = sum(len(ids) - 1 for ids in excerpts)
    return RoundingCost(dtype, tokens, _mean_nll(model, excerpts), rounded)


def _mean_nll(model: PreTrainedModel, excerpts: list[Tensor]) -> float:
    return torch.cat([full_nll(model, ids) for ids in excerpts]).double().mean().item()
