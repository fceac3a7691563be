"""How the code is laid out: imports run one way, every package ships, everything is explained."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "softvq").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Each may import what stands before it, and itself.
LAYERS = [
    {"softvq.kernels"},
    {"softvq", "softvq.checks", "softvq.precise", "softvq.functional"},
    {"softvq.losses", "softvq.metrics", "softvq.distributed", "softvq.schedules", "softvq.data"},
    {"softvq.quantizers"},
    {"softvq.models"},
    {"softvq.training"},
    {"softvq.cli", "softvq.__main__"},
]


def name_of(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return module.replace("kernels", "softvq.kernels", 1) if module[0] == "k" else module


def layer_of(module):
    part = ".".join(module.split(".")[:2])
    return next(level for level, names in enumerate(LAYERS) if part in names)


def imports_of(path):
    """Everything of this project that a file imports, wherever in the file."""
    modules = {name_of(other) for other in FILES} | {"softvq.kernels"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [part if part in modules else node.module for part in parts]
        yield from (name for name in names if name.split(".")[0] in ("softvq", "kernels"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path):
    for module in imports_of(path):
        assert layer_of(module) <= layer_of(name_of(path)), f"{name_of(path)} imports {module}"


def test_the_scan_sees_imports():
    assert "softvq.kernels.reference" in set(imports_of(ROOT / "softvq" / "functional.py"))
    assert "softvq" in set(imports_of(ROOT / "softvq" / "cli.py"))


def test_kernels_is_not_a_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_plain_checkout_has_its_kernels(tmp_path):
    code = (
        "import softvq, softvq.kernels.reference as r, sys; print(r.__file__);"
        "assert 'kernels' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "reference.py"


def test_what_writes_no_settings_does_without_tomli_w():
    code = (
        "import runpy, sys; sys.modules['tomli_w'] = None;"
        "runpy.run_path('tests/conftest.py'); import bench.trainer, bench.quality"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_setup_lists_every_package_and_its_files():
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )
    given = {
        keyword.arg: ast.literal_eval(keyword.value)
        for keyword in call.keywords
        if keyword.arg in ("packages", "package_dir", "package_data")
    }
    folders = {path.parent for path in FILES}
    assert sorted(given["packages"]) == sorted(name_of(f / "__init__.py") for f in folders)
    assert given["package_dir"] == {"softvq.kernels": "kernels"}
    shipped = {
        path
        for package, patterns in given["package_data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    others = {
        path
        for path in (ROOT / "softvq").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert others == shipped


def public_definitions(body):
    """Functions and classes of a module and, below them, of its public classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def missing(node):
    """What a definition lacks."""
    if not ast.get_docstring(node) and node.name != "forward":  # nn.Module explains forward
        yield "docstring"
    if isinstance(node, ast.FunctionDef):
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        for argument in arguments:
            if argument and argument.arg not in ("self", "cls") and not argument.annotation:
                yield f"type of {argument.arg}"
        if not node.returns:
            yield "return type"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_public_is_explained_and_typed(path):
    tree = ast.parse(path.read_text())
    lacks = [
        f"{path.name}:{node.lineno} {node.name}: {what}"
        for node in public_definitions(tree.body)
        for what in missing(node)
    ]
    assert not lacks
    assert ast.get_docstring(tree), "the module has no docstring"
