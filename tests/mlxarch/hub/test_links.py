"""Links that people paste in place of a name."""

import pytest

from mlxarch.errors import ModelNotFound
from mlxarch.hub import catalog
from mlxarch.hub.links import name_from_link


@pytest.mark.parametrize(
    ("link", "name"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("http://www.huggingface.co/org/name/", "org/name"),
        ("huggingface.co/org/name", "org/name"),
        ("hf.co/org/name", "org/name"),
        ("HTTPS://HuggingFace.co/Org/Name-4bit?library=mlx#usage", "Org/Name-4bit"),
        ("https://huggingface.co/org/name/tree/main", "org/name@main"),
        ("https://huggingface.co/org/name/tree/v1.0/?not-for-all-audiences=true", "org/name@v1.0"),
        ("https://huggingface.co/org/name/blob/0123abc/config.json", "org/name@0123abc"),
        (
            "https://huggingface.co/org/name/resolve/main/model.safetensors?download=true",
            "org/name@main",
        ),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F7", "org/name@refs/pr/7"),
        ("https://huggingface.co/org/name/discussions/3", "org/name"),
        ("https://mirror.example/org/name/tree/main", "org/name@main"),
        ("https://ollama.com/library/qwen3:8b", "qwen3:8b"),
        ("https://example.com/org/name", None),
        ("org/name", None),
        ("qwen3-8b", None),
        ("./folder", None),
    ],
)
def test_a_link_means_its_repository(
    link: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert name_from_link(link) == name
    if name and "/" in name:
        found = catalog.parse(link)
        assert (found.repo, found.revision) == (name.split("@")[0], (name + "@main").split("@")[1])


@pytest.mark.parametrize(
    ("link", "word"),
    [
        ("https://huggingface.co", "no page of a model"),
        ("https://huggingface.co/org", "no page of a model"),
        ("https://huggingface.co/datasets/org/name", "no page of a model"),
        ("hf.co/org/name-GGUF:Q4_K_M", "GGUF"),
        ("https://huggingface.co/org/name-GGUF/blob/main/name.Q4_K_M.gguf", "GGUF"),
    ],
)
def test_a_link_to_something_else_says_what_to_do(link: str, word: str) -> None:
    with pytest.raises(ModelNotFound, match=word):
        catalog.parse(link)


def test_a_trailing_slash_changes_nothing() -> None:
    assert catalog.parse("org/name/").repo == "org/name"
    assert catalog.parse("hf://org/name/").name == "org/name"
