"""Load the tokenizer of a model's folder from any of the supported file formats."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxarch.errors import TokenizerError
from mlxarch.system.untrusted_files import open_regular_file, read_exactly, read_json, safe_path
from mlxarch.tokenizer import load_json
from mlxarch.tokenizer.added_tokens import as_added_tokens_decoder
from mlxarch.tokenizer.convert import bpe, sentencepiece
from mlxarch.tokenizer.convert.converted import ConvertedTokenizer
from mlxarch.tokenizer.load_json import LoadedTokenizer


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, completed by special_tokens_map.json and added_tokens.json.

    As in transformers 5, the older two count in full where there is no ``added_tokens_decoder``;
    otherwise special_tokens_map.json fills gaps only.

    Raises:
        TokenizerError, CheckpointError: as for ``read_json_if_present``.
    """
    config = read_json_if_present(folder, "tokenizer_config.json")
    special_tokens_map = read_json_if_present(folder, "special_tokens_map.json")
    if "added_tokens_decoder" in config:
        return special_tokens_map | config
    config |= special_tokens_map
    if ids := read_json_if_present(folder, "added_tokens.json"):
        config["added_tokens_decoder"] = as_added_tokens_decoder(ids, config)
    return config


def load_from_folder(
    folder: Path, tokenizer_config: Mapping[str, Any], model_type: object
) -> tuple[LoadedTokenizer, dict[str, Any]]:
    """Load a folder's tokenizer: tokenizer.json, else tokenizer.model, else a publisher's format.

    Args:
        folder: a model's folder.
        tokenizer_config: contents of its tokenizer_config.json.
        model_type: ``model_type`` of its config.json.

    Returns:
        The tokenizer, and tokenizer_config.json with the keys that follow from the loaded file.

    Raises:
        TokenizerError: there is no tokenizer, or its file is damaged, too large or of an unknown
            kind.
    """
    if _exists(folder / "tokenizer.json"):
        path = folder / "tokenizer.json"
        data = _read_bytes(folder, path.name, load_json.MAX_FILE_BYTES)
        loaded = load_json.load_tokenizer_json(data, str(path))
        # its post-processor decides about BOS and EOS, as in transformers 5
        overruled = ("add_bos_token", "add_eos_token")
        return loaded, {k: v for k, v in tokenizer_config.items() if k not in overruled}
    if _exists(folder / "tokenizer.model"):
        path = folder / "tokenizer.model"
        data = _read_bytes(folder, path.name, sentencepiece.MAX_FILE_BYTES)
        converted = sentencepiece.convert_sentencepiece(data, tokenizer_config, str(path))
        tokenizer_config = sentencepiece.without_normalized_tokens(tokenizer_config)
    else:
        path, converted = _convert_bpe(folder, tokenizer_config, model_type)
    loaded = load_json.load_tokenizer_json(converted.tokenizer_json, str(path))
    return loaded, converted.tokenizer_config | dict(tokenizer_config)


def _convert_bpe(
    folder: Path, tokenizer_config: Mapping[str, Any], model_type: object
) -> tuple[Path, ConvertedTokenizer]:
    """Convert the folder's byte-level BPE file. Return its path and the result."""
    limit = bpe.MAX_FILE_BYTES
    if _exists(path := folder / "tekken.json"):
        data = _read_bytes(folder, path.name, limit)
        return path, bpe.convert_tekken(data, str(path))
    if _exists(path := folder / "tiktoken.model"):
        data = _read_bytes(folder, path.name, limit)
        return path, bpe.convert_tiktoken(data, tokenizer_config, str(path))
    if _exists(path := folder / "tokenizer.tok.json"):
        data = _read_bytes(folder, path.name, limit)
        return path, bpe.convert_tok_json(data, str(path))
    if _exists(path := folder / "vocab.json") and _exists(folder / "merges.txt"):
        merges = _read_bytes(folder, "merges.txt", limit)
        vocab = _read_bytes(folder, path.name, limit)
        return path, bpe.convert_vocab_and_merges(vocab, merges, tokenizer_config, model_type)
    raise TokenizerError(
        f"{folder}: there is no tokenizer; known are tokenizer.json, tokenizer.model, tekken.json, "
        "tiktoken.model, tokenizer.tok.json, and vocab.json with merges.txt. Download the model "
        "again."
    )


def read_json_if_present(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of the folder; empty if there is no such file.

    Raises:
        TokenizerError: the file does not hold a JSON object, or exceeds a limit.
        CheckpointError: it is a symbolic link out of the folder.
    """
    if not _exists(folder / name):
        return {}
    return read_json(safe_path(folder, name), error=TokenizerError)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _read_bytes(folder: Path, name: str, limit: int) -> bytes:
    path = safe_path(folder, name)
    descriptor, status = open_regular_file(path, TokenizerError)
    try:
        if status.st_size > limit:
            raise TokenizerError(
                f"{path}: the file has {status.st_size} bytes, and at most {limit} are read."
            )
        data = bytearray(status.st_size)
        read_exactly(descriptor, data, 0, path, TokenizerError)
    finally:
        os.close(descriptor)
    return bytes(data)
