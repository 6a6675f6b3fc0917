"""A tiny Llama that talks: random weights, one token for each printable character, and a chat template."""

import json
from pathlib import Path
from typing import Any

from tiny_llama import make_llama

SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_chat_model(folder: Path, *, template: str | None = TEMPLATE, context: int = 4096, **config: Any) -> Path:
    """Write the model. It has no end token, so it goes on until it is stopped, and it can say ESC."""
    # ByteLevel's alphabet: Ġ is a blank, Ċ a newline, ě ESC
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ě"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    make_llama(folder, vocab=len(vocabulary), max_position_embeddings=context, **config)
    added = [
        {"id": vocabulary[text], "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for text in SPECIAL
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False}
    tokenizer = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "merges.txt").unlink()
    return folder
