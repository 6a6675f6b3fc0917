"""The house keeps its own rules: where files lie, how long they are, what they import."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from house import MODEL_DOCSTRING, ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PRODUCT = ["mlxarch", "models", "quantize", "cli"]

# Named exceptions: models with many parts that no other model has, and blocks that hold one idea in several forms
LONGER = {"models/gemma3n.py": 250, "models/gpt2.py": 150, "models/llama4.py": 130, "models/grok2.py": 125}
LONGER |= {f"mlxarch/blocks/{name}.py": 160 for name in ("config", "linear", "rope")}


def python_files(*folders: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def model_files() -> list[Path]:
    return [path for path in python_files("models") if path.name != "__init__.py"]


def line_limit(path: Path) -> int:
    usual = 100 if path in model_files() else 120 if path.parent.name in {"blocks", "cache"} else 400
    return LONGER.get(path.as_posix(), usual)


def imported_names(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def type_checking_imports(path: Path) -> list[ast.alias]:
    blocks = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    return [
        alias for block in blocks for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]


def only_narrows(test: ast.expr) -> bool:
    """Whether an assert tells the type checker something and cannot check input: `x is not None`, isinstance(x, T)."""
    match test:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(only_narrows(part) for part in parts)
        case ast.Compare(ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return True
        case ast.Call(func=ast.Name(id="isinstance")):
            return True
    return False


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The folders -------------------------------------------------------------------------------------------------------


def test_the_links_for_type_checkers_mirror_the_package():
    links = ROOT / ".typing" / "mlxarch"
    sources = {path.name: path for path in (ROOT / "mlxarch").iterdir() if path.name != "__pycache__"}
    sources |= {folder: ROOT / folder for folder in PRODUCT[1:]}
    assert {path.name for path in links.iterdir()} == set(sources), "ln -s ../../mlxarch/NAME .typing/mlxarch/NAME"
    for name, source in sources.items():
        link = links / name
        assert link.is_symlink() and not link.readlink().is_absolute(), f"{link} must be a relative link"
        assert link.resolve() == source


def test_every_package_is_listed_in_pyproject():
    found = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_folder_with_python_files_is_a_package():
    folders = {path.parent for path in python_files(*PRODUCT)}
    assert folders
    assert not [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()]


def test_nothing_but_mlxarch_is_installed():
    assert {package.split(".")[0] for package in SETUPTOOLS["packages"]} == {"mlxarch"}


def test_the_wheel_check_refuses_what_it_must(tmp_path):
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci" / "check_wheel.py")
    assert spec and spec.loader
    check_wheel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_wheel)

    wheel = tmp_path / "mlxarch-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mlxarch/__init__.py", "")
        archive.writestr("mlxarch/left_over.py", "")
        archive.writestr("models/__init__.py", "")
        archive.writestr("mlxarch/tests/test_x.py", "")
        archive.writestr("mlxarch-0.dist-info/METADATA", "Name: mlxarch\nRequires-Dist: torch>=2\n")
    problems = "\n".join(check_wheel.problems(wheel))
    for expected in ("top-level names", "missing: mlxarch/", "left_over.py", "tests inside", "requires torch"):
        assert expected in problems


# The files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", python_files(*PRODUCT, "tests", "benchmarks", "examples"), ids=str)
def test_no_file_is_too_long(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= line_limit(path), f"{path} has {lines} lines, {line_limit(path)} are allowed: split it"


@pytest.mark.parametrize("path", model_files(), ids=str)
def test_a_model_docstring_names_draws_and_cites(path):
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    assert MODEL_DOCSTRING.match(docstring), (
        "name (maker, year) · drawing · Stands out: · Source: (see CONTRIBUTING.md)"
    )


def test_the_docstring_rule_refuses_each_missing_part():
    good = "Tiny 1 (Maker, 2025).\n\n    x ─ norm ─ + ─\n\nStands out: it is small.\nSource: maker/tiny/config.json."
    assert MODEL_DOCSTRING.match(good)
    for part in (" (Maker, 2025)", "    x ─ norm ─ + ─\n\n", "Stands out: ", "Source: ", "config.json"):
        assert not MODEL_DOCSTRING.match(good.replace(part, "")), part


@pytest.mark.parametrize("path", python_files(*PRODUCT), ids=str)
def test_product_files_keep_the_rules_that_ruff_does_not_know(path):
    source = (ROOT / path).read_text()
    roots = {name.split(".")[0] for name in imported_names(source)}
    assert not roots & {"torch", "transformers", "mlx_lm", "safetensors"}
    nodes = list(ast.walk(ast.parse(source)))
    asserts = [node for node in nodes if isinstance(node, ast.Assert) and not only_narrows(node.test)]
    assert not asserts, "raise a MlxArchError that says what to do"
    if path.parts[0] != "cli":
        calls = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not calls & {"print", "input"}, "only the command line speaks; use logging"


def test_the_import_reader_sees_imports_of_every_form():
    source = "import torch.nn as nn\ndef f():\n    from transformers import AutoModel\n"
    assert imported_names(source) == {"torch.nn", "transformers.AutoModel"}


def test_an_assert_that_checks_a_value_is_told_from_one_that_narrows_a_type():
    def narrows(source: str) -> bool:
        statement = ast.parse(source).body[0]
        return isinstance(statement, ast.Assert) and only_narrows(statement.test)

    assert narrows("assert x is not None and isinstance(y, str)")
    assert not narrows("assert x > 0")
    assert not narrows("assert x is not None and x > 0")


@pytest.mark.parametrize("path", python_files("mlxarch", "quantize", "cli"), ids=str)
def test_only_the_registry_reaches_for_an_architecture(path):
    names = imported_names((ROOT / path).read_text())
    assert not [name for name in names if name.startswith("mlxarch.models.")], "ask mlxarch.registry"


# The package as seen from outside ------------------------------------------------------------------------------------


def test_importing_mlxarch_does_not_import_mlx():
    loaded = run_python("import sys, mlxarch; print(*sorted(name for name in sys.modules if '.' not in name))").split()
    assert "mlxarch" in loaded
    assert not {"mlx", "numpy", "tokenizers", "huggingface_hub", "jinja2"} & set(loaded)


def test_the_version_is_the_same_in_both_places():
    import mlxarch

    assert mlxarch.__version__ == PYPROJECT["project"]["version"]


def test_every_public_name_is_there_and_is_listed():
    import mlxarch

    names = mlxarch.__all__
    assert names == sorted(set(names))
    assert set(names) <= set(dir(mlxarch)), "dir() shows what __all__ lists, loaded or not"
    assert [name for name in names if getattr(mlxarch, name) is None] == []
    offered = {alias.asname or alias.name for alias in type_checking_imports(ROOT / "mlxarch" / "__init__.py")}
    assert offered == set(names), "what type checkers are told of must be what __all__ lists"
    unknown = "no_such_name"
    with pytest.raises(AttributeError, match=unknown):
        getattr(mlxarch, unknown)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["quantize", "--help"]], ids=" ".join
)
def test_help_answers_without_importing_mlx(arguments):
    code = f"""
import sys
from mlxarch.cli.main import main
sys.argv = ["mlxarch", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(*sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    output, loaded = run_python(code).rstrip("\n").rsplit("\n", 1)
    assert "mlxarch" in output
    assert "click" in loaded.split()
    assert not {"mlx", "numpy", "tokenizers", "huggingface_hub", "jinja2", "sentencepiece"} & set(loaded.split())
