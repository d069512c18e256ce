"""Run the parts in order of value within a time budget; write results and the report after each."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import cost, report, training
from .context import Context, PartSkipped, Results

ROOT = Path(__file__).parents[2]
PARTS = (
    ("environment", training.environment, 0),
    ("demo", training.demo, 45),
    ("smollm2 at 4x", training.window_4x, 60),
    ("cost of a step", cost.step_cost, 30),
    ("attention kernel", cost.attention_kernel, 10),
    ("planned memory", cost.planned_memory, 5),
    ("smollm2 at 2x and 8x", training.windows_2x_and_8x, 60),
    ("torch.compile", cost.compiled, 30),
    ("seeds and LoRA", training.seeds_and_lora, 60),
    ("accelerate launch", training.launched, 40),
)
"""Name of a part, its function, and the seconds that must be left to start it; the most valuable part first."""


def main() -> int:
    """Run all parts; the exit code is 1 if a part failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder for results.json, report.md and pictures")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget (default: 8)")
    parser.add_argument("--base", type=Path, default=ROOT / "data/smollm2/SmolLM2-135M-Instruct")
    parser.add_argument("--gguf", type=Path, help="make the base from this SmolLM2-135M GGUF file")
    parser.add_argument("--documents", type=Path, default=ROOT / "data/public-domain")
    parser.add_argument("--smoke", action="store_true", help="every part in miniature, on any device")
    parser.add_argument("--only", help="run the parts whose names contain this")
    options = parser.parse_args()
    if options.out is None and not options.smoke:
        parser.error("name a folder for the results, or give --smoke")
    out = options.out or Path(tempfile.mkdtemp(prefix="gpu-smoke-"))
    out.mkdir(parents=True, exist_ok=True)
    base = made_base(options.gguf, out) if options.gguf and not options.smoke else options.base
    context = Context(
        out=out.resolve(), deadline=time.monotonic() + 60 * options.minutes, base=base.resolve(),
        documents=options.documents.resolve(), smoke=options.smoke,
    )  # fmt: skip
    results = run_parts(context, options.only)
    print(report.text(results))
    print(f"\nresults  {out / 'results.json'}\nreport   {out / 'report.md'}")
    return int(any("failed" in one for one in results.parts.values()))


def run_parts(context: Context, only: str | None) -> Results:
    """Run the parts for which there is enough time."""
    results = Results()
    for name, part, least in PARTS:
        if only is not None and only not in name:
            continue
        left = context.deadline - time.monotonic()
        started = time.monotonic()
        print(f"== {name} ({left:.0f} seconds left)", file=sys.stderr, flush=True)
        try:
            if left < least and not context.smoke:
                raise PartSkipped(f"{left:.0f} seconds were left, and it needs at least {least}")
            found = part(context, results)
        except PartSkipped as reason:
            found = {"skipped": str(reason)}
        except Exception as error:  # an error in one part must not stop the others
            found = {"failed": f"{type(error).__name__}: {error}"}
            print(found["failed"], file=sys.stderr)
        results.parts[name] = found | {"wall_seconds": round(time.monotonic() - started, 1)}
        (context.out / "results.json").write_text(json.dumps(results.parts, indent=1) + "\n")
        (context.out / "report.md").write_text(report.text(results))
    return results


def made_base(gguf: Path, out: Path) -> Path:
    """The base made from a local GGUF file."""
    target = out / "SmolLM2-135M-Instruct"
    if not target.exists():
        script = ROOT / "data/smollm2/prepare.py"
        subprocess.run([sys.executable, script, "--gguf", str(gguf), "--out", str(target)], check=True)
    return target


if __name__ == "__main__":
    sys.exit(main())
