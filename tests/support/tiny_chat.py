"""A tiny Llama that talks: random weights, one token for each printable character, and a chat template."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import pytest

from mlxarch import Tokenizer, language_model
from mlxarch.blocks import CausalLM
from mlxarch.generation.decode import decode
from tiny_llama import make_llama

SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_chat_model(
    folder: Path,
    *,
    template: str | None = TEMPLATE,
    context: int = 4096,
    marks: Mapping[str, bool] = MappingProxyType({}),
    **config: Any,
) -> Path:
    """Write the model. It has no end token, so it goes on until it is stopped, and it can say ESC.

    ``marks`` are further tokens: text, and whether it is a special one.
    """
    # ByteLevel's alphabet: Ġ is a blank, Ċ a newline, ě ESC
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ě"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters, *marks])}
    make_llama(folder, vocab=len(vocabulary), max_position_embeddings=context, **config)
    added = [
        {"id": vocabulary[text], "content": text, "special": marks.get(text, True)}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for text in [*SPECIAL, *marks]
    ]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": level,
        "decoder": level,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "merges.txt").unlink()
    return folder


def script(patch: pytest.MonkeyPatch, folder: Path | str, *answers: str) -> list[str]:
    """Let the model of a folder say these texts, one in each turn, the last one for ever; gives the prompts it got."""
    tokenizer, prompts = Tokenizer.from_folder(folder), []
    rows, said = [tokenizer.encode(answer) for answer in answers], iter(())

    def turn(model: CausalLM, session: Any, prompt: Any, *rest: Any) -> Iterator[Any]:
        nonlocal said
        said = iter(rows[min(len(prompts), len(rows) - 1)])
        prompts.append(tokenizer.decode(prompt, skip_special_tokens=False))
        return decode(model, session, prompt, *rest)

    def head(self: CausalLM, state: mx.array) -> mx.array:
        token = next(said, tokenizer.encode("~")[0])
        return (mx.arange(self.vocab_size) == token).astype(mx.float32)[None, None]

    patch.setattr(language_model, "decode", turn)
    patch.setattr(CausalLM, "head", head)
    return prompts
