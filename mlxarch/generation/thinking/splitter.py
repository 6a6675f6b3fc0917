"""Thinking of a model: separated from its answer.

Two formats are known:

- Tags, ``<think>`` … ``</think>``, or Gemma 4's ``<|channel>thought`` … ``<channel|>``. They are
  found by token id where each is one token, else in the text.
- Channels of gpt-oss (harmony): messages, each with a header that names a channel and perhaps a
  recipient. Text of the ``analysis`` channel and text addressed to a tool are not part of the
  answer.

The end of the prompt says whether the answer begins with thinking, since a template may open the
thinking or close it at once. Marks (tags and channel tokens) and the newlines next to them are
removed from the text. Without marks, all text is the answer.

Length: the splitters of both formats share the protocol and the sections.
"""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>", "<channel|>"))
_HEADERS = {"<|channel>": "thought"}  # Gemma 4's word behind an opening tag, part of the mark
START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"

_CONSTRAIN, _OTHER_ENDS = "<|constrain|>", ("<|return|>", "<|call|>")
_RECIPIENT = re.compile(r"\bto=(?!user\b|assistant\b)\S")
_FUNCTION = re.compile(r"\bto=functions\.([A-Za-z0-9_.\-]+)")
_TAIL = 16  # tokens of the prompt that may hold an opening tag and the blanks behind it


class Segment(NamedTuple):
    """Text that is not empty, and whether it is thinking."""

    text: str
    thinking: bool


class Detokenizer(Protocol):
    """Incremental conversion of tokens to text."""

    def add(self, token: int) -> str:
        """Text that the token completes."""
        ...

    def finish(self) -> str:
        """Remaining text."""
        ...


class ThinkingTokenizer(Protocol):
    """Methods of a tokenizer that this file uses."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the chat template; None if there is none."""
        ...

    @property
    def template_variables(self) -> Collection[str]:
        """Variables that the template reads and does not define."""
        ...

    def token_id(self, token: str) -> int | None:
        """Id of a token; None if it does not exist."""
        ...

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...

    def detokenizer(self, *, after: Sequence[int] = ()) -> Detokenizer:
        """New detokenizer for a stream of tokens that continues ``after``."""
        ...


class Splitter(Protocol):
    """Separation of thinking from the answer while tokens arrive."""

    @property
    def thinking(self) -> bool:
        """Whether the next text belongs to the thinking, as far as is known."""
        ...

    def add(self, token: int) -> list[Segment]:
        """Segments of text that the token completes."""
        ...

    @property
    def recipient(self) -> str | None:
        """Function that the current message is addressed to; None for thinking and the answer."""
        ...

    def cut(self) -> list[Segment]:
        """Segments up to here: a token that is no text follows."""
        ...

    def raw(self, token: int) -> str:
        """Text that a token completes and that is neither thinking nor answer."""
        ...

    def finish(self) -> list[Segment]:
        """Remaining segments, after the last token."""
        ...

    @property
    def untagged(self) -> str:
        """Text that was presumed to be thinking, and that no tag confirmed; "" for none."""
        ...


def splitter(
    tokenizer: ThinkingTokenizer,
    prompt: Sequence[int],
    *,
    continues: bool = False,
    presumes: bool = False,
) -> Splitter:
    """Return the splitter for the answer to a prompt of token ids.

    Args:
        tokenizer: tokenizer of the model.
        prompt: its end says whether the answer begins with thinking.
        continues: whether the answer continues the text of the prompt.
        presumes: whether an answer is thinking from its first token if the prompt leaves it open
            and ``always_thinks`` holds.
    """
    if all(tokenizer.token_id(mark) is not None for mark in (START, CHANNEL, MESSAGE, END)):
        return ChannelSplitter(tokenizer, prompt)
    detokenizer = tokenizer.detokenizer(after=prompt if continues else ())
    tags = thinking_tags(tokenizer)
    if tags is None:
        return NoThinking(detokenizer)
    presumed = presumes and not continues and always_thinks(tokenizer)
    return TagSplitter(tokenizer, tags, prompt, detokenizer, presumed=presumed)


def split_at_closing_tag(tokenizer: ThinkingTokenizer, text: str) -> tuple[str, str]:
    """Split a complete answer whose thinking was closed without being opened.

    Returns:
        The thinking, and the answer; ("", ``text``) if there is no closing tag.
    """
    tags = thinking_tags(tokenizer)
    if tags is None or tags[1] not in text:
        return "", text
    thinking, _, answer = text.partition(tags[1])
    return thinking.strip("\n"), answer.lstrip("\n")


def thinking_tags(tokenizer: ThinkingTokenizer) -> tuple[str, str] | None:
    """Opening and closing tag of a model's thinking; None for a model without."""
    for pair in TAGS:
        if all(tokenizer.token_id(tag) is not None for tag in pair):
            return pair
    return next((pair for pair in TAGS if pair[1] in (tokenizer.chat_template or "")), None)


def always_thinks(tokenizer: ThinkingTokenizer) -> bool:
    """Whether every answer of a model begins with thinking, even where no tag opens it.

    So it is with DeepSeek-R1 and its distillations as first published: the tags are tokens, the
    template cuts earlier answers at the closing one, and nothing switches the thinking off.
    """
    template = tokenizer.chat_template or ""
    return (
        any(
            all(tokenizer.token_id(tag) is not None for tag in pair)
            and re.search(rf"split\(\s*['\"]{re.escape(pair[1])}['\"]", template)
            for pair in TAGS
        )
        and not any(
            word in name for name in tokenizer.template_variables for word in ("think", "reason")
        )
        and "no_think" not in template
        and "nothink" not in template
    )


def may_begin_to_think(tokenizer: ThinkingTokenizer, prompt: Sequence[int]) -> int | None:
    """Token with which a model may open its thinking itself.

    None if the prompt opens or closes the thinking already, or if there is no such token.
    """
    tags = thinking_tags(tokenizer)
    if tags is None or _tail_text(tokenizer, prompt).endswith(tags):
        return None
    return tokenizer.token_id(tags[0])


def _tail_text(tokenizer: ThinkingTokenizer, prompt: Sequence[int]) -> str:
    """Text at the end of a prompt, where a tag may stand."""
    return tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()


class NoThinking:
    """Splitter for a model without thinking: all text is the answer."""

    thinking = False
    recipient = None
    untagged = ""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer

    def add(self, token: int) -> list[Segment]:
        """Implement ``Splitter``."""
        text = self._detokenizer.add(token)
        return [Segment(text, False)] if text else []

    def cut(self) -> list[Segment]:
        """Implement ``Splitter``."""
        return self.finish()

    def raw(self, token: int) -> str:
        """Implement ``Splitter``."""
        return self._detokenizer.add(token)

    def finish(self) -> list[Segment]:
        """Implement ``Splitter``."""
        text = self._detokenizer.finish()
        return [Segment(text, False)] if text else []


class _Segmenter:
    """Text between marks, without the newlines next to a mark.

    Two sections of thinking, or of the answer, are separated by an empty line.
    """

    def __init__(self, thinking: bool, after_mark: bool) -> None:
        self.thinking = thinking
        self._after_mark = after_mark
        self._newlines = ""  # held back until text follows
        self._begun = {False: False, True: False}  # by whether it is thinking

    def text(self, new: str) -> list[Segment]:
        """Add text to the current section."""
        if self._after_mark:
            new = new.lstrip("\n")
        if not new:
            return []
        whole = self._newlines + new
        certain = whole.rstrip("\n")
        self._newlines = whole[len(certain) :]
        if not certain:
            return []
        gap = "\n\n" if self._after_mark and self._begun[self.thinking] else ""
        self._after_mark = False
        self._begun[self.thinking] = True
        return [Segment(gap + certain, self.thinking)]

    def mark(self, thinking: bool) -> None:
        """Begin another section."""
        self.thinking = thinking
        self._after_mark = True
        self._newlines = ""

    def finish(self) -> list[Segment]:
        """Remaining newlines."""
        rest = self._newlines
        self._newlines = ""
        return [Segment(rest, self.thinking)] if rest else []


class TagSplitter:
    """Splitter for an opening and a closing tag; without the closing one, all text is thinking.

    A closing tag without an opening one stays in the text, unless thinking is presumed: what was
    shown before it cannot be taken back, and ``split_at_closing_tag`` finds it in the complete
    answer.

    Args:
        tokenizer: tokenizer of the model.
        tags: opening and closing tag.
        prompt: its end says whether the answer begins with thinking.
        detokenizer: detokenizer of the answer.
        presumed: whether the answer begins with thinking where the prompt leaves it open.
    """

    recipient = None

    def __init__(
        self,
        tokenizer: ThinkingTokenizer,
        tags: tuple[str, str],
        prompt: Sequence[int],
        detokenizer: Detokenizer,
        *,
        presumed: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._closing_tag = tags[1]
        ids = [tokenizer.token_id(tag) for tag in tags]
        self._ids = {} if None in ids else {ids[0]: True, ids[1]: False}
        self._tags = {} if self._ids else {tags[0]: True, tags[1]: False}
        self._text = ""  # text that may begin a tag
        tail = _tail_text(tokenizer, prompt)
        self._header = _HEADERS.get(tags[0], "")
        opens = tail.endswith((tags[0], tags[0] + self._header))
        self._awaited = self._header if tail.endswith(tags[0]) else ""  # has not come yet
        self._held = ""  # text that may be its beginning
        self._opened = opens or tail.endswith(tags[1])
        self._presumed = presumed and not self._opened
        self._segmenter = _Segmenter(self._presumed or opens, after_mark=self._opened)
        self.untagged = ""

    @property
    def thinking(self) -> bool:
        """Implement ``Splitter``."""
        return self._segmenter.thinking

    def add(self, token: int) -> list[Segment]:
        """Implement ``Splitter``."""
        segments = self._add(token)
        if self._presumed:
            self.untagged += "".join(segment.text for segment in segments)
        return segments

    def _add(self, token: int) -> list[Segment]:
        if token not in self._ids:
            return self._split_at_tags(self._detokenizer.add(token))
        before = self._section(self._detokenizer.finish())
        self._detokenizer = self._tokenizer.detokenizer()
        return before + self._mark(self._ids[token])

    def _mark(self, opens: bool) -> list[Segment]:
        """Begin another section at a tag. Return the tag's text if it stays."""
        if self._presumed:
            self._presumed = False
            self._opened = True
            self.untagged = ""
        if not opens and not self._opened:
            return self._section(self._closing_tag)
        before = self._release()
        self._opened = True
        self._segmenter.mark(opens)
        self._awaited = self._header if opens else ""
        return before

    def _section(self, text: str) -> list[Segment]:
        """Add text to the current section, without the header of an opening tag."""
        if not self._awaited:
            return self._segmenter.text(text)
        self._held += text
        if len(self._held) < len(self._awaited) and self._awaited.startswith(self._held):
            return []
        self._held = self._held.removeprefix(self._awaited)
        return self._release()

    def _release(self) -> list[Segment]:
        """Give out what was held back for a header."""
        held = self._held
        self._held = self._awaited = ""
        return self._segmenter.text(held)

    def cut(self) -> list[Segment]:
        """Implement ``Splitter``."""
        before = self._split_at_tags(self._detokenizer.finish())
        before += self._section(self._text)
        self._text = ""
        self._segmenter.mark(self.thinking)
        return before

    def raw(self, token: int) -> str:
        """Implement ``Splitter``."""
        return self._detokenizer.add(token)

    def finish(self) -> list[Segment]:
        """Implement ``Splitter``."""
        rest = self._split_at_tags(self._detokenizer.finish())
        pending = self._text
        self._text = ""
        rest += self._section(pending) + self._release() + self._segmenter.finish()
        if self._presumed:
            self.untagged += "".join(segment.text for segment in rest)
        return rest

    def _split_at_tags(self, text: str) -> list[Segment]:
        if not self._tags:
            return self._section(text)
        segments: list[Segment] = []
        self._text += text
        while found := [(at, tag) for tag in self._tags if (at := self._text.find(tag)) >= 0]:
            at, tag = min(found)
            segments += self._section(self._text[:at])
            segments += self._mark(self._tags[tag])
            self._text = self._text[at + len(tag) :]
        certain = len(self._text) - max(_partial_match(tag, self._text) for tag in self._tags)
        segments += self._section(self._text[:certain])
        self._text = self._text[certain:]
        return segments


def _partial_match(tag: str, text: str) -> int:
    """Length of the longest beginning of ``tag`` at the end of ``text``."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)


class ChannelSplitter:
    """Splitter for harmony messages: ``<|start|>`` role ``<|channel|>`` channel ``<|message|>``
    text ``<|end|>``.

    A recipient (``to=functions.weather``) may follow the role or the channel. Text addressed to a
    tool, and text of another role than the assistant's, is not part of the answer, on any channel.
    Text outside of messages is. Source: the description of the format that OpenAI published with
    gpt-oss.
    """

    untagged = ""

    def __init__(self, tokenizer: ThinkingTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        ids = {
            tokenizer.token_id(mark): mark
            for mark in (START, CHANNEL, MESSAGE, END, _CONSTRAIN, *_OTHER_ENDS)
        }
        self._marks = {token: mark for token, mark in ids.items() if token is not None}
        self._segmenter = _Segmenter(False, after_mark=False)
        self._header: str | None = None  # of the message that begins; None within a message
        self.recipient: str | None = None
        start = tokenizer.token_id(START)
        last_start = next(
            (at for at in range(len(prompt) - 1, -1, -1) if prompt[at] == start), len(prompt)
        )
        for token in prompt[last_start:]:
            self.add(token)
        self._segmenter = _Segmenter(self.thinking, after_mark=last_start < len(prompt))

    @property
    def thinking(self) -> bool:
        """Implement ``Splitter``."""
        return self._segmenter.thinking

    def add(self, token: int) -> list[Segment]:
        """Implement ``Splitter``."""
        mark = self._marks.get(token)
        if mark is None:
            return self._text(self._detokenizer.add(token))
        before = self._text(self._detokenizer.finish())
        self._detokenizer = self._tokenizer.detokenizer()
        if mark == START:
            self._header = ""
            self.recipient = None
        elif mark == MESSAGE:
            self._begin_message()
        elif mark == CHANNEL:
            self._header = f"{self._header or ''} {mark} "
        elif mark == _CONSTRAIN:
            self._header = None if self._header is None else f"{self._header} {mark} "
        else:
            self._header = None
            self.recipient = None
            self._segmenter.mark(False)
        return before

    def _begin_message(self) -> None:
        if self._header is None:
            self._segmenter.mark(self.thinking)
            return
        self._segmenter.mark(not _is_answer(self._header))
        function = _FUNCTION.search(self._header)
        self.recipient = function[1] if function else None
        self._header = None

    def cut(self) -> list[Segment]:
        """Implement ``Splitter``."""
        return self._text(self._detokenizer.finish())

    def raw(self, token: int) -> str:
        """Implement ``Splitter``."""
        return self._detokenizer.add(token)

    def finish(self) -> list[Segment]:
        """Implement ``Splitter``."""
        rest = self._text(self._detokenizer.finish())
        if self._header is not None and CHANNEL not in self._header and "to=" not in self._header:
            rest += self._segmenter.text(self._header.removeprefix("assistant"))
        return rest + self._segmenter.finish()

    def _text(self, text: str) -> list[Segment]:
        if self._header is None:
            return self._segmenter.text(text)
        self._header += text
        if CHANNEL in self._header or not self._header.startswith("assistant"):
            return []
        after_role = self._header.removeprefix("assistant")
        if "to=".startswith(after_role.lstrip()[:3]):
            return []
        self._header = None  # no header after all: the model writes without one
        self._segmenter.mark(False)
        return self._segmenter.text(after_role)


def _is_answer(header: str) -> bool:
    """Whether a message with this header is part of the answer."""
    role, _, channel = header.partition(CHANNEL)
    if _RECIPIENT.search(header) or role.split()[:1] not in ([], ["assistant"]):
        return False
    return channel.split()[:1] != ["analysis"]
