"""Kill a run again and again, at random moments and while it writes, until it is through.

    python tests/launch/kills.py --kills 200 --processes 1 FOLDER RECIPE [key=value ...]

Prints one JSON object: kills by where they hit, and whether the end is that of a run that was never killed, to the bit.
Processes are forked from this one, which has imported everything and computed nothing, so a start takes a moment; what
kills them is SIGKILL. `--export` kills exports of the finished run instead, and looks at the folder after each.
`--operations` kills before every operation on a file of the run folder, one run (or export) each; `--every N` before
each N-th.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401  (what a training imports must be here before the first fork)
from accelerate import Accelerator  # noqa: F401
from yarn_tune.export.checkpoint import export
from yarn_tune.recipe.loading import load_recipe
from yarn_tune.recipe.schema import Recipe
from yarn_tune.runs.checkpoint import latest_state
from yarn_tune.runs.folder import Run
from yarn_tune.training.loop import train


def forked(work, rank: int, processes: int, port: int, log: Path) -> int:
    """A process that does `work` and nothing else; its pid."""
    pid = os.fork()
    if pid:
        return pid
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if processes > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), **address}
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "os.chmod"}
"""Audit events of Python that are operations on a file or folder."""


def die_at(number: int, folder: Path, count: Path | None = None) -> None:
    """Kill this process before its `number`-th operation in the folder; with `count`, note the operations there."""
    done, place = 0, str(folder)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        if event not in OPERATIONS or not str(arguments[0]).startswith(place):
            return
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if count is not None:
            with open(count, "w") as file:
                file.write(str(done))

    sys.addaudithook(hook)


def dead(work, log: Path) -> bool:
    """Run `work` in a process that may kill itself; whether it did.

    Raises SystemExit if it failed otherwise.
    """
    _, status = os.waitpid(forked(work, 0, 1, 0, log), 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a process failed by itself: {code}; see {log}")
    return code != 0


def kill_operations(recipe: Recipe, folder: Path, every: int, exports: bool) -> dict[str, object]:
    """Kill before each operation on a file: training must continue to the same end, an export be whole or absent."""
    log, count = folder / "kills.log", folder / "count"
    whole = Run(recipe, folder / "whole")
    until(lambda: train(whole), 1, log, lambda: False)

    def work(run: Run, number: int) -> None:
        die_at(number, run.folder, count if number == 0 else None)
        (export if exports else train)(run)

    first = Run(recipe, folder / "counted")
    if exports:
        shutil.copytree(whole.folder, first.folder)
    dead(partial(work, first, 0), log)
    wanted, operations = digest(first.folder / "export"), int(count.read_text())
    kills, equal, found = 0, True, Counter[str]()
    for number in range(1, operations + 1, every):
        run = Run(recipe, folder / "broken")
        if exports:
            shutil.copytree(whole.folder, run.folder)
        kills += dead(partial(work, run, number), log)
        if exports:
            target = run.folder / "export"
            found["none" if not target.exists() else "whole" if digest(target) == wanted else "torn"] += 1
            dead(lambda run=run: export(run), log)
            equal = equal and digest(target) == wanted
        else:
            dead(lambda run=run: train(run), log)
            equal = equal and outcome(whole) == outcome(run)
        equal = equal and not [path for path in run.folder.rglob("*") if ".partial" in path.name]
        shutil.rmtree(run.folder)
    found_of = {"exports found": dict(found)} if exports else {}
    return {"operations": operations, "kills": kills, **found_of, "equal": equal}


def until(work, processes: int, log: Path, over) -> bool:
    """Run `work` in new processes until it ends or `over()` is true, then kill them; returns whether it ended."""
    port = free_port()
    pids = {forked(work, rank, processes, port, log) for rank in range(processes)}
    codes = []
    while pids:
        for pid in list(pids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pids.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
        if pids and over():
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            for pid in pids:
                os.waitpid(pid, 0)
            return False
        time.sleep(2e-4)  # leaves the processor to the processes
    if any(codes):
        raise SystemExit(f"a process failed by itself: {codes}; see {log}")
    return True


def writing(folder: Path) -> bool:
    """Whether something is half-written there now."""
    try:
        return any(".partial" in name for name in os.listdir(folder))
    except FileNotFoundError:
        return False


def digest(folder: Path) -> dict[str, str]:
    """Of every file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def outcome(run: Run) -> tuple[str, list[str]]:
    """What a run learned, and what it told of it."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    timed = ("seconds", "sha256")  # the checksum is over the seconds too
    told = [json.dumps({key: value for key, value in line.items() if key not in timed}) for line in lines]
    return hashlib.sha256(run.numbers_path.read_bytes()).hexdigest(), told


def kill_trainings(recipe: Recipe, folder: Path, kills: int, processes: int, rng: random.Random) -> dict[str, object]:
    """Half of the kills at random moments, half in the middle of a write, in as many runs as it takes."""
    whole, log = Run(recipe, folder / "whole"), folder / "kills.log"
    begun = time.monotonic()
    until(lambda: train(whole), processes, log, lambda: False)
    lasts = time.monotonic() - begun
    hits: Counter[str] = Counter()
    runs, starts, equal = 0, 0, True
    while hits.total() < kills:
        runs += 1
        broken = Run(recipe, folder / f"broken-{runs}")
        checkpoints, last, through = broken.folder / "checkpoints", 0, False
        while not through:
            starts += 1
            through = until(partial(train, broken), processes, log, moment(rng, lasts, checkpoints, hits, kills))
            state = latest_state(checkpoints)
            step = 0 if state is None else state.step
            if step < last:
                raise SystemExit(f"a kill went back from step {last} to {step}")
            last = step
            if not through:
                hits["a half-written checkpoint" if writing(checkpoints) else "steps" if step else "no step"] += 1
        equal = equal and outcome(whole) == outcome(broken)
    return {"processes": processes, "kills": hits.total(), "left behind": dict(hits), "runs": runs, "starts": starts,
            "equal": equal}  # fmt: skip


def moment(rng: random.Random, lasts: float, checkpoints: Path, hits: Counter[str], kills: int):
    """When to kill next: after a random time, or while one of the next checkpoints is being written."""
    at, in_a_write, skipped = time.monotonic() + rng.uniform(0.05, 0.8) * lasts, rng.random() < 0.5, rng.randrange(40)

    def over() -> bool:
        nonlocal skipped
        if hits.total() >= kills:
            return False
        if in_a_write:
            skipped -= writing(checkpoints)
            return skipped < 0
        return time.monotonic() > at

    return over


def kill_exports(run: Run, kills: int, rng: random.Random) -> dict[str, object]:
    """First with nothing there, then over an export that is there: it must stay whole all the time."""
    log, target = run.folder.parent / "kills.log", run.folder / "export"
    until(lambda: train(run), 1, log, lambda: False)
    begun = time.monotonic()
    until(lambda: export(run), 1, log, lambda: False)
    lasts, wanted = time.monotonic() - begun, digest(target)
    found: Counter[str] = Counter()
    for number in range(kills):
        if number == kills // 2:
            until(lambda: export(run), 1, log, lambda: False)
        elif number < kills // 2:
            for path in target.glob("*"):
                path.unlink()
            target.rmdir() if target.exists() else None
        until(lambda: export(run), 1, log, export_moment(rng, lasts, run.folder))
        state = "whole" if target.exists() and digest(target) == wanted else "none" if not target.exists() else "torn"
        found[f"{'first' if number < kills // 2 else 'over another'}: {state}"] += 1
    return {"kills": kills, "exports found": dict(found)}


def export_moment(rng: random.Random, lasts: float, folder: Path):
    """When to kill an export: at a random time, or when the file that is written last is there."""
    at, in_the_end = time.monotonic() + rng.uniform(0, 1.1) * lasts, rng.random() < 0.3
    return lambda: any(folder.glob(".export.*.partial/checksums.json")) if in_the_end else time.monotonic() > at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    recipe, rng = load_recipe(options.recipe, options.overrides), random.Random(options.seed)
    options.folder = options.folder.absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.operations:
        print(json.dumps(kill_operations(recipe, options.folder, options.every, options.export)))
    elif options.export:
        print(json.dumps(kill_exports(Run(recipe, options.folder / "whole"), options.kills, rng)))
    else:
        print(json.dumps(kill_trainings(recipe, options.folder, options.kills, options.processes, rng)))


if __name__ == "__main__":
    sys.exit(main())
