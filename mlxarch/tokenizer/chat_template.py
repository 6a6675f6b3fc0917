"""Chat templates: format messages as the text that a model was trained on.

The template comes from ``chat_template.jinja``, else ``chat_template.json``, else ``chat_template``
in tokenizer_config.json (a string, or a list of named templates).
``additional_chat_templates/NAME.jinja`` adds named ones. With tools, the template named
``tool_use`` is used if there is one. Templates are read from the model's folder only: no variable
of a request can replace one.
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
from mlxarch.system.untrusted_files import (
    REMEDY,
    open_regular_file,
    read_exactly,
    read_json,
    safe_path,
    short_repr,
)
from mlxarch.tokenizer.control_tokens import MessageMarker
from mlxarch.tokenizer.jinja.sandbox import MAX_TEMPLATE_BYTES, Sandbox

logger = logging.getLogger(__name__)

_SPECIAL_TOKENS = frozenset(
    f"{name}_token" for name in ("bos", "cls", "eos", "mask", "pad", "sep", "unk")
)
_RENDER_ARGUMENTS = frozenset({"add_generation_prompt", "chat_template", "messages", "tools"})
_JINJA_NAMES = frozenset(
    {"caller", "dict", "kwargs", "loop", "namespace", "raise_exception", "range", "self"}
)
RESERVED_VARIABLES = (
    _SPECIAL_TOKENS | _RENDER_ARGUMENTS | _JINJA_NAMES | {"strftime_now", "varargs"}
)
"""Names that a caller's template variables may not have."""

ADDITIONAL_FOLDER = "additional_chat_templates"
"""Folder of named templates beside tokenizer_config.json."""
_MAX_TEMPLATES = 32
_MAX_DEPTH = 64
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_MAX_MESSAGE_LENGTH = 2000  # of an error in the template, in characters


class ChatTemplate:
    """One template, compiled when it is rendered for the first time.

    Args:
        source: Jinja source.
        special_tokens: ``bos_token``, ``eos_token``, … -> text; variables of the template.
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
        marker: MessageMarker | None = None,
    ) -> str:
        """Render the prompt for a conversation.

        Args:
            messages: mappings with "role" and "content", as in the OpenAI API. Keys whose value is
                None are dropped.
            add_generation_prompt: end with the text that introduces the model's answer.
            tools: JSON schemas of functions.
            variables: further variables such as ``enable_thinking``; plain JSON values.
            marker: puts marks into control tokens that messages, tools and documents spell.

        Raises:
            InvalidInput: an argument has the wrong form, or a variable has a reserved name.
            ChatTemplateError: the template rejects the messages, is broken, or exceeds a limit.
        """
        variables = dict(variables or {})
        _check_variable_names(variables)
        context = {
            **self._special_tokens,
            **_copy_json(variables, "variables"),
            "messages": _normalize_messages(messages),
            "tools": None if tools is None else _copy_json(_check_list(tools, "tools"), "tools"),
            "documents": _copy_json(variables.get("documents"), "documents"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        if marker is not None:
            context["messages"] = [marker.mark_message(each) for each in context["messages"]]
            context |= {name: marker.mark(context[name]) for name in ("tools", "documents")}
        try:
            if self._sandbox is None or self._compiled is None:
                sandbox = Sandbox()
                self._compiled = sandbox.compile_template(self.source)
                self._sandbox = sandbox
            return self._sandbox.render(self._compiled, context)
        except ChatTemplateError:
            raise
        except jinja2.TemplateSyntaxError as problem:
            raise ChatTemplateError(
                f"The chat template is broken in line {problem.lineno}: {problem}."
            ) from problem
        except RecursionError as problem:
            raise ChatTemplateError("The chat template calls itself too deeply.") from problem
        except Exception as problem:  # a template can raise any of Python's exceptions
            raise ChatTemplateError(
                f"The chat template refuses these messages: {_error_message(problem)}"
            ) from problem


def find_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> Jinja source of the templates in a model's folder.

    The template for ordinary use is named "default".

    Raises:
        ChatTemplateError: a file is malformed or too large.
    """
    found = named_templates(tokenizer_config.get("chat_template"), "tokenizer_config.json")
    if os.path.lexists(folder / "chat_template.json"):
        content = read_json(safe_path(folder, "chat_template.json"), error=ChatTemplateError)
        found |= named_templates(content.get("chat_template"), "chat_template.json")
    if os.path.lexists(folder / "chat_template.jinja"):
        found["default"] = read_template(safe_path(folder, "chat_template.jinja"))
    return found | read_additional_templates(folder)


def read_additional_templates(folder: Path) -> dict[str, str]:
    """Return name -> Jinja source of the templates in ``additional_chat_templates``.

    Raises:
        ChatTemplateError: a file is malformed or too large.
    """
    additional = folder / ADDITIONAL_FOLDER
    if not additional.is_dir() or additional.is_symlink():
        return {}
    names = sorted(name for name in os.listdir(additional) if name.endswith(".jinja"))
    return {
        name.removesuffix(".jinja"): read_template(_additional_template_path(folder, name))
        for name in names[:_MAX_TEMPLATES]
    }


def choose_template(templates: Mapping[str, str], tools: object) -> str | None:
    """Return the template for a conversation with or without tools; None if there is none."""
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates or not templates:
        return templates.get("default")
    return next(iter(templates.values())) if len(templates) == 1 else None


@functools.lru_cache(maxsize=8)
def template_variables(source: str) -> frozenset[str]:
    """Return the variables that a template reads and does not define itself.

    The result is empty for a template that is broken or exceeds a limit.
    """
    try:
        return frozenset(meta.find_undeclared_variables(Sandbox().parse_template(source)))
    except (ChatTemplateError, jinja2.TemplateError, RecursionError) as problem:
        logger.debug("the chat template's variables are unknown: %s", problem)
        return frozenset()


def _additional_template_path(folder: Path, name: str) -> Path:
    """Return the path of a template in ``additional_chat_templates``, a symbolic link checked."""
    path = folder / ADDITIONAL_FOLDER / name
    if not path.is_symlink():
        return safe_path(folder / ADDITIONAL_FOLDER, name)
    # The Hub's cache links to its blobs folder, which from here is one level further up than for
    # the files that ``safe_path`` knows.
    target = Path(os.path.realpath(path))
    snapshot = folder.resolve()
    if snapshot.parent.name != "snapshots" or target.parent != snapshot.parents[1] / "blobs":
        raise ChatTemplateError(
            f"{path} is a symbolic link out of the model's folder. Put the file itself there."
        )
    return path


def read_template(path: Path) -> str:
    """Return the Jinja source in a file; raises ChatTemplateError if it is malformed."""
    descriptor, status = open_regular_file(path, ChatTemplateError)
    try:
        if status.st_size > MAX_TEMPLATE_BYTES:
            raise ChatTemplateError(
                f"{path}: the file has {status.st_size} bytes, and at most {MAX_TEMPLATE_BYTES} "
                f"are read. {REMEDY}"
            )
        data = bytearray(status.st_size)
        read_exactly(descriptor, data, 0, path, ChatTemplateError)
    finally:
        os.close(descriptor)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ChatTemplateError(f"{path}: the file is not UTF-8 ({problem}). {REMEDY}") from problem


def named_templates(value: Any, file: str) -> dict[str, str]:
    """Return name -> source from a ``chat_template`` value: a text, or objects with a name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    items = [value] if isinstance(value, dict) else value
    if isinstance(items, list) and len(items) <= _MAX_TEMPLATES:
        templates: dict[str, str] = {}
        for item in items:
            name = item.get("name") if isinstance(item, dict) else None
            template = item.get("template") if isinstance(item, dict) else None
            if not isinstance(name, str) or not isinstance(template, str):
                break
            templates[name] = template
        else:
            return templates
    raise ChatTemplateError(
        f"{file}: chat_template is {short_repr(value)}; it must be a text, or a list of objects "
        f"with name and template. {REMEDY}"
    )


def _check_variable_names(variables: Mapping[str, Any]) -> None:
    for name in variables:
        if name in RESERVED_VARIABLES or not name.isidentifier() or name.startswith("_"):
            raise InvalidInput(
                f"{short_repr(name)} is not allowed as a variable for the chat template; reserved "
                f"are {', '.join(sorted(RESERVED_VARIABLES))}."
            )


def _normalize_messages(messages: Any) -> list[dict[str, Any]]:
    """Return a copy of the messages, without keys that are None and with both reasoning keys."""
    normalized = []
    for index, message in enumerate(_check_list(messages, "messages")):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidInput(
                f"messages[{index}] is {short_repr(message)}; a message is a mapping with 'role' "
                "(a text) and 'content'."
            )
        given = {name: value for name, value in message.items() if value is not None}
        fields = _copy_json(given, f"messages[{index}]")
        # The reasoning of an earlier answer has several names in use. Most templates read
        # reasoning_content, gpt-oss's reads thinking.
        reasoning = next((fields[name] for name in _REASONING_KEYS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        normalized.append(fields)
    if not normalized:
        raise InvalidInput("messages is empty; a conversation has at least one message.")
    return normalized


def join_text_parts(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Join the content of messages that is given in parts, as in the OpenAI API, to texts.

    Many templates accept a text only.

    Raises:
        InvalidInput: a part is no text.
    """
    joined: list[Mapping[str, Any]] = []
    for index, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(parts, list | tuple):
            texts = [_text_of_part(part, f"messages[{index}]") for part in parts]
            message = {**message, "content": "".join(texts)}
        joined.append(message)
    return joined


def _text_of_part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InvalidInput(
            f"{where} has the part {short_repr(part)}; content is a text, or a list of parts such "
            'as {"type": "text", "text": "…"}. Images and sound are not supported.'
        )
    return text


def _check_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise InvalidInput(f"{name} is {short_repr(value)}; it must be a list.")
    return list(value)


def _copy_json(value: Any, where: str, depth: int = 0) -> Any:
    """Copy a value that consists of JSON types only.

    A template never sees an object of another type, whose methods it could call.

    Raises:
        InvalidInput: it contains another type, or nests too deeply.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > _MAX_DEPTH:
        raise InvalidInput(f"{where} nests deeper than {_MAX_DEPTH} levels.")
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {
            key: _copy_json(item, f"{where}[{short_repr(key)}]", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            _copy_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)
        ]
    raise InvalidInput(
        f"{where} is a {type(value).__name__}; allowed are the types of JSON: text, numbers, "
        "lists, …"
    )


def _error_message(problem: Exception) -> str:
    if isinstance(problem, jinja2.TemplateError) and not isinstance(problem, jinja2.UndefinedError):
        return str(problem.message or problem)[:_MAX_MESSAGE_LENGTH]
    return f"{type(problem).__name__}: {problem}"[:_MAX_MESSAGE_LENGTH]
