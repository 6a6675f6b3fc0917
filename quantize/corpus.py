"""The texts that a model is judged by, and their cut into windows of tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxarch.errors import InvalidInput
from mlxarch.tokenizer import MAX_TEXT_BYTES, Tokenizer

DOMAINS = ("prose", "code", "chat", "german")  # files in texts/, all written for this
SURROUNDINGS = 12  # tokens shown before one, half as many after it


@dataclass(frozen=True)
class Text:
    """A text and what it is called; ``sha256`` is of its bytes in UTF-8."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the bytes in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Passage:
    """The beginning of a text as tokens, cut into windows that a model reads each by itself.

    Attributes:
        body: the tokens.
        prefix: what every window starts with: the token that begins a text, for models that have one.
        context: tokens of a window, the prefix included.
    """

    text: Text
    body: tuple[int, ...]
    prefix: tuple[int, ...]
    context: int

    @property
    def windows(self) -> list[list[int]]:
        """The last one may be shorter, and one that would predict nothing is left out."""
        step = self.context - len(self.prefix)
        cut = ([*self.prefix, *self.body[at : at + step]] for at in range(0, len(self.body), step))
        return [window for window in cut if len(window) > 1]

    @property
    def positions(self) -> list[int]:
        """Where in ``body`` each token stands that is predicted: all but the first of a window without a prefix."""
        step, skipped = self.context - len(self.prefix), 1 - len(self.prefix)
        return [at for at in range(len(self.body)) if at % step >= skipped]


def bundled() -> list[Text]:
    """Prose, code, a chat and another language; texts/README.md says where they are from."""
    folder = Path(__file__).with_name("texts")
    return [Text(name, (folder / f"{name}.txt").read_text(encoding="utf-8")) for name in DOMAINS]


def read_texts(files: Sequence[str | Path]) -> list[Text]:
    """Texts of the user's, by the names of their files.

    Raises:
        InvalidInput: one cannot be read, is empty, too long or not UTF-8, or two have one name.
    """
    texts: list[Text] = []
    for file in map(Path, files):
        try:
            if file.stat().st_size > MAX_TEXT_BYTES:
                raise InvalidInput(f"{file} has more than {MAX_TEXT_BYTES} bytes; the first part of it is enough")
            texts.append(Text(file.stem, file.read_text(encoding="utf-8")))
            if not texts[-1].content.strip():
                raise InvalidInput(f"{file} is empty; name a file with some text in it")
        except OSError as error:
            raise InvalidInput(f"{file} cannot be read: {error.strerror or error}; name a text file") from error
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{file} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    if len({text.name for text in texts}) < len(texts):
        raise InvalidInput(f"two texts have one name: {', '.join(text.name for text in texts)}; rename one")
    return texts


def passages(texts: Sequence[Text], tokenizer: Tokenizer, tokens: int, context: int) -> list[Passage]:
    """The first ``tokens`` tokens of each text.

    Raises:
        InvalidInput: a text is too short to predict anything in it.
    """
    prefix, found = prefix_of(tokenizer), []
    for text in texts:
        body = tuple(tokenizer.encode(text.content, add_special_tokens=False)[:tokens])
        found.append(Passage(text, body, prefix, context))
        if not found[-1].windows:
            raise InvalidInput(f"text {text.name} has {len(body)} tokens; at least two are needed")
    return found


def prefix_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What a window starts with: the token that begins a text, for models that have one."""
    first = tokenizer.bos_id
    return () if first is None or tokenizer.encode("a")[:1] != [first] else (first,)


def surroundings(tokenizer: Tokenizer, passage: Passage, position: int) -> tuple[str, str, str]:
    """What stands before a token of a passage, the token, and what stands behind it."""
    body, before = passage.body, max(position - SURROUNDINGS, 0)
    parts = body[before:position], body[position : position + 1], body[position + 1 : position + SURROUNDINGS // 2]
    first, token, last = (tokenizer.decode(part, skip_special_tokens=False) for part in parts)
    return first, token, last
