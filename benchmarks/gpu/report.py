"""The report of a run in Markdown: three sentences, then a section per part."""

from typing import Any

from .context import Results


def text(results: Results) -> str:
    """The whole report."""
    parts = results.parts
    lines = ["# yarn_tune on a GPU", "", *three_sentences(parts), ""]
    for name, found in parts.items():
        lines += [f"## {name[0].upper()}{name[1:]}", ""]
        if "skipped" in found and isinstance(found["skipped"], str):
            lines += [f"Skipped: {found['skipped']}.", ""]
        elif "failed" in found:
            lines += [f"Failed: {found['failed']}", ""]
        else:
            lines += [*SECTIONS.get(name, plain)(found), ""]
        lines += [f"({found.get('wall_seconds', 0)} seconds)", ""]
    return "\n".join(lines)


def three_sentences(parts: dict[str, Any]) -> list[str]:
    """The three sentences that summarise the report."""
    where = parts.get("environment", {})
    first = f"Measured on {where.get('card', 'an unknown device')} with torch {where.get('torch', '?')}"
    first += " in miniature, which shows only that the code runs." if where.get("smoke") else "."
    tuned = parts.get("smollm2 at 4x", {}).get("like", {})
    second = "SmolLM2 at four times its window was not measured."
    if "tuned" in tuned:
        nll = {name: tuned[name]["nll"] for name in ("yarn", "native-window", "tuned") if name in tuned}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in nll.items())
        second = f"At four times the native window the mean NLL on held-out text is: {shown} (lower is better)."
    ratios = parts.get("cost of a step", {}).get("ratios", {})
    kept = {name: one for name, one in ratios.items() if name.startswith("kept, ")}
    third = "The cost of a step was not measured."
    if kept:
        name, one = next(iter(reversed(kept.items())))
        memory = f" and {one['prefills']} prefills of memory" if "prefills" in one else ""
        tokens = name.split(", ")[1]
        third = f"A step that keeps its activations takes {one['forwards']} forwards{memory} at {tokens} tokens."
    return [f"- {sentence}" for sentence in (first, second, third)]


def plain(found: dict[str, Any]) -> list[str]:
    """The keys and values of a part, one per line."""
    return [f"- {key}: {value}" for key, value in found.items() if key != "wall_seconds"]


def demo(found: dict[str, Any]) -> list[str]:
    """The demo's table beside that of a CPU."""
    rows = [[name, one["gpu"], one["cpu"]] for name, one in found["nll"].items()]
    more = plain({key: value for key, value in found.items() if key != "nll"})
    return [*table(["method", "here", "CPU, published"], rows), "", *more]


def window(found: dict[str, Any]) -> list[str]:
    """One window: every method on text like and unlike the training text."""
    rows = []
    for name, one in found["like"].items():
        other = found["unlike"].get(name, {})
        rows.append([name, one["nll"], other.get("nll"), one["short"], one["needles"]])
    titles = ["method", "NLL, text like training", "NLL, unlike", "short texts", "needles"]
    head = f"{found['window']} tokens, {found['tokens'] / 1e6:.2f}M tokens read, {found['seconds_per_step']} s per step"
    return [head, "", *table(titles, rows)]


def windows(found: dict[str, Any]) -> list[str]:
    """The sections of several windows."""
    return [line for one in found.values() if isinstance(one, dict) for line in [*window(one), ""]]


def cost(found: dict[str, Any]) -> list[str]:
    """Ways by lengths: time in forwards, memory in prefills, tokens per second."""
    names = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in found["cells"]))
    lengths = list(dict.fromkeys(name.rsplit(", ", 1)[1] for name in found["cells"]))
    rows = []
    for way in names:
        cells = [cell(found, f"{way}, {length}") for length in lengths]
        rows.append([way, *cells])
    return table(["way", *(f"{length} tokens" for length in lengths)], rows)


def cell(found: dict[str, Any], name: str) -> str:
    """One cell of the cost table."""
    one, ratio = found["cells"].get(name, {}), found.get("ratios", {}).get(name, {})
    if "seconds" not in one:
        return "out of memory" if one.get("out_of_memory") else ""
    shown = [f"{one['seconds']:.3f} s"]
    shown += [f"{ratio['forwards']}x"] if "forwards" in ratio else []
    shown += [f"{ratio['prefills']}x memory"] if "prefills" in ratio else []
    shown += [f"{one['share_of_peak']:.0%} of peak"] if "share_of_peak" in one else []
    return ", ".join(shown)


def planned(found: dict[str, Any]) -> list[str]:
    """The table of predicted and measured memory."""
    rows = [[n, c["predicted_mib"], c["measured_mib"], c.get("error")] for n, c in found["cells"].items()]
    return table(["cell", "predicted MiB", "measured MiB", "error"], rows)


def table(titles: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table; an empty cell where nothing was measured."""
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        shown = ["" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


SECTIONS = {
    "demo": demo,
    "smollm2 at 4x": window,
    "smollm2 at 2x and 8x": windows,
    "cost of a step": cost,
    "planned memory": planned,
}
"""Part -> its section; the others are shown as keys and values."""
