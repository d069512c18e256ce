"""Damage files of a run folder, an adapter, an export and the caches; count the damage that no command detects.

    python benchmarks/damage.py --tries 400 --out benchmarks/results/damage.json

One small run is trained, compared and exported as the reference. In each try one file of a copy is damaged at a random
place (a bit is flipped, the end is cut off, bytes are zeroed, or the file is removed), and the commands that read it
run in this process. A try fails if a command ends with a traceback, or with exit code 0 and numbers that differ from
the reference. It passes if a command ends with a message and exit code 2 or 3, or if the numbers are the same (because
they were measured again, or the damaged part is not read).
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_tune.cli.main import main as yarn_tune

KINDS = ("flip", "cut", "zero", "remove")
PICTURES = (".png", ".md")
"""Written for people; no command reads them, except those of an export, which `verify` checks."""


@dataclass(frozen=True)
class Result:
    """The outcome of one command."""

    code: int | str
    """Exit code, or the name of an exception that came out."""
    value: dict[str, Any]
    stderr: str


def command(*arguments: str) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: int | str = yarn_tune([*arguments, "--json"])
        except BaseException as error:  # noqa: BLE001  (whatever comes out is what is counted)
            code, text = type(error).__name__, traceback.format_exc()
            err.write(text)
    lines = out.getvalue().strip().splitlines()
    return Result(code, json.loads(lines[-1]) if code in (0, 3) and lines else {}, err.getvalue())


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float | str]]:
    """Every number of a command's result, without times and places on disk."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if "seconds" not in str(key) and key != "trained":  # a run that continues trains, a finished one does not
                yield from numbers(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from numbers(inner, f"{path}[{place}]")
    elif isinstance(value, float):
        yield path, round(value, 6)  # the same measured again: sums may differ in the last digits
    elif isinstance(value, int):
        yield path, float(value)


def learned_digest(folder: Path) -> list[tuple[str, str]]:
    """Digests of the files of an export that a server loads: weights, config and tokenizer."""
    files = [folder / "export" / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    return [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files if path.is_file()]


def damage(path: Path, kind: str, rng: random.Random) -> None:
    """Change one file at a random place."""
    content = bytearray(path.read_bytes())
    if kind == "remove" or not content:
        path.unlink()
    elif kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        begin = rng.randrange(len(content))
        end = min(len(content), begin + rng.choice([1, 16, 512]))
        content[begin:end] = bytes(end - begin)
        path.write_bytes(content)


@dataclass(frozen=True)
class World:
    """The undamaged run, and the results of its commands."""

    home: Path
    commands: dict[str, Callable[[], Result]]
    truth: dict[str, list[tuple[str, float | str]]]

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.home / "runs" / "small"

    def observe(self, name: str) -> tuple[Result, list[tuple[str, float | str]]]:
        """Run a command; returns its result and every number in it."""
        done = self.commands[name]()
        found: list[tuple[str, float | str]] = list(numbers(done.value))
        if name in ("export", "export adapter") and done.code == 0:
            found += learned_digest(self.run if name == "export" else self.run / "adapter")
        return done, found

    def targets(self) -> list[Path]:
        """Every file that a command may read."""
        found = [path for path in self.home.rglob("*") if path.is_file() and not path.is_symlink()]
        inputs = (self.home / "base", self.home / "recipe.yaml", self.home / "documents")
        kept = [path for path in found if not any(path.is_relative_to(place) for place in inputs)]
        return sorted(p for p in kept if p.name != ".lock" and ("export" in p.parts or p.suffix not in PICTURES))


def commands(run: Path) -> dict[str, Callable[[], Result]]:
    """The commands that read a finished run, by name."""
    return {
        "train": lambda: command("train", str(run)),
        "compare": lambda: command("compare", str(run)),
        "export": lambda: command("export", str(run)),
        "export adapter": lambda: command("export", str(run / "adapter")),
        "verify": lambda: command("verify", str(run / "export")),
        "push": lambda: command("push", str(run), "lab/small", "--base", "lab/base"),
    }


READERS = {
    "adapter": ("export adapter",), "export": ("verify", "push"), "checkpoints": ("train",), "nll": ("compare",),
    "tokens": ("train", "compare"), "digests": ("compare",), "metrics.jsonl": ("compare", "train"),
    "recipe.yaml": ("export", "compare"), "learned.safetensors": ("export",), "learned.json": ("compare",),
    "compare.json": ("export",), "retrieval.json": ("compare",), "earlier.json": ("compare",),
}  # fmt: skip
"""Part of a path -> the commands that read such files."""


def readers(path: Path, home: Path) -> tuple[str, ...]:
    """The commands that read a file."""
    parts = path.relative_to(home).parts
    return next((names for part, names in READERS.items() if part in parts), ("export", "compare"))


def build(home: Path, recipe: Path) -> World:
    """Train, compare and export the run, and record the results of its commands."""
    os.environ["YARN_TUNE_CACHE"] = str(home / "cache")
    os.chdir(home)
    run = home / "runs" / "small"
    for arguments in (("train", str(recipe)), ("compare", str(run)), ("export", str(run)),
                      ("export", str(run / "adapter"))):  # fmt: skip
        done = command(*arguments)
        if done.code != 0:
            raise SystemExit(f"{arguments}: {done.stderr}")
    world = World(home, commands(run), {})
    for name in world.commands:
        done, found = world.observe(name)
        if done.code != 0:
            raise SystemExit(f"{name}: {done.stderr}")
        world.truth[name] = found
    return world


def unfinished(path: Path, world: World) -> bool:
    """Whether `train` reads this file only in an unfinished run."""
    return "checkpoints" in path.parts or path.name == "metrics.jsonl"


def attempt(world: World, seed: int) -> dict[str, Any]:
    """Damage one file and run the commands that read it; returns their outcome."""
    rng = random.Random(seed)
    path, kind = rng.choice(world.targets()), rng.choice(KINDS)
    names = readers(path, world.home)
    if path.name == "metrics.jsonl":  # read by a run that continues, and by a comparison of a finished one
        names = (rng.choice(names),)
    whole = world.home.with_name("whole")
    shutil.copytree(world.home, whole, symlinks=True)
    found: dict[str, Any] = {"seed": seed, "file": str(path.relative_to(world.home)), "damage": kind}
    try:
        damage(path, kind, rng)
        if "train" in names and unfinished(path, world):
            (world.run / "learned.safetensors").unlink(missing_ok=True)
            newest = max((world.run / "checkpoints").glob("step-*"), key=lambda p: p.name, default=None)
            if newest is not None and newest not in path.parents:
                shutil.rmtree(newest)
        for name in names:
            done, values = world.observe(name)
            found[name] = done.code
            if isinstance(done.code, str) or "Traceback" in done.stderr:
                return found | {"verdict": "traceback", "said": done.stderr[-1500:]}
            if done.code == 0 and (wrong := different(values, world.truth[name])):
                return found | {"verdict": "believed", "numbers": wrong[:5]}
        refused = any(found[name] for name in names)
        return found | {"verdict": "refused" if refused else "unharmed"}
    finally:
        shutil.rmtree(world.home)
        whole.rename(world.home)
        os.chdir(world.home)


def different(found: list[tuple[str, float | str]], truth: list[tuple[str, float | str]]) -> list[str]:
    """The values that differ from the reference; numbers may differ by rounding."""
    expected = dict(truth)
    wrong = []
    for name, value in found:
        near = isinstance(value, float) and isinstance(expected.get(name), float)
        same = abs(value - expected[name]) <= 1e-5 if near else value == expected.get(name)  # type: ignore[operator]
        if not same:
            wrong.append(f"{name}: {value} instead of {expected.get(name)}")
    return wrong + [f"{name}: missing" for name in {*expected} - {name for name, _ in found}]


def tried(home: Path, recipe: Path, seeds: range) -> list[dict[str, Any]]:
    """One attempt per seed on the run that `recipe` makes in the folder `home`."""
    before = Path.cwd()
    try:
        world = build(home, recipe)
        return [attempt(world, seed) for seed in seeds]
    finally:
        os.chdir(before)


def small_recipe(home: Path) -> Path:
    """The demo's tiny random base and documents."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import yaml
    from tiny import recipe_tree, save_tiny

    (home / "documents").mkdir(parents=True)
    tree = recipe_tree(save_tiny(home / "base"), home / "documents", steps=4, checkpoint_every=1, keep_checkpoints=3)
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def main() -> None:
    """Try, print the counts, and write every failed try and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=400)
    parser.add_argument("--first", type=int, default=0, help="seed of the first try")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out and options.out.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch).resolve() / "home"
        found = tried(home, small_recipe(home), range(options.first, options.first + options.tries))
    counts = Counter(each["verdict"] for each in found)
    by_damage = {kind: Counter(e["verdict"] for e in found if e["damage"] == kind) for kind in KINDS}
    failed = [each for each in found if each["verdict"] in ("traceback", "believed")]
    report = {
        "tries": len(found),
        "verdicts": dict(counts),
        "by_damage": {kind: dict(each) for kind, each in by_damage.items()},
        "files": len({each["file"] for each in found}),
        "failed": failed,
    }
    print(json.dumps(report, indent=1))
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
