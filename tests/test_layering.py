"""House rules that a machine can hold: who imports whom, sizes, no prints, no bare except, imports without effects."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "data", "utils")
PROJECT = (*PACKAGES, "main", "main_eval", "inference", "tools", "tests", "hubconf", "categories101_train_val_split")
COMMAND_LINE_FILES = ("main.py", "main_eval.py", "categories101_train_val_split.py", "tools/")
# Who may import whom: importer -> what it may import of ours besides its own package. The longest prefix counts.
MAY_IMPORT = {
    "models": (),
    "data": ("utils.config", "utils.runtime", "utils.errors"),
    "utils.errors": (),
    "utils.config": ("utils.errors",),
    "utils.runtime": ("utils.config", "utils.errors"),
    "utils.training": ("utils.runtime", "utils.config", "utils.errors"),
    "utils.checkpoint": ("utils.training", "utils.runtime", "utils.config", "utils.errors"),
    "utils.session": ("utils",),
    "utils.assembly": ("utils", "data", "models"),
    "utils": (),
}

FOLDERS = [ROOT / name for name in (*PACKAGES, "tools", "tests")]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in folder.rglob("*.py"))]
)
SOURCES = [name for name in FILES if not name.startswith("tests/")]
PACKAGE_FILES = [name for name in SOURCES if name.split("/")[0] in PACKAGES]


def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), filename=name)


def imported_modules(name: str) -> set[str]:
    """Return the absolute names of all modules that a file imports, wherever in the file."""
    package = name.split("/")[:-1]
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found.update({module} if node.module else {f"{module}.{alias.name}" for alias in node.names})
    return found


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def may_import(importer: str, module: str) -> bool:
    """Whether the package file ``importer`` (a dotted name) may import the project's module."""
    own = max((package for package in MAY_IMPORT if inside(importer, package)), key=len)
    return any(inside(module, package) for package in (own, *MAY_IMPORT[own]))


FACES = ("utils.config", "utils.runtime", "utils.training", "utils.checkpoint", "data", "models.fast")


def behind_a_face(importer: str, module: str) -> bool:
    """Whether the module lies inside a package with a face, and the importer outside of it."""
    return any(module.startswith(f"{face}.") and not inside(importer, face) for face in FACES)


@pytest.mark.parametrize("name", SOURCES)
def test_code_outside_a_package_imports_from_its_face(name):
    importer = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    assert [module for module in sorted(imported_modules(name)) if behind_a_face(importer, module)] == []


@pytest.mark.parametrize("name", PACKAGE_FILES)
def test_who_may_import_whom(name):
    importer = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    modules = {module for module in imported_modules(name) if module.split(".")[0] in PROJECT}
    assert [module for module in sorted(modules) if not may_import(importer, module)] == []


def test_config_needs_no_torch():
    for name in (name for name in PACKAGE_FILES if name.startswith("utils/config/")):
        roots = {module.split(".")[0] for module in imported_modules(name)}
        assert roots & {"torch", "numpy", "timm", "torchvision"} == set(), name


def test_who_may_import_whom_is_decided_by_the_longest_prefix():
    assert may_import("utils.runtime.start", "utils.config")
    assert not may_import("utils.runtime.start", "utils.training.guard")
    assert not may_import("utils.config.loading", "utils.runtime.files")
    assert not may_import("data.build", "utils.training.guard")
    assert not may_import("models.blocks", "utils.errors")


def test_the_model_package_imports_itself_relatively():
    """It is installed under another name (strip_mlp), so that ``models`` must not occur in its imports."""
    for name in (name for name in PACKAGE_FILES if name.startswith("models/")):
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.ImportFrom):
                assert node.level or node.module.split(".")[0] != "models", f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", SOURCES)
def test_sizes_of_functions(name):
    for node in ast.walk(tree_of(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno
            assert length <= 50, f"{name}: {node.name} has {length} lines"
            positional = len(node.args.posonlyargs) + len(node.args.args)
            assert positional <= 7, f"{name}: {node.name} takes {positional} positional arguments"


@pytest.mark.parametrize("name", FILES)
def test_habits(name):
    for node in ast.walk(tree_of(name)):
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{place}: bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{place}: {node.func.id}"
            if node.func.id == "print":
                assert name.startswith((*COMMAND_LINE_FILES, "tests/")), f"{place}: print; use the logger"
    if name != "tests/test_layering.py":
        assert not re.search(r"#.*\b(TODO|FIXME|XXX)\b", (ROOT / name).read_text()), f"{name}: unfinished business"


@pytest.mark.parametrize("name", SOURCES)
def test_only_tests_import_from_tests(name):
    assert [module for module in sorted(imported_modules(name)) if inside(module, "tests")] == []


@pytest.mark.parametrize("name", PACKAGE_FILES)
def test_imports_do_nothing(name):
    """A module's body defines; a bare call there (seeding, filtering warnings, printing) would be an effect."""
    statements = [node for node in tree_of(name).body if isinstance(node, ast.Expr)]
    calls = [node.lineno for node in statements if isinstance(node.value, ast.Call)]
    assert calls == [], f"{name}: calls at import in lines {calls}"


@pytest.mark.parametrize("name", SOURCES)
def test_documented(name):
    assert ast.get_docstring(tree_of(name)), f"{name} has no docstring that states its purpose"
