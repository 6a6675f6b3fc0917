"""Form of a model's calls, by the marks of its vocabulary and its chat template."""

from collections.abc import Callable, Sequence

from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.form import CallForm
from mlxarch.tool_calls.forms.bare_keys import BareKeys
from mlxarch.tool_calls.forms.channel_form import ChannelCalls
from mlxarch.tool_calls.forms.json_forms import (
    FencedSections,
    MarkedList,
    MarkedNames,
    NumberedSections,
    TaggedObjects,
)
from mlxarch.tool_calls.forms.python_forms import BareCalls, PythonLines, PythonList
from mlxarch.tool_calls.forms.xml_forms import TaggedPairs, TaggedParameters

Check = Callable[[Tokenizer, str], bool]


def _tokens(*marks: str) -> Check:
    """Whether the vocabulary has some tokens."""
    return lambda tokenizer, template: all(tokenizer.token_id(mark) is not None for mark in marks)


def _template(*texts: str) -> Check:
    """Whether the chat template has some texts."""
    return lambda tokenizer, template: all(text in template for text in texts)


# The first that holds counts: some marks occur in several forms
_FORMS: Sequence[tuple[Check, type[CallForm]]] = (
    (_tokens("<|start|>", "<|channel|>", "<|message|>", "<|call|>"), ChannelCalls),
    (_template("<|tool_calls_section_begin|>"), NumberedSections),
    (_template("<｜tool▁calls▁begin｜>"), FencedSections),
    (_template("[TOOL_CALLS]", "[ARGS]"), MarkedNames),
    (_template("[TOOL_CALLS]"), MarkedList),
    (_template("<arg_key>"), TaggedPairs),
    (_template("<function=", "<parameter="), TaggedParameters),
    (_template("<function_calls>"), PythonLines),
    (_template("<|tool_call_start|>"), PythonList),
    (_template("<|tool_call>call:"), BareKeys),
    (_template("<tool_call>"), TaggedObjects),
    (_template('"parameters": ', "tool_calls"), BareCalls),
)


def call_form(tokenizer: Tokenizer) -> CallForm | None:
    """Return the form of calls that a model was trained on; None if its template knows no tools."""
    template = tokenizer.tool_template or ""
    for holds, form in _FORMS:
        if holds(tokenizer, template):
            return form(tokenizer)
    return None
