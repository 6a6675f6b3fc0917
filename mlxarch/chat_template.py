"""Messages → the text a model was trained to see, by the chat template that comes with the model.

A template is found in ``chat_template.jinja``, else in ``chat_template.json``, else in tokenizer_config.json under
``chat_template`` (a string, or a list of named ones); ``additional_chat_templates/NAME.jinja`` adds named ones. With
tools, the one named ``tool_use`` is taken where there is one. Templates come from the model's folder and from nowhere
else: no variable of a request can replace one.
"""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from mlxarch.errors import ChatTemplateError, InvalidInput
from mlxarch.template_sandbox import MAX_TEMPLATE_BYTES, Sandbox
from mlxarch.untrusted import REMEDY, child, open_regular, read_exactly, read_json, shown

logger = logging.getLogger(__name__)

_SPECIAL_TOKENS = frozenset(f"{name}_token" for name in ("bos", "cls", "eos", "mask", "pad", "sep", "unk"))
_OURS = frozenset({"add_generation_prompt", "chat_template", "messages", "tools"})
_JINJA = frozenset({"caller", "dict", "kwargs", "loop", "namespace", "raise_exception", "range", "self"})
RESERVED_VARIABLES = _SPECIAL_TOKENS | _OURS | _JINJA | {"strftime_now", "varargs"}
"""Names that a caller's template variables may not have."""

_MAX_TEMPLATES = 32
_MAX_DEPTH = 64
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One template, compiled when it is first rendered.

    Args:
        source: the Jinja text.
        special_tokens: ``bos_token``, ``eos_token``, … as the template may name them.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._sandbox: Sandbox | None = None
        self._compiled: jinja2.Template | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: each with "role" and "content", as in the OpenAI API. Keys whose value is None are dropped.
            add_generation_prompt: end with what introduces the model's answer.
            tools: JSON schemas of functions.
            variables: further variables such as ``enable_thinking``; plain JSON values.

        Raises:
            InvalidInput: an argument is not of that form, or a variable has a reserved name.
            ChatTemplateError: the template refuses the messages, is broken, or exceeds a limit.
        """
        for name in variables or {}:
            if name in RESERVED_VARIABLES or not name.isidentifier() or name.startswith("_"):
                raise InvalidInput(
                    f"{shown(name)} is not allowed as a variable for the chat template; reserved are "
                    f"{', '.join(sorted(RESERVED_VARIABLES))}."
                )
        names = {
            **self._special_tokens,
            **_plain(dict(variables or {}), "variables"),
            "messages": _conversation(messages),
            "tools": None if tools is None else _plain(_sequence(tools, "tools"), "tools"),
            "documents": _plain((variables or {}).get("documents"), "documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        try:
            if self._sandbox is None or self._compiled is None:
                sandbox = Sandbox()
                self._compiled = sandbox.compile_template(self.source)
                self._sandbox = sandbox
            return self._sandbox.render(self._compiled, names)
        except ChatTemplateError:
            raise
        except jinja2.TemplateSyntaxError as problem:
            raise ChatTemplateError(f"The chat template is broken in line {problem.lineno}: {problem}.") from problem
        except RecursionError as problem:
            raise ChatTemplateError("The chat template calls itself too deeply.") from problem
        except Exception as problem:  # a template can provoke any error that Python has
            raise ChatTemplateError(f"The chat template refuses these messages: {_reason(problem)}") from problem


def find_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Name → Jinja text of the templates in a model's folder; the usual one is named "default".

    Raises:
        ChatTemplateError: a file is not what it must be.
    """
    found = _configured(tokenizer_config.get("chat_template"), "tokenizer_config.json")
    if os.path.lexists(folder / "chat_template.json"):
        content = read_json(child(folder, "chat_template.json"), error=ChatTemplateError)
        found |= _configured(content.get("chat_template"), "chat_template.json")
    if os.path.lexists(folder / "chat_template.jinja"):
        found["default"] = _text(child(folder, "chat_template.jinja"))
    more = folder / "additional_chat_templates"
    if more.is_dir() and not more.is_symlink():
        for name in sorted(entry for entry in os.listdir(more) if entry.endswith(".jinja"))[:_MAX_TEMPLATES]:
            found[name.removesuffix(".jinja")] = _text(_in_snapshot(folder, name))
    return found


def choose_template(templates: Mapping[str, str], tools: object) -> str | None:
    """The template for a conversation with or without tools; None where there is none."""
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates or not templates:
        return templates.get("default")
    return next(iter(templates.values())) if len(templates) == 1 else None


@functools.lru_cache(maxsize=8)
def template_variables(source: str) -> frozenset[str]:
    """Names that a template reads and does not make itself; none of a template that is broken or refused."""
    try:
        return frozenset(meta.find_undeclared_variables(Sandbox().syntax_tree(source)))
    except (ChatTemplateError, jinja2.TemplateError, RecursionError) as problem:
        logger.debug("the chat template does not say its variables: %s", problem)
        return frozenset()


def _in_snapshot(folder: Path, name: str) -> Path:
    path = folder / "additional_chat_templates" / name
    if path.is_symlink():  # as the Hub's cache has it: the blobs lie one level further up than for the other files
        target = Path(os.path.realpath(path))
        if folder.resolve().parent.name != "snapshots" or target.parent != folder.resolve().parents[1] / "blobs":
            raise ChatTemplateError(f"{path} is a symbolic link out of the model's folder. Put the file itself there.")
        return path
    return child(folder / "additional_chat_templates", name)


def _text(path: Path) -> str:
    descriptor, status = open_regular(path, ChatTemplateError)
    try:
        if status.st_size > MAX_TEMPLATE_BYTES:
            raise ChatTemplateError(
                f"{path}: the file has {status.st_size} bytes, and at most {MAX_TEMPLATE_BYTES} are read. {REMEDY}"
            )
        data = bytearray(status.st_size)
        read_exactly(descriptor, data, 0, path, ChatTemplateError)
    finally:
        os.close(descriptor)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ChatTemplateError(f"{path}: the file is not UTF-8 ({problem}). {REMEDY}") from problem


def _configured(value: Any, file: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    named = [value] if isinstance(value, dict) else value
    if isinstance(named, list) and len(named) <= _MAX_TEMPLATES:
        pairs = [(item.get("name"), item.get("template")) for item in named if isinstance(item, dict)]
        if len(pairs) == len(named) and all(isinstance(part, str) for pair in pairs for part in pair):
            return dict(pairs)  # type: ignore[arg-type]
    raise ChatTemplateError(
        f"{file}: chat_template is {shown(value)}; it must be a text, or a list of objects with name and template. "
        f"{REMEDY}"
    )


def _conversation(messages: Any) -> list[dict[str, Any]]:
    conversation = []
    for index, message in enumerate(_sequence(messages, "messages")):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidInput(
                f"messages[{index}] is {shown(message)}; a message is a mapping with 'role' (a text) and 'content'."
            )
        kept = {name: value for name, value in message.items() if value is not None}
        fields = _plain(kept, f"messages[{index}]")
        # The reasoning of an earlier answer goes by several names; templates read the first, gpt-oss the second.
        reasoning = next((fields[name] for name in _REASONING if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        conversation.append(fields)
    if not conversation:
        raise InvalidInput("messages is empty; a conversation has at least one message.")
    return conversation


def _sequence(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise InvalidInput(f"{name} is {shown(value)}; it must be a list.")
    return list(value)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of plain JSON values; a template never sees an object of another type, which may have methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > _MAX_DEPTH:
        raise InvalidInput(f"{where} nests deeper than {_MAX_DEPTH} levels.")
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, f"{where}[{shown(key)}]", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise InvalidInput(f"{where} is a {type(value).__name__}; allowed are the types of JSON: text, numbers, lists, …")


def _reason(problem: Exception) -> str:
    if isinstance(problem, jinja2.TemplateError) and not isinstance(problem, jinja2.UndefinedError):
        return str(problem.message or problem)[:2000]
    return f"{type(problem).__name__}: {problem}"[:2000]
