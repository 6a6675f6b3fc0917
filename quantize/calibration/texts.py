"""Evaluation texts, and their split into token windows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxarch.errors import InvalidInput
from mlxarch.tokenizer.encoder import MAX_TEXT_BYTES
from mlxarch.tokenizer.tokenizer import Tokenizer

DOMAINS = ("prose", "code", "chat", "german")  # files in texts/, written for this project
CONTEXT_TOKENS = 12  # tokens shown before a token of interest, half as many after it


@dataclass(frozen=True)
class Text:
    """A text and its name."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the UTF-8 bytes, as hexadecimal digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Passage:
    """The first tokens of a text, split into windows that the model reads independently.

    Attributes:
        text: the text.
        body: token ids of the passage.
        prefix: token ids at the start of every window: the BOS token, for models that have one.
        context: tokens per window, including the prefix.
    """

    text: Text
    body: tuple[int, ...]
    prefix: tuple[int, ...]
    context: int

    @property
    def windows(self) -> list[list[int]]:
        """Token ids of each window; the last may be shorter, or is dropped if it predicts none."""
        step = self.context - len(self.prefix)
        starts = range(0, len(self.body), step)
        windows = ([*self.prefix, *self.body[start : start + step]] for start in starts)
        return [window for window in windows if len(window) > 1]

    @property
    def positions(self) -> list[int]:
        """Indices in ``body`` of predicted tokens: all but the first of a window without prefix."""
        step = self.context - len(self.prefix)
        skipped = 1 - len(self.prefix)
        return [index for index in range(len(self.body)) if index % step >= skipped]


def bundled_texts() -> list[Text]:
    """Return the evaluation texts of the package; texts/README.md says where they are from."""
    folder = Path(__file__).with_name("texts")
    return [Text(name, (folder / f"{name}.txt").read_text(encoding="utf-8")) for name in DOMAINS]


def read_texts(files: Sequence[str | Path]) -> list[Text]:
    """Read text files; each text is named after its file, without the extension.

    Raises:
        InvalidInput: a file cannot be read, is empty, too long or not UTF-8, or two have the same
            name.
    """
    texts: list[Text] = []
    for file in map(Path, files):
        try:
            if file.stat().st_size > MAX_TEXT_BYTES:
                raise InvalidInput(
                    f"{file} has more than {MAX_TEXT_BYTES} bytes; the first part of it is enough"
                )
            texts.append(Text(file.stem, file.read_text(encoding="utf-8")))
            if not texts[-1].content.strip():
                raise InvalidInput(f"{file} is empty; name a file with some text in it")
        except OSError as error:
            raise InvalidInput(
                f"{file} cannot be read: {error.strerror or error}; name a text file"
            ) from error
        except UnicodeDecodeError as error:
            raise InvalidInput(
                f"{file} is no text in UTF-8 ({error.reason} at byte {error.start})"
            ) from error
    if len({text.name for text in texts}) < len(texts):
        raise InvalidInput(
            f"two texts have one name: {', '.join(text.name for text in texts)}; rename one"
        )
    return texts


def tokenize_passages(
    texts: Sequence[Text], tokenizer: Tokenizer, tokens: int, context: int
) -> list[Passage]:
    """Return the first ``tokens`` tokens of each text, in windows of ``context`` tokens.

    Raises:
        InvalidInput: a text is too short to contain a token to predict.
    """
    prefix = window_prefix(tokenizer)
    passages = []
    for text in texts:
        body = tuple(tokenizer.encode(text.content, add_special_tokens=False)[:tokens])
        passage = Passage(text, body, prefix, context)
        if not passage.windows:
            raise InvalidInput(f"text {text.name} has {len(body)} tokens; at least two are needed")
        passages.append(passage)
    return passages


def window_prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids at the start of every window: the BOS token if the tokenizer adds one."""
    bos_id = tokenizer.bos_id
    return () if bos_id is None or tokenizer.encode("a")[:1] != [bos_id] else (bos_id,)


def decode_with_context(
    tokenizer: Tokenizer, passage: Passage, position: int
) -> tuple[str, str, str]:
    """Return the text before a token of a passage, the token itself, and the text after it."""
    body = passage.body
    parts = (
        body[max(position - CONTEXT_TOKENS, 0) : position],
        body[position : position + 1],
        body[position + 1 : position + CONTEXT_TOKENS // 2],
    )
    before, token, after = (tokenizer.decode(part, skip_special_tokens=False) for part in parts)
    return before, token, after
