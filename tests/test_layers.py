"""The house: which modules there are, and who may import whom (only from above)."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "yarn_tune"
ORDER = (
    "errors",
    "rope",
    "base_scaling",
    "schema",
    "sections",
    "checks",
    "recipe",
    "packing",
    "positions",
    "families",
    "models",
    "queries",
    "lora",
    "gains",
    "learned",
    "standin",
    "tunable",
    "objectives",
    "teacher",
    "lessons",
    "longrows",
    "documents",
    "data",
    "runtime",
    "sharding",
    "perplexity",
    "retrieval",
    "heldout",
    "needles",
    "batches",
    "interrupts",
    "serving",
    "serving.readers",
    "serving.rules",
    "serving.stacks",
    "serving.folding",
    "serving.carriers",
    "serving.profiles",
    "serving.page",
    "serving.gguf",
    "serving.verification",
    "serving.vllm_child",
    "serving.engines",
    "checkpoint",
    "metrics",
    "adapter_config",
    "adapter",
    "adapter_files",
    "earlier",
    "train",
    "cost",
    "plan",
    "init",
    "fidelity",
    "export",
    "measure",
    "recall",
    "results",
    "compare",
    "sweep",
    "card",
    "push",
    "shipped",
    "api",
    "report",
    "measuring",
    "commands",
    "cli",
    "__main__",
    "__init__",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) if len(parts) > 1 and parts[-1] == "__init__" else ".".join(parts)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module of ours, whether inside a function) for every relative import."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found = []
    own = module_name(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = own[: len(own) - (node.level - 1)]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(".".join([*base, module]), id(node) in inside) for module in modules]
    return found


def test_every_module_has_its_floor():
    assert sorted(ORDER) == sorted(module_name(path) for path in PACKAGE.rglob("*.py"))


def test_imports_go_up_only():
    for path in PACKAGE.rglob("*.py"):
        name = module_name(path)
        for imported, _ in imports(path):
            assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}"


def test_only_the_command_line_imports_inside_functions():
    for path in PACKAGE.rglob("*.py"):
        if module_name(path) not in ("cli", "commands", "measuring"):
            assert not [imported for imported, inside in imports(path) if inside], path


def test_modules_stay_small():
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 330, f"{path.name} has {lines} lines"
