"""Nothing inside a model folder is ever imported or executed: the source has no means to, and traps do not fire."""

import ast
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(
    path
    for folder in ("mlxarch", "models", "quantize", "cli")
    for path in (ROOT / folder).rglob("*.py")
)

COMMANDS = {
    "cli/main.py": ["eval"],
    "cli/commands/convert/evaluate.py": ["eval"],
    # the mode of ast.parse, which executes nothing
    "mlxarch/tool_calls/forms/python_forms.py": ["eval"],
}  # the command `mlxarch eval` is named there, once
NAMES = {"__builtins__", "__import__", "__loader__", "breakpoint", "compile", "eval", "exec"}
MODULES = {
    "builtins",
    "cloudpickle",
    "code",
    "codeop",
    "dill",
    "imp",
    "importlib.abc",
    "importlib.machinery",
    "joblib",
}
MODULES |= {
    "marshal",
    "pickle",
    "pkgutil",
    "runpy",
    "shelve",
    "site",
    "torch",
    "transformers",
    "yaml",
    "zipimport",
}
ATTRIBUTES = {
    "LazyLoader",
    "SourceFileLoader",
    "addsitedir",
    "create_subprocess_shell",
    "exec_module",
    "load_module",
}
ATTRIBUTES |= {
    "import_function",
    "module_from_spec",
    "spec_from_file_location",
    "__globals__",
    "__subclasses__",
}
DOTTED = {
    "importlib.import_module",
    "os.popen",
    "os.system",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
DOTTED |= {"sys.meta_path", "sys.path", "sys.path_hooks"}
CALLED = {"jinja2.Environment", "jinja2.Template"}  # as types they are harmless
ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code", "weights_only"}  # unless False


def imports_ours(call: ast.Call) -> bool:
    """Whether a call is ``importlib.import_module("mlxarch.…")``, perhaps of an f-string: it imports this package."""
    if ast.unparse(call.func) != "importlib.import_module" or len(call.args) != 1 or call.keywords:
        return False
    argument = call.args[0]
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    return isinstance(argument, ast.Constant) and str(argument.value).startswith("mlxarch.")


def dangers(source: str) -> list[str]:
    """Every expression of the source that could execute a file, with its line."""
    nodes = list(ast.walk(ast.parse(source)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    harmless = {
        call.func
        for call in calls
        if ast.unparse(call.func) == "importlib.import_module" and imports_ours(call)
    }
    found: list[tuple[int, str]] = []
    for node in nodes:
        names: set[str] = set()
        if isinstance(node, ast.Import | ast.ImportFrom):
            inside = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in (inside + alias.name for alias in node.names):
                outer = {name.rsplit(".", i)[0] for i in range(name.count(".") + 1)}
                names |= outer & (MODULES | DOTTED | CALLED) | {name.split(".")[-1]} & ATTRIBUTES
        elif isinstance(node, ast.Name):
            names = {node.id} & NAMES
        elif isinstance(node, ast.Attribute) and node not in harmless:
            names = {node.attr} & ATTRIBUTES | {ast.unparse(node)} & DOTTED
        elif isinstance(node, ast.Call):
            names = {ast.unparse(node.func)} & CALLED
        elif isinstance(node, ast.keyword) and not (
            isinstance(node.value, ast.Constant) and node.value.value is False
        ):
            names = {str(node.arg)} & ARGUMENTS
        elif isinstance(node, ast.Constant) and isinstance(
            node.value, str
        ):  # getattr(x, "eval"), **{"shell": True}
            names = {node.value} & (NAMES | ATTRIBUTES | ARGUMENTS)
        found += [(getattr(node, "lineno", 0), name) for name in names]
    return [f"line {line}: {name}" for line, name in sorted(found)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_source_cannot_execute_what_it_reads(path):
    found = [danger.partition(": ")[2] for danger in dangers(path.read_text())]
    assert found == COMMANDS.get(str(path.relative_to(ROOT)), [])


def test_there_is_source_to_look_at():
    assert {"shards.py", "errors.py", "untrusted_files.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "run = exec",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "getattr(module, 'eval')(text)",
        "import pickle",
        "from pickle import loads",
        "import torch.nn as nn",
        "def f():\n    import runpy",
        "from importlib.util import spec_from_file_location",
        "importlib.util.module_from_spec(spec)",
        "from importlib import import_module",
        "importlib.import_module(config['model_file'])",
        "importlib.import_module('transformers.' + name)",
        "importlib.import_module(f'{folder}.model')",
        "importlib.import_module('.model', package)",
        "importlib.import_module('mlxarch.' 'x', package)",
        "load = importlib.import_module",
        "spec.loader.exec_module(module)",
        "sys.path.insert(0, folder)",
        "sys.path += [folder]",
        "numpy.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder, **{'trust_remote_code': True})",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "mx.import_function(path)",
        "jinja2.Environment().from_string(template)",
        "from jinja2 import Environment",
        "x.__class__.__base__.__subclasses__()",
    ],
)
def test_each_means_of_execution_is_seen(source):
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "mx.eval(logits)",
        "re.compile(pattern)",
        "mx.compile(step)",
        "importlib.import_module(f'mlxarch.models.{name}')",
        "importlib.import_module('mlxarch.models')",
        "from importlib import metadata, resources, util",
        "def render(template: jinja2.Template): ...",
        "conversation.system = text",
        "numpy.load(path, allow_pickle=False)",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment",
        "model.eval()",
    ],
)
def test_harmless_source_passes(source):
    assert not dangers(source)


# Traps ---------------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def trapped(tmp_path) -> Path:
    """A folder in which each of eight traps touches ``fired-…`` beside it when it is run."""
    folder = tmp_path / "model"
    folder.mkdir()

    def code(name: str) -> str:
        return f"import pathlib\npathlib.Path({str(tmp_path)!r}, 'fired-{name}').touch()\nclass Model: pass\n"

    names = [
        "modeling_trap.py",
        "tokenization_trap.py",
        "sitecustomize.py",
        "usercustomize.py",
        "json.py",
        "config.py",
    ]
    for name in [*names, "__init__.py"]:
        (folder / name).write_text(code(name))
    (folder / "trap.pth").write_text(code("trap.pth").replace("\n", ";"))
    for name in ("pytorch_model.bin", "tokenizer.pkl", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / f"fired-{name}")))
    config: dict = {
        "model_type": "trap",
        "model_file": "modeling_trap.py",
        "architectures": ["Trap"],
    }
    config["auto_map"] = {
        "AutoModelForCausalLM": "modeling_trap.Model",
        "AutoTokenizer": "tokenization_trap.Model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "tokenizer_class": "tokenization_trap.Model",
        "auto_map": {"AutoTokenizer": ["tokenization_trap.Model"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    return folder


CHILD = """
import sys
from mlxarch.checkpoint.shards import Checkpoint
opened = []
sys.addaudithook(lambda event, arguments: opened.append(arguments[0]) if event == "open" else None)
with Checkpoint.open(sys.argv[1]) as checkpoint:
    print(sorted(checkpoint.tensors), sorted(str(path).rsplit("/")[-1] for path in opened))
"""


def test_no_trap_in_a_model_folder_fires_when_it_is_opened(trapped):
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(trapped)],
        cwd=trapped,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['w'] ['config.json', 'model.safetensors']"
    assert not list(trapped.parent.glob("fired-*"))


def test_the_traps_do_fire_when_they_are_run(trapped):
    run = "import modeling_trap, pickle; pickle.load(open('tokenizer.pkl', 'rb'))"
    subprocess.run(
        [sys.executable, "-c", run], cwd=trapped, capture_output=True, timeout=60, check=False
    )
    assert {path.name for path in trapped.parent.glob("fired-*")} >= {
        "fired-modeling_trap.py",
        "fired-tokenizer.pkl",
    }
