"""compare."""

import json
from xml.etree import ElementTree

from mlxarch.hub import catalog


def test_compare_shows_models_side_by_side(execute):
    result = execute("compare", "llama3-8b", "olmo2-7b", COLUMNS="200")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[0].split("  ")[-1].strip() == "OLMo 2 7B Instruct"
    assert any(
        line.startswith("norms") and "before (RMSNorm)" in line and "after" in line
        for line in lines
    )


def test_an_asterisk_has_a_footnote(invoke):
    short = invoke("compare", "gpt2-xl")
    assert " MB*" in short.stdout and "* KV cache at the model's longest context" in short.stderr
    long = invoke("compare", "qwen3-0.6b")
    assert "*" not in long.stdout + long.stderr


def test_a_narrow_terminal_gets_several_tables(execute):
    narrow = execute("compare", "llama3-8b", "olmo2-7b", "gpt2-xl", COLUMNS="45").stdout
    assert sum(line.startswith("parameters") for line in narrow.splitlines()) == 3
    assert max(map(len, narrow.splitlines())) <= 45
    wide = execute("compare", "llama3-8b", "olmo2-7b", "gpt2-xl", COLUMNS="200").stdout
    assert sum(line.startswith("parameters") for line in wide.splitlines()) == 1


def test_compare_without_names_takes_the_whole_catalog(invoke, monkeypatch):
    some = {name: catalog.entries()[name] for name in ("gpt2-124m", "qwen3.5-4b", "gemma4-e2b")}
    monkeypatch.setattr(catalog, "entries", lambda: some)
    assert [model["name"] for model in json.loads(invoke("compare", "--json").stdout)] == [*some]
    assert invoke("compare", "--markdown").stdout.startswith("# Architectures\n")


def test_compare_writes_markdown_and_a_drawing(invoke, home, tmp_path):
    target = tmp_path / "blocks.svg"
    result = invoke("compare", "qwen3-0.6b", "smollm3-3b", "--svg", str(target))
    assert result.exit_code == 0 and result.stdout == "" and "2 drawn" in result.stderr
    assert len(ElementTree.parse(target).getroot().findall("{http://www.w3.org/2000/svg}g")) == 2
    lines = invoke("compare", "qwen3-0.6b", "--markdown").stdout.splitlines()
    assert lines[0].startswith("| model | parameters |") and lines[2].startswith(
        "| Qwen3 0.6B | 596M |"
    )


def test_compare_reads_a_folder_and_names_what_it_does_not_know(invoke, execute, tiny):
    assert json.loads(invoke("compare", tiny, "--json").stdout)[0]["model_type"] == "llama"
    assert invoke("compare", "qwen3-0.7b").exit_code == 3
    assert execute("compare", "org/model").returncode == 5, (
        "a repository, and the Hub is out of reach"
    )
    assert invoke("compare", "qwen3-0.6b", "--json", "--markdown").exit_code == 2


def test_what_differs_from_published_figures_is_said(invoke):
    said = invoke("compare", "qwen3-30b-a3b").stderr
    assert "3.30B active" in said and "3.35B" in said
    assert invoke("compare", "qwen3-0.6b").stderr == ""
