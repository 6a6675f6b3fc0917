"""Rules of the source tree: folders, links, file lengths, imports, public names."""

import ast
import importlib.util
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
import zipfile
from pathlib import Path

import pytest
from house import MODEL_DOCSTRING, ROOT

from mlxarch.loading.model_types import BY_CLASS, MODELS

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PRODUCT = ["mlxarch", "models", "quantize", "cli"]
LINKS = {f"mlxarch/{name}": f"../{name}" for name in ("models", "quantize", "cli")}

MAX_FILES = 12  # in a folder; models/ has one for each architecture
LONG_FILE, LONG_FUNCTION = 400, 60  # lines from which a docstring must give a reason
REASON = "Length:"

# The formats of other programs have names that coincide with names of architectures
FORMAT_NAMES = {
    "mlxarch/blocks/rope.py": "rope_type in config.json",
    "mlxarch/checkpoint/gguf/config.py": "general.architecture in GGUF",
    "mlxarch/checkpoint/gguf/source.py": "general.architecture in GGUF",
    "mlxarch/checkpoint/gguf/tokenizer.py": "tokenizer.ggml.model and .pre in GGUF",
    "mlxarch/tokenizer/convert/bpe.py": "names of pre-tokenizers",
}
REGISTRY = ("mlxarch/loading/registry.py", "mlxarch/loading/model_types.py")


def python_files(*folders: str) -> list[Path]:
    return sorted(
        path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")
    )


def model_files() -> list[Path]:
    return [path for path in python_files("models") if path.name != "__init__.py"]


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
        alias
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
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
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The folders -------------------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    return sorted({path.parent for path in python_files(*PRODUCT)})


def test_the_package_has_three_relative_links_and_no_other_exists():
    found = {}
    for parent, directories, files in os.walk(ROOT):
        directories[:] = [
            name
            for name in directories
            if not name.startswith(".") and name not in ("build", "dist")
        ]
        for path in (Path(parent, name) for name in [*directories, *files]):
            if path.is_symlink():
                found[path.relative_to(ROOT).as_posix()] = path.readlink().as_posix()
    assert found == LINKS


@pytest.mark.parametrize("folder", folders(), ids=str)
def test_a_folder_says_in_a_sentence_what_it_is_for_and_holds_few_files(folder):
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    assert re.match(r"[A-Z][^\n]{20,}\.(\n\n|$)", docstring), (
        f"{folder}/__init__.py: one sentence on its first line"
    )
    files = [path for path in (ROOT / folder).iterdir() if path.suffix == ".py"]
    assert len(files) <= MAX_FILES or folder.name == "models", (
        f"{folder}: {len(files)} files, {MAX_FILES} are allowed"
    )


def test_the_top_of_the_package_holds_at_most_six_files():
    assert len([path for path in (ROOT / "mlxarch").iterdir() if path.is_file()]) <= 6


def test_tests_mirror_the_packages():
    for path in python_files("tests/mlxarch", "tests/quantize", "tests/cli", "tests/models"):
        if path.name.startswith("test_"):
            place = path.parent.relative_to("tests")
            assert (ROOT / place / "__init__.py").exists(), f"{path} mirrors no package"


def test_every_folder_with_python_files_is_a_package():
    folders = {path.parent for path in python_files(*PRODUCT)}
    assert folders
    assert not [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").exists()]


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
    for expected in (
        "top-level names",
        "missing: mlxarch/",
        "left_over.py",
        "tests inside",
        "requires torch",
    ):
        assert expected in problems


# The files ---------------------------------------------------------------------------------------------------------


def unexplained_lengths(source: str) -> list[str]:
    """Long files and functions whose docstring gives no reason for their length."""
    found = []
    tree = ast.parse(source)
    if len(source.splitlines()) > LONG_FILE and REASON not in (ast.get_docstring(tree) or ""):
        found.append(f"the file has {len(source.splitlines())} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstring.splitlines())
            if lines > LONG_FUNCTION and REASON not in docstring:
                found.append(f"{node.name} has {lines} lines")
    return found


@pytest.mark.parametrize("path", python_files(*PRODUCT), ids=str)
def test_a_long_file_or_function_has_a_reason_in_its_docstring(path):
    found = unexplained_lengths((ROOT / path).read_text())
    assert not found, (
        f"{path}: {'; '.join(found)}. Split it, or give a reason: '{REASON} one table of formats.'"
    )


def test_a_long_function_is_seen_and_a_reason_accepted():
    body = "    x = 1\n" * LONG_FUNCTION
    assert unexplained_lengths(f"def f():\n{body}")
    assert not unexplained_lengths(f'def f():\n    """F.\n\n    {REASON} a table.\n    """\n{body}')
    assert unexplained_lengths("x = 1\n" * (LONG_FILE + 1))


@pytest.mark.parametrize("path", model_files(), ids=str)
def test_a_model_docstring_names_draws_and_cites(path):
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    assert MODEL_DOCSTRING.match(docstring), (
        "name (maker, year) · drawing · Stands out: · Source: (see CONTRIBUTING.md)"
    )


def test_the_docstring_rule_refuses_each_missing_part():
    good = "Tiny 1 (Maker, 2025).\n\n    x ─ norm ─ + ─\n\nStands out: it is small.\nSource: maker/tiny/config.json."
    assert MODEL_DOCSTRING.match(good)
    for part in (
        " (Maker, 2025)",
        "    x ─ norm ─ + ─\n\n",
        "Stands out: ",
        "Source: ",
        "config.json",
    ):
        assert not MODEL_DOCSTRING.match(good.replace(part, "")), part


@pytest.mark.parametrize("path", python_files(*PRODUCT), ids=str)
def test_product_files_keep_the_rules_that_ruff_does_not_know(path):
    source = (ROOT / path).read_text()
    roots = {name.split(".")[0] for name in imported_names(source)}
    assert not roots & {"torch", "transformers", "mlx_lm", "safetensors"}
    nodes = list(ast.walk(ast.parse(source)))
    asserts = [
        node for node in nodes if isinstance(node, ast.Assert) and not only_narrows(node.test)
    ]
    assert not asserts, "raise a MlxArchError that says what to do"
    if path.parts[0] != "cli":
        calls = {
            node.func.id
            for node in nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
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
    assert not [name for name in names if name.startswith("mlxarch.models.")], (
        "ask mlxarch.loading.registry"
    )


def architecture_names() -> re.Pattern[str]:
    """Names of files in models/, of their model types, and of submodules that one architecture alone has."""
    names = {path.stem for path in model_files()} | {*MODELS, *BY_CLASS.values()}
    names |= {"altup", "laurel", "post_attn_norm"}
    return re.compile(rf"\b({'|'.join(sorted(names, key=len, reverse=True))})\b")


def architectures_named(source: str) -> list[str]:
    """Names of architectures in the code and the strings of a file, docstrings and prose left out."""
    pattern = architecture_names()
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.STRING) and token.start[0] not in prose:
            quoted = token.string.strip("rbfu'\"")
            found += [quoted] if pattern.fullmatch(quoted) else []
    return found


@pytest.mark.parametrize("path", python_files("mlxarch", "quantize", "cli"), ids=str)
def test_no_architecture_is_named_outside_models_and_the_registry(path):
    if path.as_posix() not in (*REGISTRY, *FORMAT_NAMES):
        assert architectures_named((ROOT / path).read_text()) == [], (
            "let the block declare a role instead"
        )


def test_a_named_architecture_is_seen():
    assert architectures_named(
        '"""llama3"""\nif "altup" in layer or kind == "gemma3n":\n    pass\n'
    ) == [
        "altup",
        "gemma3n",
    ]


# The package as seen from outside ------------------------------------------------------------------------------------


def test_importing_mlxarch_does_not_import_mlx():
    loaded = run_python(
        "import sys, mlxarch; print(*sorted(name for name in sys.modules if '.' not in name))"
    ).split()
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
    offered = {
        alias.asname or alias.name
        for alias in type_checking_imports(ROOT / "mlxarch" / "__init__.py")
    }
    assert offered == set(names), "what type checkers are told of must be what __all__ lists"
    unknown = "no_such_name"
    with pytest.raises(AttributeError, match=unknown):
        getattr(mlxarch, unknown)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["quantize", "--help"]],
    ids=" ".join,
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
    assert not {"mlx", "numpy", "tokenizers", "huggingface_hub", "jinja2", "sentencepiece"} & set(
        loaded.split()
    )
