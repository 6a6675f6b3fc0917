"""Companion files of a checkpoint that is copied."""

import json
from pathlib import Path

from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.tokenizer.chat_template import find_templates
from tiny_llama import make_llama


def templates_of(sidecars: dict[str, bytes | Path], folder: Path) -> dict[str, str]:
    """Chat templates of a folder with copies of the sidecars."""
    folder.mkdir()
    for name, content in sidecars.items():
        data = content.read_bytes() if isinstance(content, Path) else content
        (folder / name).write_bytes(data)
    return find_templates(folder, {})


def test_named_templates_are_copied_with_the_others(tmp_path: Path):
    folder = tmp_path / "model"
    make_llama(folder)
    (folder / "chat_template.jinja").write_text("DEFAULT")
    listed = [{"name": "rag", "template": "RAG"}, {"name": "tool_use", "template": "OLD"}]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": listed}))
    named = folder / "additional_chat_templates"
    named.mkdir()
    (named / "tool_use.jinja").write_text("TOOLS")
    before = find_templates(folder, {})
    assert before == {"default": "DEFAULT", "rag": "RAG", "tool_use": "TOOLS"}
    source = open_checkpoint(folder)
    for shard in source.shards:
        shard.close()
    assert templates_of(dict(source.sidecars), tmp_path / "copy") == before
