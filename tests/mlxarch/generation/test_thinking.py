"""Thinking and answer, however the text is cut into tokens."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxarch import Tokenizer
from mlxarch.generation.answer import AnswerReader, BatchRow, whole_answer
from mlxarch.generation.thinking.splitter import (
    Segment,
    Splitter,
    always_thinks,
    split_at_closing_tag,
    splitter,
)
from mlxarch.generation.thinking.switches import switches
from mlxarch.generation.timings import Timings
from mlxarch.tokenizer.chat_template import template_variables

# the 256 characters that stand for bytes in a byte-level vocabulary
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = [chr(code) for code in [*PRINTABLE, *range(256, 512 - len(PRINTABLE))]]
TEMPLATES = Path(__file__).parents[2] / "fixtures" / "chat_templates"
HARMONY = [
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
]
TAGS = ["<think>", "</think>"]
MENTIONS_TAGS = "{{ messages[0].content }}{% if '</think>' in messages[0].content %}{% endif %}"


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """A tokenizer with a token for each byte, and the marks."""

    def write(*marks: str, special: bool = False, template: str | None = None) -> Tokenizer:
        folder = tmp_path_factory.mktemp("tokenizer")
        vocabulary = {token: number for number, token in enumerate([*ALPHABET, *marks])}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [
            {"id": vocabulary[mark], "content": mark, "special": special} | plain for mark in marks
        ]
        level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False}
        file = {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": level,
            "decoder": level,
            "model": model,
        }
        (folder / "tokenizer.json").write_text(json.dumps(file))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template} if template else {})
        )
        return Tokenizer.from_folder(folder)

    return write


@pytest.fixture(scope="module")
def tagged(make) -> Tokenizer:
    return make(*TAGS)


@pytest.fixture(scope="module")
def worded(make) -> Tokenizer:
    """Its tags are several tokens; the template tells of them."""
    return make(template=MENTIONS_TAGS)


CHANNELS = [  # of Gemma 4
    ("turn:", "<|channel>thought\nhm\n<channel|>4", "hm", "4"),
    ("turn:", "<|channel>thought", "", ""),
    ("turn:", "<|channel>though", "though", ""),  # cut off within the header
    ("turn:", "<|channel>thoughts\n<channel|>4", "s", "4"),
    ("turn:", "<|channel>other<channel|>4", "other", "4"),
    ("turn:", "a thought", "", "a thought"),
    ("turn: <|channel>thought\n", "hm<channel|>4", "hm", "4"),
    ("turn: <|channel>", "thought\nhm<channel|>4", "hm", "4"),
    ("turn: <|channel>thought\n<channel|>", "4", "", "4"),
]


@pytest.mark.parametrize(("prompt", "answer", "thinking", "text"), CHANNELS)
def test_the_thinking_channel_of_gemma_is_split_off(make, prompt, answer, thinking, text):
    for special in (True, False):
        tokenizer = make("<|channel>", "<channel|>", special=special)
        assert said(tokenizer, prompt, answer) == (thinking, text)


@pytest.fixture(scope="module")
def harmony(make) -> Tokenizer:
    return make(*HARMONY, special=True)


def collected(segments: Sequence[Segment]) -> tuple[str, str]:
    """Thinking and answer."""
    return tuple(
        "".join(text for text, thinking in segments if thinking is kind) for kind in (True, False)
    )  # type: ignore[return-value]


def said(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[str, str]:
    split = splitter(tokenizer, tokenizer.encode(prompt))
    return collected(
        [
            *(part for token in tokenizer.encode(answer) for part in split.add(token)),
            *split.finish(),
        ]
    )


# Tags

DIVISIONS = [
    ("user:", "<think>\nhm\n</think>\n\n4", "hm", "4"),
    ("user:", "<think>\n\n</think>\n\n4", "", "4"),
    ("user:", "\n<think>hm</think>\n4\n", "hm", "4\n"),  # as GLM writes it
    ("user:", "plain\n\n", "", "plain\n\n"),
    ("user:", "\n plain", "", "\n plain"),
    ("user:", "<think>cut off", "cut off", ""),
    ("user:", "<think>cut\n", "cut\n", ""),
    ("user:", "", "", ""),
    ("user: <think>\n", "hm\n</think>\n4", "hm", "4"),  # the template opens it
    ("user: <think>", "\nhm</think>4", "hm", "4"),
    ("user: <think>\n", "never closed", "never closed", ""),
    ("user: <think>\n\n</think>\n\n", "4", "", "4"),  # the template closes it at once
    ("user: <think></think>", "\n4", "", "4"),
    (
        "user: what is <think>? assistant:",
        "a tag",
        "",
        "a tag",
    ),  # said by the user, not opened by the template
    ("user:", "<think>a</think>b<think>c</think>d", "a\n\nc", "b\n\nd"),
    ("user:", "4\n</think>\n\n5", "", "4\n</think>\n\n5"),  # a closing tag alone stays
    ("user:", "<think></think>4</think>5", "", "4\n\n5"),  # the second one is a mark again
    ("user:", "<think>日本🙂</think>é🙂", "日本🙂", "é🙂"),
    ("user:", "1 < 2 <thin </ <think", "", "1 < 2 <thin </ <think"),
    ("user:", "<think>a < b </thin > </thin", "a < b </thin > </thin", ""),
]


@pytest.mark.parametrize("kind", ["tagged", "worded"])
@pytest.mark.parametrize(("prompt", "answer", "thinking", "text"), DIVISIONS)
def test_what_stands_between_the_tags_is_thinking(request, kind, prompt, answer, thinking, text):
    assert said(request.getfixturevalue(kind), prompt, answer) == (thinking, text)


@pytest.mark.parametrize("kind", ["tagged", "worded"])
def test_a_complete_answer_is_split_at_a_closing_tag_alone(
    kind: str, request: pytest.FixtureRequest, make
):
    tokenizer = request.getfixturevalue(kind)
    _, text = said(tokenizer, "user:", "plan\n</think>\n\nanswer")
    assert split_at_closing_tag(tokenizer, text) == ("plan", "answer")
    assert split_at_closing_tag(tokenizer, "answer") == ("", "answer")
    assert split_at_closing_tag(make(), text) == ("", text)  # a model that does not think
    row = BatchRow(AnswerReader(tokenizer, tokenizer.encode("user:"), ()))
    for token in tokenizer.encode("plan\n</think>\n\nanswer"):
        row.add(token)
    result = row.result(Timings(1))
    assert (result.thinking, result.text) == ("plan", "answer")


CUTS_AT_THE_TAG = "{{ messages[0].content.split('</think>')[-1] }}"


@pytest.mark.parametrize(
    ("answer", "streamed", "whole"),
    [
        ("plan\n</think>\n\nanswer", ("plan", "answer"), ("plan", "answer")),
        ("<think>plan</think>answer", ("plan", "answer"), ("plan", "answer")),
        ("answer", ("answer", "answer"), ("", "answer")),  # it did not think
    ],
)
def test_a_model_that_always_thinks_begins_without_a_tag(answer, streamed, whole, make):
    tokenizer = make(*TAGS, template=CUTS_AT_THE_TAG)

    def read(**settings) -> tuple[str, str]:
        reader = AnswerReader(tokenizer, tokenizer.encode("user:"), (), **settings)
        events = [event for token in tokenizer.encode(answer) for event in reader.add(token)]
        reader.ended = True  # as an end token does
        return collected(cast("list[Segment]", [*events, *reader.finish()]))

    assert read() == streamed
    assert whole_answer(tokenizer, *read()) == whole
    # negative control: nothing is presumed of a text that goes on, and of an answer with a form
    if "<think>" not in answer:
        assert read(continues=True) == read(constrained=True) == ("", answer)


def test_an_answer_that_is_cut_off_stays_thinking(make):
    tokenizer = make(*TAGS, template=CUTS_AT_THE_TAG)
    row = BatchRow(AnswerReader(tokenizer, tokenizer.encode("user:"), ()))
    for token in tokenizer.encode("pla"):
        row.add(token)
    result = row.result(Timings(1))
    assert (result.thinking, result.text) == ("pla", "")


@pytest.mark.parametrize(
    "template",
    [
        MENTIONS_TAGS,
        CUTS_AT_THE_TAG + "{% if enable_thinking %}{% endif %}",
        CUTS_AT_THE_TAG + "{{ '/no_think' }}",
    ],
)
def test_a_model_that_may_answer_at_once_is_not_presumed_to_think(template, make):
    tokenizer = make(*TAGS, template=template)
    assert not always_thinks(tokenizer)
    assert not always_thinks(make(template=CUTS_AT_THE_TAG))  # its tags are no tokens
    assert always_thinks(make(*TAGS, template=CUTS_AT_THE_TAG))


def test_a_model_without_tags_is_passed_through(make):
    text = "<think>\nhm\n</think>\n\n4\n"
    assert said(make(), "user: <think>\n", text) == ("", text)
    assert said(make(template="{{ messages[0].content }}"), "user:", text) == ("", text)
    half = "<|start|>assistant" + text
    assert said(make("<|end|>", "<|start|>"), "user:", half) == ("", half), (
        "half of harmony's marks is not harmony"
    )
    assert said(make("<think>"), "user:", text) == ("", text), "an opening tag alone neither"


def test_tags_that_are_special_tokens_and_those_of_mistral_work_too(make):
    assert said(make(*TAGS, special=True), "user: <think>\n", "hm</think>4") == ("hm", "4")
    assert said(make("[THINK]", "[/THINK]", special=True), "user:", "[THINK]hm[/THINK]4") == (
        "hm",
        "4",
    )


def test_tags_as_text_are_no_marks_where_they_are_tokens(tagged):
    letters = [tagged.encode(letter)[0] for letter in "</think>"]
    split = splitter(tagged, tagged.encode("user: <think>\n"))
    assert collected([part for token in letters for part in split.add(token)]) == ("</think>", "")


def test_half_a_character_before_a_tag_shows_as_one_that_is_lost(tagged):
    half, close, rest = tagged.encode("é")[0], tagged.token_id("</think>"), tagged.encode("4")
    split = splitter(tagged, tagged.encode("<think>"))
    assert collected([part for token in [half, close, *rest] for part in split.add(token)]) == (
        "\ufffd",
        "4",
    )


def test_the_state_is_known_before_the_first_token(tagged, worded, harmony):
    for tokenizer in (tagged, worded):
        assert splitter(tokenizer, tokenizer.encode("x<think>\n")).thinking
        assert not splitter(tokenizer, tokenizer.encode("x")).thinking
    assert splitter(
        harmony, harmony.encode("<|start|>assistant<|channel|>analysis<|message|>so")
    ).thinking
    assert not splitter(harmony, harmony.encode("<|start|>assistant")).thinking


def test_nothing_that_may_begin_a_tag_is_passed_on_before_it_is_certain(worded):
    split = splitter(worded, worded.encode("user:"))
    passed = [collected(split.add(token))[1] for token in worded.encode("a<thi<think>")]
    assert passed == ["a", *[""] * 4, "<thi", *[""] * 6]


# Harmony

OPEN = "<|start|>user<|message|>2+2<|end|><|start|>assistant"
MESSAGES = [
    (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        "hm",
        "4",
    ),
    ("<|channel|>final<|message|>4", "", "4"),
    ("<|message|>no channel", "", "no channel"),
    ("<|channel|>analysis<|message|>cut off", "cut off", ""),
    ("<|channel|>anal", "", ""),
    ("", "", ""),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>",
        "a\n\nb",
        "",
    ),
    (
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>4",
        "",
        "I look.\n\n4",
    ),
    # calls of tools: recipient in the channel's part or in the role's, on any channel
    (
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        '{"a": 1}',
        "",
    ),
    (' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', '{"a": 1}', ""),
    ("<|channel|>analysis to=functions.f<|message|>{}<|call|>", "{}", ""),
    ("<|channel|>final to=browser.open<|constrain|>json<|message|>{}<|call|>", "{}", ""),
    ("<|channel|>final to=user<|message|>4", "", "4"),
    # what models do that were not taught well
    ("<|channel|>final<|constrain|>json<|message|>{}", "", "{}"),
    ("<|channel|>analysis<|message|>hm<|channel|>final<|message|>4", "hm", "4"),
    ("<|channel|>analysis<|message|>hm<|start|>assistant<|channel|>final<|message|>4", "hm", "4"),
    ("<|channel|>analysis<|constrain|>json<|message|>{}", "{}", ""),
    ("<|channel|>analysis<|message|>a<|message|>b", "a\n\nb", ""),
    ("<|channel|>analysis<|message|>hm<|end|>outside", "hm", "outside"),
    ("<|channel|>summary<|message|>unknown channel", "", "unknown channel"),
    ("<|channel|>final<|message|>4<|end|><|start|>user<|message|>and 3+3?", "and 3+3?", "4"),
    ("<|channel|>final<|message|>a<|constrain|>b", "", "ab"),
    (" plain text", "", " plain text"),
    ("to the point", "", "to the point"),
    ("no header<|end|><|start|>assistant<|channel|>final<|message|>4", "", "no header\n\n4"),
    (" to=functions.f", "", ""),
    ("t", "", "t"),
    ("<|end|>outside", "", "outside"),
]


@pytest.mark.parametrize(("answer", "thinking", "text"), MESSAGES)
def test_channels_divide_what_gpt_oss_writes(harmony, answer, thinking, text):
    assert said(harmony, OPEN, answer) == (thinking, text)


@pytest.mark.parametrize(
    ("prompt", "answer", "division"),
    [
        ("<|start|>assistant<|channel|>analysis<|message|>", "hm<|end|>", ("hm", "")),
        ("<|start|>assistant<|channel|>final<|message|>", "4", ("", "4")),
        ("<|start|>assistant<|channel|>", "analysis<|message|>hm", ("hm", "")),
        ("no marks at all", "4", ("", "4")),
        (
            "<|start|>user<|message|>hi<|end|>",
            "<|start|>assistant<|channel|>analysis<|message|>hm",
            ("hm", ""),
        ),
    ],
)
def test_the_end_of_the_prompt_says_where_harmony_begins(harmony, prompt, answer, division):
    assert said(harmony, prompt, answer) == division


# However it is cut

LETTERS = st.text(st.sampled_from("ab<>/think é🙂\n"), max_size=8)
PARTS = st.lists(LETTERS | st.sampled_from(TAGS), max_size=7)
HARMONY_PARTS = st.lists(
    LETTERS
    | st.sampled_from([*HARMONY, "assistant", "analysis", "final", " to=functions.f", "to=user"]),
    max_size=9,
)


class Fed:
    """A tokenizer whose tokens are texts: a text can then be cut anywhere, as no real vocabulary could."""

    chat_template, template_variables = MENTIONS_TAGS, ()

    def __init__(self, marks: Sequence[str]) -> None:
        self.marks, self.texts = list(marks), []

    def token_id(self, token: str) -> int | None:
        return -1 - self.marks.index(token) if token in self.marks else None

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(
            self.texts[token] if token >= 0 else self.marks[-1 - token] for token in tokens
        )

    def detokenizer(self, *, after: Sequence[int] = ()) -> "Fed":
        return self

    def add(self, token: int) -> str:
        return self.texts[token]

    def finish(self) -> str:
        return ""

    def tokens(self, parts: Sequence[str], draw: random.Random | None) -> list[int]:
        """A mark is a token; other texts are cut at random, or not at all."""
        out = []
        for part in parts:
            if part in self.marks:
                out.append(self.token_id(part))
                continue
            cuts = sorted(draw.choices(range(len(part) + 1), k=draw.randint(0, 4))) if draw else []
            for begin, end in zip([0, *cuts], [*cuts, len(part)], strict=True):
                self.texts.append(part[begin:end])
                out.append(len(self.texts) - 1)
        return out


def divided(split: Splitter, tokens: Sequence[int]) -> tuple[str, str]:
    segments = [*(part for token in tokens for part in split.add(token)), *split.finish()]
    assert all(text for text, _ in segments), "a segment is never empty"
    return collected(segments)


@pytest.mark.parametrize("marks", [[], TAGS, HARMONY], ids=["as text", "as tokens", "harmony"])
@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_any_way_to_cut_gives_the_same_division(marks, data, seed):
    parts = data.draw(HARMONY_PARTS if marks == HARMONY else PARTS)
    prompt = data.draw(
        st.sampled_from(["x", "x<think>\n", "<|start|>assistant", "<|start|>assistant<|channel|>"])
    )
    fed, draw = Fed(marks), random.Random(seed)
    texts = [part for part in parts if part]
    whole = [text for text in ["".join(texts)] if text] if not marks else texts
    begin = fed.tokens([prompt], None)
    if marks == HARMONY and prompt != "x":
        begin = fed.tokens(
            ["<|start|>", "assistant", *(["<|channel|>"] if "channel" in prompt else [])], None
        )
    expected = divided(splitter(fed, begin), fed.tokens(whole, None))
    assert divided(splitter(fed, begin), fed.tokens(texts, draw)) == expected
    if marks != HARMONY:
        opened = prompt.startswith("x<think>")
        kept = sorted("".join(expected).replace("\n", ""))
        assert kept == sorted(_unmarked(texts, marks, opened).replace("\n", "")), (
            "no other character is lost"
        )


def _unmarked(parts: Sequence[str], marks: Sequence[str], opened: bool) -> str:
    """The text without tags; closing ones stay until one opens."""
    if not marks:
        parts = re.split("(</?think>)", "".join(parts))
    out = ""
    for part in parts:
        opened |= part == TAGS[0]
        if part not in TAGS or (part == TAGS[1] and not opened):
            out += part
    return out


# Switches


@pytest.mark.parametrize(
    ("template", "think", "effort", "variables", "flag", "warned"),
    [
        ("qwen3_thinking.jinja", False, None, {"enable_thinking": False}, "", ""),
        ("qwen3_thinking.jinja", True, None, {"enable_thinking": True}, "", ""),
        ("qwen3_thinking.jinja", None, "high", {}, "", "no levels of effort"),
        ("qwen3_thinking.jinja", None, None, {}, "", ""),
        ("harmony.jinja", None, "high", {"reasoning_effort": "high"}, "", ""),
        ("harmony.jinja", True, None, {}, "", ""),
        ("harmony.jinja", False, None, {"reasoning_effort": "low"}, "", "always thinks"),
        ("harmony.jinja", False, "high", {"reasoning_effort": "high"}, "", "always thinks"),
        ("llama3.jinja", True, None, {}, "", "does not think"),
        ("llama3.jinja", False, "low", {}, "", "does not think no levels"),
        # as SmolLM3 does it, DeepSeek-V3.1, Nemotron, GLM, DeepSeek-R1
        ("{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
         "{{ '/no_think' if not enable_thinking }}", False, None, {"enable_thinking": False}, "", ""),
        ("{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}",
         True, None, {"thinking": True}, "", ""),
        ("{{ '</think>' if '/no_think' in messages[0].content }}", False, None, {}, "/no_think", ""),
        ("{{ '</think>' if '/no_think' in messages[0].content }}", True, None, {}, "/think", ""),
        ("{{ '/nothink' if enable_thinking is defined and not enable_thinking }}",
         False, None, {"enable_thinking": False}, "", ""),
        ("{{ messages[0].content.split('</think>')[-1] }}<think>\n", False, None, {}, "", "cannot be told"),
        ("{{ enable_thinking }}{{ reasoning_effort }}", False, "low",
         {"enable_thinking": False, "reasoning_effort": "low"}, "", ""),
        ("{{ enable_thinking }}{{ reasoning_effort }}", False, None, {"enable_thinking": False}, "", ""),
        (None, True, "low", {}, "", "does not think no levels"),
    ],
)  # fmt: skip
def test_a_switch_is_found_in_the_template_or_said_to_be_missing(
    make, template, think, effort, variables, flag, warned
):
    if template and template.endswith(".jinja"):
        template = (TEMPLATES / template).read_text()
    found = switches(make(template=template), think, effort)
    assert (found.variables, found.flag) == (variables, flag)
    assert bool(found.warnings) is bool(warned)
    assert all(word in " ".join(found.warnings) for word in warned.split(" ")), found.warnings


def test_a_switch_changes_what_the_template_renders(make):
    qwen, gpt = (
        make(template=(TEMPLATES / f"{name}.jinja").read_text())
        for name in ("qwen3_thinking", "harmony")
    )
    prompts = {
        think: qwen.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, **switches(qwen, think).variables
        )
        for think in (True, False)
    }
    assert prompts[False].removeprefix(prompts[True]) == "<think>\n\n</think>\n\n"
    high = gpt.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, **switches(gpt, None, "high").variables
    )
    assert "Reasoning: high" in high


def test_the_flag_goes_behind_the_system_prompt(make):
    found = switches(make(template="{{ '</think>' if '/no_think' in messages[0].content }}"), False)
    assert found.system("Be brief") == "Be brief\n/no_think" and found.system(None) == "/no_think"
    nothing = switches(make(), None)
    assert nothing.system("Be brief") == "Be brief" and nothing.system(None) is None


def test_variables_are_those_that_a_template_reads_from_outside():
    assert template_variables(
        "{% set a = b %}{{ a }}{% for c in messages %}{{ c.d }}{% endfor %}"
    ) == {"b", "messages"}
    assert template_variables("{% macro m() %}{{ reasoning_effort }}{% endmacro %}{{ m() }}") == {
        "reasoning_effort"
    }
    for broken in ("{% if %}", "{% include 'x' %}", "{{ " * 3, ""):
        assert template_variables(broken) == frozenset()
