"""A tiny Llama with a real tokenizer: bytes of characters in several tokens, end tokens, a chat template."""

import shutil
from pathlib import Path

from tiny_llama import make_llama

TOKENIZERS = Path(__file__).parents[1] / "fixtures" / "tokenizers"
VOCABULARY = 512  # rows of the embedding; the tokenizer has 465 tokens
CONTEXT = 256


def make_talker(folder: Path, **config: object) -> Path:
    """Write a model with random weights and Llama 3's tokenizer in small; gives the folder."""
    make_llama(folder, vocab=VOCABULARY, **{"max_position_embeddings": CONTEXT, **config})  # type: ignore[arg-type]
    for file in (TOKENIZERS / "llama3").glob("*"):
        if file.name != "config.json":
            shutil.copy(file, folder)
    (folder / "merges.txt").unlink()
    return folder
