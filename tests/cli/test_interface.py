"""The interface is frozen in tests/interface.txt: recipe keys with types and defaults, commands, and flags.

After a deliberate change run `UPDATE=1 ./launch.sh test tests/cli/test_interface.py`, check `git diff
tests/interface.txt`, and describe the change in CHANGELOG.md.
"""

import argparse
import os
from pathlib import Path

from yarn_tune.cli.parser import build_parser
from yarn_tune.recipe import recipe_keys

FROZEN = Path(__file__).parents[1] / "interface.txt"


def argument_line(action: argparse.Action) -> str:
    """One line for an argument: its name or flag, what it takes, and its default."""
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    takes = {0: "", None: " VALUE", "*": " VALUE...", "+": " VALUE..."}[action.nargs] if action.option_strings else ""
    if not action.option_strings:
        takes = {None: "", "*": " (any number)", "+": " (at least one)"}[action.nargs]
    choices = f" of {', '.join(map(str, action.choices))}" if action.choices else ""
    required = " (required)" if action.option_strings and action.required else ""
    default = "" if action.default in (None, False, argparse.SUPPRESS, []) else f" = {action.default}"
    return f"  {name}{takes}{choices}{required}{default}"


def interface() -> str:
    """The interface as text, from the code."""
    keys = [f"{key.name}: {key.type} = {key.default}" for key in recipe_keys()]
    lines = ["# Recipe keys: name: type = default", "", *keys]
    parser, commands = build_parser()
    for title, each in [("yarn-tune", parser), *((f"yarn-tune {name}", one) for name, one in commands.items())]:
        actions = [action for action in each._actions if not isinstance(action, argparse._SubParsersAction)]
        lines += ["", f"# {title}", "", *map(argument_line, actions)]
    return "\n".join(lines) + "\n"


def test_keys_commands_and_flags_are_the_frozen_ones():
    if os.environ.get("UPDATE"):
        FROZEN.write_text(interface())
    assert interface() == FROZEN.read_text(), "UPDATE=1 ./launch.sh test tests/cli/test_interface.py records a change"
