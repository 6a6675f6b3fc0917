"""Thinking apart from the answer: what a model writes between its marks, and how it is asked to think.

Two kinds of marks are known. Tags, ``<think>`` … ``</think>``: what stands between them is thinking; they are found by
token id where each is one token, else in the text. And the channels of gpt-oss (harmony): messages, each with a header
that names a channel and perhaps a recipient; ``analysis``, and what is addressed to a tool, is no answer. Where an
answer begins is read from the end of the prompt, since a template may open the thinking, or close it at once.

Marks are never part of a text, and neither are the newlines next to them. A model without marks is passed through.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
EFFORTS = ("low", "medium", "high")
START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"

_CONSTRAIN, _OTHER_ENDS = "<|constrain|>", ("<|return|>", "<|call|>")
_RECIPIENT = re.compile(r"\bto=(?!user\b|assistant\b)\S")
_SWITCHES = ("enable_thinking", "thinking")
_FLAGS = ("/no_think", "/nothink")
_TAIL = 16  # tokens of the prompt that may hold an opening tag and the blanks behind it

Segment = tuple[str, bool]
"""A text that is not empty, and whether it is thinking."""


class Detokenizer(Protocol):
    """Tokens to text, one at a time."""

    def add(self, token: int) -> str:
        """The text that this token completes."""
        ...

    def finish(self) -> str:
        """The rest."""
        ...


class Vocabulary(Protocol):
    """What is asked of a tokenizer."""

    @property
    def chat_template(self) -> str | None:
        """Its Jinja text."""
        ...

    @property
    def template_variables(self) -> Collection[str]:
        """Names that the template reads and does not make."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token given as text."""
        ...

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh decoder for a stream of tokens."""
        ...


class Splitter(Protocol):
    """Divides a growing answer. ``thinking``: what comes next belongs to the thinking, as far as is known."""

    @property
    def thinking(self) -> bool:
        """See above."""
        ...

    def add(self, token: int) -> list[Segment]:
        """The texts that this token completes."""
        ...

    def finish(self) -> list[Segment]:
        """The rest: the answer is over."""
        ...


def splitter(vocabulary: Vocabulary, prompt: Sequence[int]) -> Splitter:
    """The splitter for the answer to a prompt, given as token ids."""
    if all(vocabulary.token_id(mark) is not None for mark in (START, CHANNEL, MESSAGE, END)):
        return Channels(vocabulary, prompt)
    tags = _tags(vocabulary)
    return Tags(vocabulary, tags, prompt) if tags else Whole(vocabulary)


def _tags(vocabulary: Vocabulary) -> tuple[str, str] | None:
    for pair in TAGS:
        if all(vocabulary.token_id(tag) is not None for tag in pair):
            return pair
    return next((pair for pair in TAGS if pair[1] in (vocabulary.chat_template or "")), None)


class Whole:
    """Everything is the answer."""

    thinking = False

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._detokenizer = vocabulary.detokenizer()

    def add(self, token: int) -> list[Segment]:
        """See Splitter."""
        text = self._detokenizer.add(token)
        return [(text, False)] if text else []

    def finish(self) -> list[Segment]:
        """See Splitter."""
        text = self._detokenizer.finish()
        return [(text, False)] if text else []


class _Parts:
    """Texts between marks, without the newlines next to a mark; two parts of a kind are a paragraph apart."""

    def __init__(self, thinking: bool, after_mark: bool) -> None:
        self.thinking = thinking
        self._after_mark, self._held = after_mark, ""
        self._begun = {False: False, True: False}

    def text(self, new: str) -> list[Segment]:
        """More of the part."""
        if self._after_mark:
            new = new.lstrip("\n")
        if not new:
            return []
        whole = self._held + new
        certain = whole.rstrip("\n")
        self._held = whole[len(certain) :]
        if not certain:
            return []
        gap = "\n\n" if self._after_mark and self._begun[self.thinking] else ""
        self._after_mark, self._begun[self.thinking] = False, True
        return [(gap + certain, self.thinking)]

    def mark(self, thinking: bool) -> None:
        """Another part begins."""
        self.thinking, self._after_mark, self._held = thinking, True, ""

    def finish(self) -> list[Segment]:
        """What was held back."""
        rest, self._held = self._held, ""
        return [(rest, self.thinking)] if rest else []


class Tags:
    """An opening and a closing tag. An answer that is cut off before the closing one is all thinking."""

    def __init__(self, vocabulary: Vocabulary, tags: tuple[str, str], prompt: Sequence[int]) -> None:
        self._vocabulary, self._detokenizer = vocabulary, vocabulary.detokenizer()
        ids = [vocabulary.token_id(tag) for tag in tags]
        self._ids = {} if None in ids else {ids[0]: True, ids[1]: False}
        self._tags = {} if self._ids else {tags[0]: True, tags[1]: False}
        self._text = ""  # that may turn out to be the beginning of a tag
        tail = vocabulary.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()
        self._parts = _Parts(tail.endswith(tags[0]), after_mark=tail.endswith(tags))

    @property
    def thinking(self) -> bool:
        """See Splitter."""
        return self._parts.thinking

    def add(self, token: int) -> list[Segment]:
        """See Splitter."""
        if token not in self._ids:
            return self._divided(self._detokenizer.add(token))
        before = self._parts.text(self._detokenizer.finish())
        self._detokenizer = self._vocabulary.detokenizer()
        self._parts.mark(self._ids[token])
        return before

    def finish(self) -> list[Segment]:
        """See Splitter."""
        rest = self._divided(self._detokenizer.finish())
        held, self._text = self._text, ""
        return rest + self._parts.text(held) + self._parts.finish()

    def _divided(self, text: str) -> list[Segment]:
        if not self._tags:
            return self._parts.text(text)
        segments, self._text = [], self._text + text
        while found := [(at, tag) for tag in self._tags if (at := self._text.find(tag)) >= 0]:
            at, tag = min(found)
            segments += self._parts.text(self._text[:at])
            self._parts.mark(self._tags[tag])
            self._text = self._text[at + len(tag) :]
        certain = len(self._text) - max(_beginning(tag, self._text) for tag in self._tags)
        segments += self._parts.text(self._text[:certain])
        self._text = self._text[certain:]
        return segments


def _beginning(tag: str, text: str) -> int:
    """How many characters at the end of the text begin the tag."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)


class Channels:
    """Messages of harmony: ``<|start|>`` role ``<|channel|>`` channel ``<|message|>`` text ``<|end|>``.

    A recipient (``to=functions.weather``) may stand in the role's part or in the channel's. What is addressed to a
    tool, or written in another role than the assistant's, is no answer, on whatever channel. Text outside of a message
    is one. Source: the description of the format that OpenAI published with gpt-oss.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self._vocabulary, self._detokenizer = vocabulary, vocabulary.detokenizer()
        ids = {vocabulary.token_id(mark): mark for mark in (START, CHANNEL, MESSAGE, END, _CONSTRAIN, *_OTHER_ENDS)}
        self._marks = {token: mark for token, mark in ids.items() if token is not None}
        self._parts, self._header = _Parts(False, after_mark=False), None
        start = vocabulary.token_id(START)
        begin = next((at for at in range(len(prompt) - 1, -1, -1) if prompt[at] == start), len(prompt))
        for token in prompt[begin:]:
            self.add(token)
        self._parts = _Parts(self.thinking, after_mark=begin < len(prompt))

    @property
    def thinking(self) -> bool:
        """See Splitter."""
        return self._parts.thinking

    def add(self, token: int) -> list[Segment]:
        """See Splitter."""
        mark = self._marks.get(token)
        if mark is None:
            return self._text(self._detokenizer.add(token))
        before = self._text(self._detokenizer.finish())
        self._detokenizer = self._vocabulary.detokenizer()
        if mark == START:
            self._header = ""
        elif mark == MESSAGE:
            self._parts.mark(self.thinking if self._header is None else not _is_answer(self._header))
            self._header = None
        elif mark == CHANNEL:
            self._header = f"{self._header or ''} {mark} "
        elif mark == _CONSTRAIN:
            self._header = None if self._header is None else f"{self._header} {mark} "
        else:
            self._header = None
            self._parts.mark(False)
        return before

    def finish(self) -> list[Segment]:
        """See Splitter."""
        rest = self._text(self._detokenizer.finish())
        if self._header is not None and CHANNEL not in self._header and "to=" not in self._header:
            rest += self._parts.text(self._header.removeprefix("assistant"))
        return rest + self._parts.finish()

    def _text(self, text: str) -> list[Segment]:
        if self._header is None:
            return self._parts.text(text)
        self._header += text
        if CHANNEL in self._header or not self._header.startswith("assistant"):
            return []
        after_role = self._header.removeprefix("assistant")
        if "to=".startswith(after_role.lstrip()[:3]):
            return []
        self._header = None  # no header after all: the model writes without one
        self._parts.mark(False)
        return self._parts.text(after_role)


def _is_answer(header: str) -> bool:
    role, _, channel = header.partition(CHANNEL)
    if _RECIPIENT.search(header) or role.split()[:1] not in ([], ["assistant"]):
        return False
    return channel.split()[:1] != ["analysis"]


@dataclass
class Switches:
    """How a model is asked to think, or not to.

    Attributes:
        variables: for the chat template.
        flag: a text to put at the end of the system prompt; "" for none.
        warnings: what was asked for and cannot be done, or not in this way; a sentence each, without its subject.
    """

    variables: dict[str, Any] = field(default_factory=dict)
    flag: str = ""
    warnings: list[str] = field(default_factory=list)

    def system(self, prompt: str | None) -> str | None:
        """The system prompt with the flag; None where there is neither."""
        return "\n".join(part for part in (prompt, self.flag) if part) if self.flag else prompt


def switches(vocabulary: Vocabulary, think: bool | None = None, effort: str | None = None) -> Switches:
    """Find how a model's chat template switches its thinking, by the variables that it reads.

    Args:
        vocabulary: the model's tokenizer.
        think: whether to think; None leaves it to the model.
        effort: "low", "medium" or "high"; None leaves it to the model.
    """
    found, known = Switches(), vocabulary.template_variables
    has_effort = "reasoning_effort" in known
    if think is not None:
        flag = next((flag for flag in _FLAGS if flag in (vocabulary.chat_template or "")), "")
        found.variables = {name: think for name in _SWITCHES if name in known}
        if not found.variables and flag:
            found.flag = flag if not think else flag.replace("no_", "").replace("no", "")
        elif not found.variables and has_effort and not think:
            found.variables["reasoning_effort"] = EFFORTS[0]
            found.warnings.append("always thinks: it is asked for low effort instead")
        elif not found.variables and not has_effort:
            thinks = _tags(vocabulary) is not None
            found.warnings.append(
                f"{'cannot be told whether to think' if thinks else 'does not think'}: its chat template has no "
                "switch for that"
            )
    if effort is not None and has_effort:
        found.variables["reasoning_effort"] = effort
    elif effort is not None:
        found.warnings.append("knows no levels of effort: its chat template has no switch for that")
    return found
