"""The command line: parse, call one function, print.

Exit codes: 0 fine, 2 the user's mistake, 3 a check that failed, 128 + n stopped by signal n, 1 our fault. With `--json`
one JSON object goes to stdout; progress and logs always go to stderr.
"""

import argparse
import contextlib
import errno
import json
import sys
from collections.abc import Callable

from ..errors import CheckFailed, Interrupted, UserError
from . import eval_commands as measuring
from . import run_commands as commands
from .eval_commands import Result


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], Result] = options.command
    try:
        # DeepSpeed logs to stdout when it is imported, which would spoil the one JSON object there.
        with contextlib.redirect_stdout(sys.stderr):
            text, value = command(options)
    except UserError as error:
        print(f"yarn-tune: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"yarn-tune: {error}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print("yarn-tune: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"yarn-tune: {error}; what was saved before is kept: make room, and run it again", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"yarn-tune: check failed: {error}", file=sys.stderr)
        return 3
    if commands.is_main_process():
        print(json.dumps(value) if options.json else text)
    return 0 if value.get("passed", True) else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="yarn-tune", description="Extend the window of a frozen RoPE model.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return command

    command = add("recipes", commands.recipes_command, "the recipes that come with yarn_tune")
    command.add_argument("--copy", metavar="NAME", help="put one here, with its files")
    command = add("init", commands.init_command, "write a first recipe for a model, from its config")
    command.add_argument("model", help="a checkpoint folder or hub id")
    command.add_argument("--window", type=int, required=True, help="tokens to be served")
    command.add_argument("--train", nargs="+", required=True, metavar="FILE", help="as data.train")
    command.add_argument("--heldout", nargs="+", required=True, metavar="FILE", help="as data.heldout")
    command.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB", help="of one device (default: 80)")
    command.add_argument("--gpus", type=int, default=1, help="devices (default: 1)")
    command.add_argument("--revision", help="of a hub id")
    command.add_argument("--out", metavar="FILE", help="where to write it (default: <name>.yaml)")
    for name, function, text in (
        ("plan", commands.plan_command, "what a run will read, cover and cost; trains nothing"),
        ("train", commands.train_command, "learn; continues by itself where an interrupted run stopped"),
        ("export", commands.export_command, "write the checkpoint to serve, reload it and compare"),
        ("run", commands.run_command, "train, compare, export and report"),
    ):
        command = add(name, function, text)
        command.add_argument("recipe", help="a recipe (.yaml) or a run folder")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="as in train.steps=50")
        if name == "export":
            command.add_argument("--for", dest="stacks", metavar="STACK,...", help="as export.stacks")
            command.add_argument("--fold", choices=["auto", "never", "always"], help="as export.fold")
            command.add_argument("--overrides-only", action="store_true", help="only the JSON for --hf-overrides")
            command.add_argument("--gguf", metavar="FILE", help="also write a GGUF for llama.cpp (Llama-type models)")
            command.add_argument("--converter", metavar="PATH", help="llama.cpp's checkout or script (LLAMA_CPP)")
            command.add_argument("--outtype", default="f16", help="of the GGUF's weights, as the converter takes it")
    command = add("verify", commands.verify_command, "what each serving stack will make of a checkpoint's config")
    command.add_argument("checkpoint", help="a checkpoint folder or hub id, ours or not")
    command.add_argument("--for", dest="stacks", metavar="STACK,...", help="stacks to check, or `all`")
    command.add_argument("--engine", choices=["vllm"], help="also run the real engine beside transformers")
    command.add_argument("--engine-python", metavar="PYTHON", help="interpreter that has it (YARN_TUNE_VLLM_PYTHON)")
    command = add("compare", commands.compare_command, "measure every method on the held-out documents")
    command.add_argument("recipe", help="a recipe (.yaml) or a run folder: the base, the documents, the lengths")
    command.add_argument("others", nargs="*", metavar="RUN|CHECKPOINT|key=value", help="more rows; settings")
    command.add_argument("--factors", metavar="F,F,...", help="also method x factor x PPL rise, as in 2,4,8")
    command = add("eval", measuring.eval_command, "NLL of a checkpoint by position")
    command.add_argument("checkpoint", help="a checkpoint folder or hub id")
    command.add_argument("documents", nargs="+", help="files, as in data.heldout")
    command.add_argument("--length", type=int, required=True, help="tokens an excerpt")
    command.add_argument("--count", type=int, default=4, help="excerpts")
    command.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    command.add_argument(
        "--protocol", choices=["truncate", "sliding"], default="truncate", help="see docs/measuring.md"
    )
    command.add_argument("--window", type=int, help="sliding: tokens a window (default: a quarter of --length)")
    command.add_argument("--stride", type=int, help="sliding: tokens scored a window (default: 256, or half of one)")
    command.add_argument("--chunk", type=int, help="tokens a forward pass, over a KV cache")
    command = add(
        "retrieve", measuring.retrieve_command, "hide numbers in documents and ask for them, by length and depth"
    )
    command.add_argument("checkpoint", help="a checkpoint folder or hub id (with --engine vllm: its tokenizer)")
    command.add_argument("documents", nargs="+", help="files to hide them in")
    command.add_argument("--lengths", required=True, metavar="N,N,...", help="of the prompts, in tokens")
    command.add_argument("--depths", default="0,0.25,0.5,0.75,1", metavar="D,D,...")
    command.add_argument("--per-cell", type=int, default=4, help="prompts for each length and depth")
    command.add_argument("--keys", type=int, default=1, help="needles a prompt")
    command.add_argument("--wording", choices=["plain", "demo"], default="plain")
    command.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    command.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    command.add_argument("--url", default="http://127.0.0.1:8000", help="of a running OpenAI-compatible server")
    command.add_argument("--served-name", metavar="NAME", help="the model's name there (default: CHECKPOINT)")
    command.add_argument("--picture", metavar="FILE.png", help="write a heat map")
    command = add("push", commands.push_command, "upload an export or an adapter to the Hugging Face hub")
    command.add_argument("source", help="a run folder, an export or an adapter")
    command.add_argument("repo", help="org/name on the hub")
    command.add_argument("--adapter", action="store_true", help="of a run folder, the adapter instead of the export")
    command.add_argument("--base", metavar="ORG/NAME", help="the base on the hub, where the run had it in a folder")
    command.add_argument("--private", action="store_true", help="where the repository is new")
    command.add_argument("--message", default="Upload with yarn-tune", help="of the commit")
    command.add_argument("--upload", action="store_true", help="do it; without, it only says what it would upload")
    command = add(
        "lm-eval", measuring.lm_eval_command, "print the commands that run lm-evaluation-harness on a checkpoint"
    )
    command.add_argument("checkpoint", help="a checkpoint folder")
    command.add_argument("--tasks", default="niah_single_1,niah_single_2", help="as lm-eval names them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
