"""Measure the time and memory of reading documents, relative to reading the bytes of their files.

There are two collections of pseudo-random words as JSON lines: many short documents, and few long ones. For each
collection, the file is read as bytes, and rows are built in separate processes: for the first time (documents are
checked, tokenized, packed and cached), again from the cache, and without a cache for a hundredth of the text.

    python benchmarks/documents.py --out benchmarks/results/documents.json
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BASE = Path(__file__).parents[1] / "data" / "tiny-base"
ROW_TOKENS = 2048
WORDS = 20_000


def write(path: Path, documents: int, words: int) -> None:
    """Write JSON lines of `documents` texts of `words` words each."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(WORDS)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(rng.choices(vocabulary, k=words))}) + "\n")


def measure(path: Path, share: float) -> dict[str, Any]:
    """Build rows from a share of the text; returns seconds, tokens, and the process's growth in bytes per token."""
    from yarn_tune.data import RowRequest, build_rows
    from yarn_tune.models import BaseModel
    from yarn_tune.recipe import Base, Data

    base = BaseModel(Base(model=str(BASE), dtype="float32"))
    assert base.tokenizer is not None
    assert base.config is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    rows = int(share * path.stat().st_size / 2 / ROW_TOKENS) + 1  # more rows than there are, if `share` is 1
    found = build_rows(Data(train=[str(path)], heldout=[]), base, RowRequest(ROW_TOKENS, rows, 0))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with open("/proc/self/status", encoding="ascii") as status:
        held = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    kept = sum(row.tokens.nbytes for row in found.packed.rows)
    return {
        "seconds": round(seconds, 3),
        "documents": found.account.documents,
        "not_needed": found.account.unread,
        "tokens": found.account.tokens,
        "row_bytes_per_token": round(kept / found.account.tokens, 3),
        "peak_bytes_per_token": round(1024 * peak / found.account.tokens, 2),
        "process_mib": held // 1024,
    }


def in_its_own_process(path: Path, cache: Path, share: float) -> dict[str, Any]:
    """`measure` in a fresh process, so that its memory is its own."""
    command = [sys.executable, __file__, "--measure", str(path), "--share", str(share)]
    environment = os.environ | {"YARN_TUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def seconds_to_read(path: Path) -> float:
    """Seconds to read the bytes of a file that is in the page cache."""
    for _ in range(2):
        started = time.monotonic()
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    return time.monotonic() - started


def collection(name: str, documents: int, words: int) -> dict[str, Any]:
    """All measurements of one collection."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        write(path, documents, words)
        reading = seconds_to_read(path)
        result: dict[str, Any] = {"name": name, "bytes": path.stat().st_size, "seconds_to_read": round(reading, 4)}
        for label, cache, share in (("first", "a", 1.0), ("cached", "a", 1.0), ("a hundredth", "b", 0.01)):
            found = in_its_own_process(path, Path(folder) / cache, share)
            found["ratio_to_reading"] = round(found["seconds"] / reading, 1)
            found["microseconds_per_document"] = round(1e6 * found["seconds"] / documents, 2)
            result[label] = found
    return result


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results")
    parser.add_argument("--short", type=int, default=1_000_000, help="short documents (default: a million)")
    parser.add_argument("--long", type=int, default=1000, help="long documents (default: a thousand)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.share)))
        return
    results = [collection("short documents", options.short, 12), collection("long documents", options.long, 12_000)]
    text = json.dumps({"cpus": os.cpu_count(), "collections": results}, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
