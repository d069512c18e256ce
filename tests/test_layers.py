"""The layout of the package: which packages there are, who may import whom, and how large things may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "yarn_tune"
ORDER = (
    "version",
    "errors",
    "rope",
    "files",
    "recipe",
    "models",
    "data",
    "tunable",
    "distributed",
    "serving",
    "engines",
    "adapter",
    "runs",
    "training",
    "evaluation",
    "report",
    "export",
    "planning",
    "api",
    "cli",
    "__main__",
    "__init__",
)
"""Every package and every file beside them: each imports only from those above it."""
FILES = {"version", "errors", "rope", "files", "api", "__main__", "__init__"}
PATHS = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_PARAMETERS = 330, 7


def room(path: Path) -> str:
    """The package (or the file beside the packages) that a module belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[list[str], bool]]:
    """(dotted parts below `yarn_tune`, whether inside a function) of every relative import."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    folder = list(path.relative_to(PACKAGE).parts[:-1])
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - (node.level - 1)]
            named = node.module.split(".") if node.module else []
            modules = [named] if named else [[alias.name] for alias in node.names]
            found += [([*above, *module], id(node) in inside) for module in modules]
    return found


def test_every_package_is_in_the_order():
    assert sorted(ORDER) == sorted({room(path) for path in PATHS})


@pytest.mark.parametrize("path", PATHS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path):
    own = room(path)
    for parts, inside in imports(path):
        if parts[0] != own or own in FILES:
            assert ORDER.index(parts[0]) < ORDER.index(own), f"{path} imports {'.'.join(parts)}, which is below it"
            assert len(parts) == 1, f"{path} reaches into {'.'.join(parts)}: import from the package"
        assert not inside or own in ("cli", "__init__"), f"{path}: only cli imports inside functions"


@pytest.mark.parametrize("package", sorted({*ORDER} - FILES))
def test_packages_have_three_to_nine_modules_and_list_what_they_export(package):
    folder = PACKAGE / package
    assert 3 <= len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 9
    body = ast.parse((folder / "__init__.py").read_text()).body
    assert isinstance(body[0], ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) and node.level == 1 for node in body[1:-1])
    imported = [alias.name for node in body[1:-1] for alias in node.names]
    assert isinstance(body[-1], ast.Assign)
    assert sorted(ast.literal_eval(body[-1].value)) == sorted(imported)
    modules = {path.stem for path in folder.glob("*.py")}
    assert not modules & {*imported} - {"main"}, "an exported name hides a module of the same name"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_signatures_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name not in LONG:
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([each for each in given if each.arg not in ("self", "cls")])
            assert count <= MOST_PARAMETERS, f"{path.name}: {node.name} has {count} parameters"


LONG = {"_create_and_replace"}
"""Functions with more parameters: PEFT prescribes these."""
