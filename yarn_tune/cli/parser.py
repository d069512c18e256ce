"""Every command and flag of `yarn-tune`, with their help texts."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from ..errors import UserError
from ..version import __version__
from . import checkpoint_commands, eval_commands, run_commands, start_commands
from .arguments import nearest, unknown_flag
from .result import CommandResult

Command = Callable[[argparse.Namespace], CommandResult]

DESCRIPTION = "Extend the context window of a frozen RoPE model by learning a few numbers on your documents."
ALL = "print all columns, including NLL by position, PPL and tokens spent"
LAUNCHED = ("train", "run", "compare")
"""Commands that several processes of a launcher share; of other commands, all but the first process do nothing."""
CHECKPOINT = "a checkpoint folder or a hub id"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise the message, followed by the usage of the command."""
        raise UserError(f"{message}\n{self.format_usage().strip()}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read a command line; the function that runs the command is in `command`.

    Raises:
        UserError: for an unknown command or flag, with the nearest known one, and for missing arguments.
        SystemExit: after `--help` and `--version`.
    """
    parser, commands = build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        raise UserError(f"unknown command {arguments[0]!r}; {nearest(arguments[0], commands)}")
    options, rest = parser.parse_known_args(arguments)
    flag = next((word for word in rest if word.startswith("-")), None)
    if flag is not None:
        value = rest[rest.index(flag) + 1 :]
        known = [*commands[arguments[0]]._option_string_actions] if arguments[0] in commands else ["--help"]
        raise UserError(unknown_flag(flag, value[0] if value else None, known))
    if rest:  # key=value after a flag, which argparse does not join with those before it
        into = getattr(options, "others" if hasattr(options, "others") else "overrides", None)
        if into is None or not all("=" in word for word in rest):
            raise UserError(f"not understood: {' '.join(rest)}; `yarn-tune {arguments[0]} --help` shows the arguments")
        into += rest
    return options


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser, and the parser of each command by name."""
    parser = Parser(prog="yarn-tune", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"yarn-tune {__version__}")
    parser.set_defaults(command=None, json=False, one_process=True)
    subparsers = parser.add_subparsers(metavar="COMMAND")
    commands: dict[str, Parser] = {}

    def add(name: str, function: Command, text: str) -> Parser:
        command = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        command.set_defaults(command=function, one_process=name not in LAUNCHED)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        commands[name] = command
        return command

    _add_start(add)
    _add_run(add)
    _add_checkpoint(add)
    _add_evaluation(add)
    return parser, commands


Add = Callable[[str, Command, str], Parser]


def _add_start(add: Add) -> None:
    command = add("recipes", start_commands.recipes_command, "list the bundled recipes, or copy one here")
    command.add_argument("--copy", metavar="NAME", help="copy this recipe and the files it needs into this folder")
    command = add("init", start_commands.init_command, "write a first recipe for a model, from its config")
    command.add_argument("model", help=CHECKPOINT)
    command.add_argument("--window", type=int, required=True, help="tokens to serve")
    command.add_argument("--train", nargs="+", required=True, metavar="FILE", help="documents to learn from; globs too")
    command.add_argument("--heldout", nargs="+", required=True, metavar="FILE", help="other documents, to measure on")
    command.add_argument("--native", type=int, help="tokens the model was trained with (default: from its config)")
    command.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="GiB of one GPU (default: 80)")
    command.add_argument("--gpus", type=int, default=1, help="number of GPUs (default: 1)")
    command.add_argument("--revision", help="revision of a hub id")
    command.add_argument("--out", metavar="FILE", help="where to write the recipe (default: <name>.yaml)")


def _add_run(add: Add) -> None:
    for name, function, text in (
        (
            "plan",
            run_commands.plan_command,
            "print what a run, its comparison and its export will read and cost, without training",
        ),
        ("train", run_commands.train_command, "train; an interrupted run continues from its last checkpoint"),
        ("export", run_commands.export_command, "write the checkpoint to serve, reload it and compare its logits"),
        ("report", run_commands.report_command, "write report.html and report.md of a finished comparison anew"),
        ("run", run_commands.run_command, "plan, train, compare, export, verify and write the report"),
    ):
        command = add(name, function, text)
        command.add_argument("recipe", help="a recipe (.yaml) or a run folder")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in train.steps=50")
        if name == "run":
            command.add_argument("--all", action="store_true", help=ALL)
        if name == "export":
            command.add_argument("--for", dest="stacks", metavar="STACK,...", help="serving stacks (export.stacks)")
            command.add_argument(
                "--fold",
                choices=["auto", "never", "always"],
                help="fold the temperature into the query weights (export.fold)",
            )
            command.add_argument(
                "--anyway",
                action="store_true",
                help="also export a run that is no better than search-free YaRN (train.decide)",
            )
            command.add_argument(
                "--out", metavar="FOLDER", help="where to write it (default: export in the run folder)"
            )
            command.add_argument("--revision", help="revision of the base, in place of the recorded one")
            command.add_argument("--overrides-only", action="store_true", help="print only the JSON for --hf-overrides")
            command.add_argument("--gguf", metavar="FILE", help="also write a GGUF for llama.cpp (Llama-type models)")
            command.add_argument(
                "--converter", metavar="PATH", help="llama.cpp's checkout or conversion script (default: $LLAMA_CPP)"
            )
            command.add_argument("--outtype", default="f16", help="type of the GGUF's weights (default: f16)")
    command = add("compare", run_commands.compare_command, "measure every method on the same held-out documents")
    command.add_argument("recipe", help="a recipe (.yaml) or a run folder, for the base, documents and lengths")
    command.add_argument(
        "others", nargs="*", metavar="RUN|CHECKPOINT|key=value", help="more rows for the table; settings"
    )
    command.add_argument("--all", action="store_true", help=ALL)
    command.add_argument(
        "--factors", metavar="F,F,...", help="add the table method x factor x rise of PPL, as in 2,4,8"
    )


def _add_checkpoint(add: Add) -> None:
    command = add("verify", checkpoint_commands.verify_command, "check what each serving stack computes from a config")
    command.add_argument("checkpoint", help=f"{CHECKPOINT}, made by yarn_tune or not")
    command.add_argument("--revision", help="revision of a hub id")
    command.add_argument("--for", dest="stacks", metavar="STACK,...", help="stacks to check, or `all`")
    command.add_argument("--all", action="store_true", help="print the versions of the stacks too, as Markdown")
    command.add_argument("--hf-overrides", metavar="JSON", help="check vLLM with these --hf-overrides")
    command.add_argument("--engine", choices=["vllm"], help="also run the real engine and compare log-probabilities")
    command.add_argument("--engine-python", metavar="PYTHON", help="Python with vLLM (default: $YARN_TUNE_VLLM_PYTHON)")
    command = add("push", checkpoint_commands.push_command, "upload an export or an adapter to the Hugging Face hub")
    command.add_argument("source", help="a run folder, an export or an adapter")
    command.add_argument("repo", help="ORG/NAME on the hub")
    command.add_argument("--adapter", action="store_true", help="upload the run's adapter instead of its export")
    command.add_argument("--base", metavar="ORG/NAME", help="the base on the hub, if the run used a local folder")
    command.add_argument("--revision", help="revision of the base that an adapter belongs to")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--message", default="Upload with yarn-tune", help="commit message")
    command.add_argument("--upload", action="store_true", help="upload; without it, only list what would be uploaded")


def _add_evaluation(add: Add) -> None:
    dtype = {"choices": ["bfloat16", "float32"], "default": "bfloat16", "help": "weights' dtype (default: bfloat16)"}
    command = add("eval", eval_commands.eval_command, "measure the NLL of a checkpoint by position")
    command.add_argument("checkpoint", help=CHECKPOINT)
    command.add_argument("documents", nargs="+", help="files, as in data.heldout")
    command.add_argument("--revision", help="revision of a hub id")
    command.add_argument("--length", type=int, required=True, help="tokens read of each document, from its beginning")
    command.add_argument("--count", type=int, default=4, help="largest number of documents (default: 4)")
    command.add_argument("--dtype", **dtype)  # type: ignore[arg-type]
    command.add_argument(
        "--protocol",
        choices=["truncate", "sliding"],
        default="truncate",
        help="one pass over these tokens, or a sliding window (docs/measuring.md)",
    )
    command.add_argument("--window", type=int, help="sliding: tokens per window (default: a quarter of --length)")
    command.add_argument(
        "--stride", type=int, help="sliding: tokens scored per window (default: 256, at most half a window)"
    )
    command.add_argument("--chunk", type=int, help="truncate: tokens per forward pass, over a KV cache")
    command = add("retrieve", eval_commands.retrieve_command, "measure needle retrieval by length and depth")
    command.add_argument("checkpoint", help=f"{CHECKPOINT} (with --engine vllm: the tokenizer)")
    command.add_argument("documents", nargs="+", help="files that the needles are hidden in")
    command.add_argument("--revision", help="revision of a hub id")
    command.add_argument("--lengths", required=True, metavar="N,N,...", help="tokens per prompt")
    command.add_argument(
        "--depths", default="0,0.25,0.5,0.75,1", metavar="D,D,...", help="place of the needle: 0 start, 1 end"
    )
    command.add_argument("--per-cell", type=int, default=4, help="prompts per length and depth (default: 4)")
    command.add_argument("--keys", type=int, default=1, help="needles per prompt; the question is about one")
    command.add_argument(
        "--tasks", default="needle", metavar="TASK,...", help="needle, values, variables, words (see eval.retrieval)"
    )
    command.add_argument(
        "--wording", choices=["plain", "demo"], help="wording of needles (default: that of the export's run, or plain)"
    )
    command.add_argument("--dtype", **dtype)  # type: ignore[arg-type]
    command.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="engine to query")
    command.add_argument("--url", default="http://127.0.0.1:8000", help="URL of an OpenAI-compatible server")
    command.add_argument("--served-name", metavar="NAME", help="the model's name there (default: CHECKPOINT)")
    command.add_argument("--picture", metavar="FILE.png", help="draw a heat map")
    command = add("lm-eval", eval_commands.lm_eval_command, "print the commands that run lm-evaluation-harness")
    command.add_argument("checkpoint", help="a checkpoint folder")
    command.add_argument("--tasks", default="niah_single_1,niah_single_2", help="names of lm-eval's tasks")
