"""The structure of the sources: who imports whom, how long files and functions are, what is said.

Contains checks that read the sources; leaves out what imports cost (`test_imports`).
"""

import ast
import importlib
from pathlib import Path

import pytest

import smearlens

ROOT = Path(smearlens.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

every_source = pytest.mark.parametrize(
    "path", SOURCES, ids=lambda path: str(path.relative_to(ROOT))
)

# What each part of the package may import of the others: whole parts, or single modules.
MAY_IMPORT = {
    "nn": {"nn", "_hooks"},
    "analysis": {"analysis"},
    "data": {"data"},
    "models": {"models", "nn", "_hooks"},
    "causal": {"causal", "models.base", "analysis", "data", "_hooks"},
    "training": {"training", "models.base", "models.files", "data", "analysis", "_hooks"},
    "adapters": {"adapters", "analysis", "models"},  # weights become our models
    "viz": {"viz", "analysis"},
    "experiments": {
        "experiments", "viz", "training", "causal", "adapters", "models", "nn", "analysis", "data",
        "_hooks",
    },
    "cli": {"cli", "experiments"},
    "__main__": {"cli"},
    "_hooks": {"_hooks"},
    "_files": {"_files"},
    "_extras": {"_extras"},
    "_explain": {"_explain"},
    "_tracing": {"_tracing"},
    "__init__": set(),
}  # fmt: skip
ANYONE = {"_files", "_extras", "_explain", "_tracing"}

LAZY = {  # loaded by the function that uses it, so that nobody else waits for it
    "scipy", "matplotlib", "datasets", "pandas", "accelerate", "tokenizers", "circuitsvis", "wandb",
    "tensorboard", "trackio", "ray", "plotly", "huggingface_hub", "safetensors", "transformers",
    "sacrebleu", "sentence_transformers",
}  # fmt: skip

MAX_FILE, MAX_FUNCTION = 300, 40
LONGER_FILES: dict[str, str] = {}
LONGER_FUNCTIONS: dict[str, str] = {}


def part(path):
    """The part of the package a source belongs to: its folder, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree):
    """Absolute names of all modules that a source imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT.parent / whole.replace(".", "/")).with_suffix(".py").exists()
                yield node, whole if is_module else node.module


def at_import(tree):
    """The statements that run when a module is imported: not those inside functions."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += list(ast.iter_child_nodes(node))


def functions(tree):
    """Every function and method as (dotted name, node)."""

    def inside(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}".lstrip(".")
                if not isinstance(child, ast.ClassDef):
                    yield name, child
            yield from inside(child, name)

    return inside(tree, "")


def allowed(module, names):
    return any(module == name or module.startswith(f"{name}.") for name in names)


def takes_the_version_only(tree):
    """Whether `import smearlens` serves `smearlens.__version__` and nothing else."""
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "smearlens"
    }
    return used == {"__version__"}


@every_source
def test_imports_point_down(path):
    may = MAY_IMPORT[part(path)] | ANYONE
    tree = ast.parse(path.read_text())
    for node, module in imports(tree):
        if module.partition(".")[0] == "smearlens":
            target = module.removeprefix("smearlens").lstrip(".")
            here = f"line {node.lineno}: {part(path)} must not import {target or 'the package'}"
            assert allowed(target, may) if target else takes_the_version_only(tree), here


@every_source
def test_one_door_leads_to_transformer_lens(path):
    roots = {module.partition(".")[0] for _, module in imports(ast.parse(path.read_text()))}
    assert ("transformer_lens" in roots) == (path.name == "_hooks.py")


@every_source
def test_what_few_functions_need_is_imported_by_them(path):
    statements = [
        node
        for node in at_import(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    modules = {m for _, m in imports(ast.Module(statements, []))}
    assert not LAZY & {module.partition(".")[0] for module in modules}


@every_source
def test_a_source_opens_by_saying_what_it_contains(path):
    tree = ast.parse(path.read_text())
    said = ast.get_docstring(tree)
    assert said, "no docstring"
    assert isinstance(tree.body[0], ast.Expr)
    assert said.split("\n")[0].endswith((".", "?"))
    if path.name != "__init__.py" or len(tree.body) > 1:
        future = [n for n in tree.body if isinstance(n, ast.ImportFrom)][:1]
        assert [n.module for n in future] == ["__future__"]


@every_source
def test_files_and_functions_stay_short(path):
    name, text = str(path.relative_to(ROOT)), path.read_text()
    length = len(text.splitlines())
    assert (length > MAX_FILE) == (name in LONGER_FILES), f"{length} lines"
    for function, node in functions(ast.parse(text)):
        said = node.body[0] if ast.get_docstring(node) else None
        size = node.end_lineno - node.lineno + 1
        size -= 0 if said is None else said.end_lineno - said.lineno + 1
        key = f"{name}:{function}"
        assert (size > MAX_FUNCTION) == (key in LONGER_FUNCTIONS), f"{key}: {size} lines"


@every_source
def test_the_library_prints_nothing(path):
    called = [
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert path.name == "cli.py" or not {"print", "breakpoint", "input"} & set(called)


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if part(path) not in ("training", "experiments")],  # own a process
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_seeds_the_global_generators(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.manual_seed", "random.seed", "np.random.seed"), node.lineno


def test_exceptions_to_the_limits_still_exist():
    assert all((ROOT / name).exists() for name in LONGER_FILES)
    assert {part(path) for path in SOURCES} <= set(MAY_IMPORT)
    assert not list(ROOT.rglob("utils.py"))


def test_folders_hold_few_files():
    folders = {path.parent for path in SOURCES}
    assert all(len(path.relative_to(ROOT).parts) <= 3 for path in SOURCES), "two levels of folders"
    counts = {folder.name: len(list(folder.glob("*.py"))) - 1 for folder in folders}
    assert max(counts.values()) <= 16, counts


@pytest.mark.parametrize("name", smearlens.__all__)
def test_every_public_name_is_found_and_documented(name):
    value = getattr(smearlens, name)
    module = importlib.import_module(value.__module__)
    assert getattr(module, name) is value
    said = value.__doc__
    assert said
    assert not said.startswith(f"{name}("), "a dataclass says only its fields"
    assert said.strip().split("\n")[0].endswith((".", ":"))


def test_the_package_lists_its_names_and_has_no_others():
    assert sorted(smearlens.__all__) == smearlens.__all__
    assert len(set(smearlens.__all__)) == len(smearlens.__all__)
    assert set(smearlens.__all__) <= set(dir(smearlens))
    with pytest.raises(AttributeError, match="has no attribute 'induction'; it has"):
        _ = smearlens.induction
    with pytest.raises(ImportError, match="cannot import name 'Induction'"):
        exec("from smearlens import Induction")
