"""The commands that begin: the bundled recipes, and a first recipe for a model.

Packages are imported inside the functions, after the arguments are checked, so that a user error needs no import of
torch.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from ..recipe import Base, copy_recipe, shipped_recipes
from .arguments import check_documents, check_model
from .result import CommandResult
from .terminal import filled


def recipes_command(options: argparse.Namespace) -> CommandResult:
    """List the bundled recipes, or copy one here with its files."""
    if options.copy is None:
        found = shipped_recipes()
        width = max(map(len, found))
        lines = [filled(f"{name:<{width}}  {line}", indent=width + 2) for name, line in found.items()]
        return CommandResult("\n".join(lines), {"recipes": found}, "yarn-tune recipes --copy NAME")
    written = [str(path) for path in copy_recipe(options.copy, Path())]
    return CommandResult("\n".join(written), {"written": written}, f"yarn-tune plan {written[0]}")


def init_command(options: argparse.Namespace) -> CommandResult:
    """Write a first recipe."""
    check_model("MODEL", options.model)
    check_documents("--train", options.train)
    check_documents("--heldout", options.heldout)
    if options.native is not None and not 2 <= options.native <= options.window:
        raise UserError(f"--native: between 2 and --window ({options.window}); found {options.native}")

    from ..files import write_atomically
    from ..planning import Hardware, propose

    made = propose(
        Base(model=options.model, revision=options.revision),
        options.window,
        options.train,
        options.heldout,
        Hardware(options.gpu_memory, options.gpus),
        options.out,
        options.native,
    )
    path = Path(options.out or f"{made.recipe.name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists; name another file with --out")
    write_atomically(path, made.text.encode())
    value = {"path": str(path), "recipe": made.recipe.to_dict(), "cost": asdict(made.cost)}
    return CommandResult(f"{made.text}\nwritten to {path}", value, f"yarn-tune plan {path}")
