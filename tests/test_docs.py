"""Commands and examples of README and docs, compared with the code."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from house import MODEL_DOCSTRING, ROOT

from mlxarch.loading.model_types import MODELS
from mlxarch.loading.registry import architecture

pytestmark = pytest.mark.kernels  # a model answers, which they make five times faster
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    fenced = re.findall(
        r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )
    return [text for found, text in fenced if found == language]


def mlxarch_says(*arguments: str) -> str:
    code = f"import sys; from mlxarch.cli.main import main; sys.argv = {['mlxarch', *arguments]!r}; main()"
    environment = {
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONIOENCODING": "utf-8",
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_commands() -> list[list[str]]:
    """The arguments of every `mlxarch …` line of the README, pipes and comments cut off."""
    lines = "\n".join(blocks("README.md", "sh")).splitlines()
    words = [shlex.split(line.split(" | ")[-1], comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["mlxarch"]]


def test_the_readme_shows_the_help_as_it_is():
    shown = [block for block in blocks("README.md", "") if block.startswith("$ mlxarch --help\n")]
    assert len(shown) == 1
    assert shown[0].removeprefix("$ mlxarch --help\n").strip() == mlxarch_says("--help").strip()


@pytest.mark.parametrize("arguments", shown_commands(), ids=" ".join)
def test_a_command_of_the_readme_has_the_options_it_is_shown_with(arguments):
    command, *rest = arguments
    text = mlxarch_says(command, "--help")
    options = [word for word in rest if re.fullmatch(r"--?[a-z][a-z-]*", word)]
    assert not [
        option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", text)
    ]


def test_the_python_of_the_readme_runs(smollm2, monkeypatch, capsys):
    from mlxarch.store import obtain as store

    monkeypatch.setattr(store, "obtain", lambda *arguments, **options: smollm2)
    scope: dict = {}
    for block in blocks("README.md", "python"):
        exec(re.sub(r"max_tokens=\d+", "max_tokens=3", block), scope)
    said = capsys.readouterr().out
    assert "tokens were known already" in said
    assert scope["answer"].timings.reused_tokens > 0
    assert said.rstrip().endswith("Paris"), "greedy, after: The capital of France is"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_repository_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert not [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_heading_finds_it(page):
    links = re.findall(r"\]\(([^):]*)#([^)]+)\)", page.read_text())
    assert not [
        f"{target}#{anchor}"
        for target, anchor in links
        if anchor not in anchors(page.parent / target if target else page)
    ]


def test_the_glossary_is_in_alphabetical_order():
    terms = re.findall(r"^### (.*)$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    keys = [re.sub(r"[^a-z0-9]", "", term.lower()) for term in terms]
    assert len(keys) >= 40
    assert keys == sorted(set(keys))


def test_every_benchmark_is_listed_with_the_claim_it_measures():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))
    assert [script for script in scripts if f"| `{script}" not in page] == []


# docs/adding-a-model.md ----------------------------------------------------------------------------------------------

OLMO2 = {
    "model_type": "olmo2",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    """The model file that the page shows, as if it lay in models/."""
    (source,) = blocks("docs/adding-a-model.md", "python")
    module = ModuleType("mlxarch.models.olmo2_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(MODELS, "olmo2", "olmo2_of_the_page")
    exec(source, module.__dict__)
    return module


def test_the_example_of_the_page_follows_the_rules_of_a_model_file(example):
    (source,) = blocks("docs/adding-a-model.md", "python")
    assert MODEL_DOCSTRING.match(example.__doc__ or "")
    assert len(source.splitlines()) <= 100
    assert set(re.findall(r"from (mlxarch[\w.]*) import", source)) == {"mlxarch.blocks"}


def test_the_example_of_the_page_runs_and_decodes_what_it_prefills(example):
    mx.random.seed(0)
    model = architecture(OLMO2).build()
    model.update(_random_like(model.parameters()))
    tokens = mx.array([[1, 5, 9, 30, 2, 7]])
    whole, caches = model(tokens), model.make_caches()
    parts = [model(tokens[:, i : i + 1], caches) for i in range(tokens.shape[1])]
    assert np.allclose(np.array(whole), np.array(mx.concatenate(parts, axis=1)), atol=1e-4)


def test_a_norm_of_the_example_stands_after_attention(example):
    # A norm behind attention makes its size irrelevant; a norm before it does not.
    model = architecture(OLMO2).build()
    model.update(_random_like(model.parameters()))
    tokens = mx.array([[1, 5, 9, 30, 2, 7]])
    before = np.array(model(tokens))
    for name, moves in (("o_proj", False), ("v_proj", False), ("post_attention_layernorm", True)):
        layer: Any = model.layers[0]
        module = getattr(layer.self_attn, name, None) or getattr(layer, name)
        kept, module.weight = module.weight, module.weight * 4
        assert bool(np.abs(np.array(model(tokens)) - before).max() > 1e-2) is moves, name
        module.weight = kept


def _random_like(tree):
    if isinstance(tree, mx.array):
        return mx.random.normal(tree.shape) * 0.3
    return (
        {key: _random_like(value) for key, value in tree.items()}
        if isinstance(tree, dict)
        else [_random_like(value) for value in tree]
    )


def test_the_page_names_what_exists():
    text = (ROOT / "docs" / "adding-a-model.md").read_text()
    for path in set(re.findall(r"`((?:tests|mlxarch|models)/[\w/]+\.(?:py|toml))`", text)) - {
        "models/olmo2.py",
        "tests/models/test_olmo2.py",
    }:
        assert (ROOT / path).exists(), path
    assert importlib.import_module("mlxarch.blocks.config").NEUTRAL
