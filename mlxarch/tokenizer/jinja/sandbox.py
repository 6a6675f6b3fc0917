"""Jinja environment for chat templates: that of transformers, with limits on time and memory.

As there: the immutable sandbox, ``trim_blocks``, ``lstrip_blocks``, loop controls, a
``{% generation %}`` tag, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now``,
``dict`` and ``namespace``. Left out: ``lipsum``, ``cycler``, ``joiner``, blocks, includes, and
filters whose cost cannot be bounded in advance.

Every loop and macro body starts with a tick, for which the template's syntax tree is rewritten, and
so does every filter, test, call, operator and attribute access: each step is short, and ``Limits``
checks the clock between two steps. A lock serializes the renderings of one environment, because it
holds the limits of the current one.
"""

import functools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any, TypeVar, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context
from markupsafe import Markup

from mlxarch.errors import ChatTemplateError
from mlxarch.tokenizer.control_tokens import MARK
from mlxarch.tokenizer.jinja.limits import MAX_CHARACTERS, Limits, limit_error
from mlxarch.tokenizer.jinja.syntax_tree import GenerationTag, Guards, insert_guards

MAX_TEMPLATE_BYTES = 256 << 10
"""Largest template, in bytes of UTF-8."""
_ESCAPED_MARK = MARK.encode("ascii", "backslashreplace").decode()  # as JSON has it, too
_MAX_JSON_INDENT = 16
_MAX_DATE_FORMAT = 256  # characters

T = TypeVar("T")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STRING_METHODS = _names(
    "capitalize casefold center count endswith find format format_map index isalnum isalpha "
    "isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper "
    "join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)
_ALLOWED_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, _STRING_METHODS),
    (dict, _names("copy get items keys values")),
    (list, _names("copy count index")),
    (tuple, _names("count index")),
    ((int, float, complex, bytes, set, type(None)), frozenset()),
)
_PADDING_METHODS = _names("center ljust rjust zfill")
# Filters whose integer arguments are widths or counts.
_COUNTING_FILTERS = _names("batch center filesizeformat indent round slice truncate")
# Filters that process a text of any length as fast as a copy; all others work item by item.
_FAST_FILTERS = _names(
    "capitalize center count d default e escape first float format indent int last length lower "
    "replace reverse safe string tojson trim upper"
)
_REMOVED_FILTERS = ("forceescape", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one chat template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[GenerationTag, Guards, loopcontrols],
        )
        self.limits = Limits()
        self._lock = threading.Lock()
        self._guards = cast(Guards, self.extensions[Guards.identifier])
        self.globals = {
            "range": self.globals["range"],
            "dict": _Dict(),
            "namespace": _CheckedNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = self._tojson
        self.filters = {
            name: self._limit_filter(name, filter_) for name, filter_ in self.filters.items()
        }
        self.tests = {name: self._limit_test(test) for name, test in self.tests.items()}
        self.finalize = self._finalize

    def compile_template(self, source: str) -> jinja2.Template:
        """Compile a template.

        Raises:
            jinja2.TemplateError: its syntax is wrong.
            ChatTemplateError: it exceeds a limit, or uses blocks, includes or imports.
        """
        return self._with_limits(self.from_string, source)

    def parse_template(self, source: str) -> nodes.Template:
        """Parse a template into its syntax tree; raises as ``compile_template`` does."""
        return self._with_limits(self.parse, source)

    def _with_limits(self, function: Callable[[str], T], source: str) -> T:
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise limit_error(f"it is larger than {MAX_TEMPLATE_BYTES} bytes")
        with self._lock:
            self.limits = Limits()
            return function(source)

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Render a template of this environment.

        Args:
            template: result of ``compile_template``.
            variables: name -> plain JSON value.

        Raises:
            ChatTemplateError: the template exceeds a limit.
        """
        with self._lock:
            self.limits = Limits()
            self.limits.check_variables(dict(variables))
            return self._join_bounded(template.generate(variables))

    def _join_bounded(self, pieces: Iterator[str], tick: bool = False) -> str:
        """Join pieces of text while their total length is within the limit."""
        joined: list[str] = []
        length = 0
        for piece in pieces:
            length += len(piece)
            if tick:
                self.limits.tick()
            self.limits.check_characters(length)
            joined.append(piece)
        return "".join(joined)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = insert_guards(super()._parse(source, name, filename), self._guards)
        tree.set_environment(self)
        return tree

    @pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        """Convert a value that the template writes to text."""
        if isinstance(value, Namespace):
            raise limit_error("it prints a namespace")
        text = value if isinstance(value, str) else str(self.limits.check_operand(value))
        self.limits.tick(len(text))
        return text

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow only those methods of Python's types that are bounded and modify nothing."""
        for kind, names in _ALLOWED_METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Evaluate ``obj.attribute``."""
        self.limits.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Evaluate ``obj[argument]``."""
        self.limits.tick()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Evaluate an operator of ``intercepted_binops``, the size of its result checked first."""
        limits = self.limits
        both_integers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and both_integers:
            limits.check_bits(left.bit_length() * max(1, right))
        elif operator == "*" and both_integers:
            limits.check_bits(left.bit_length() + right.bit_length())
        elif operator == "*" and isinstance(left, int):
            self._check_repetition(right, left)
        elif operator == "*" and isinstance(right, int):
            self._check_repetition(left, right)
        elif operator == "%" and isinstance(left, str):
            limits.check_percent_format(left, right)
        left = limits.check_operand(left)
        right = limits.check_operand(right)
        return limits.check_result(super().call_binop(context, operator, left, right))

    def _check_repetition(self, sequence: Any, times: int) -> None:
        if isinstance(sequence, str):
            self.limits.check_characters(len(sequence) * times)
        elif isinstance(sequence, (list, tuple)):
            self.limits.check_items(len(sequence) * times)

    def call(  # noqa: N805
        __self, __context: Context, __obj: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluate a call.

        The parameters' names are mangled, so that they cannot clash with keyword arguments.
        """
        if isinstance(__obj, MethodType) and __obj.__self__ is __self._guards:
            return __obj(*args)  # Jinja adds keyword arguments for loop variables; guards need none
        limits = __self.limits
        limits.tick()
        for value in args:
            limits.check_operand(value)
        for name, value in kwargs.items():
            if name not in ("_loop_vars", "_block_vars"):
                limits.check_operand(value)
        if isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str) and args:
            args = __self._check_string_method(__obj.__self__, __obj.__name__, args)
        return limits.check_result(super().call(__context, __obj, *args, **kwargs))

    def _check_string_method(self, text: str, method: str, args: Any) -> Any:
        """Check the cost of a method of str. Return its arguments, an iterator made a list."""
        if method == "join":
            return (self.limits.check_join(text, args[0]), *args[1:])
        if method in _PADDING_METHODS and isinstance(args[0], int):
            self.limits.check_items(args[0])
        if (
            method == "replace"
            and len(args) > 1
            and isinstance(args[0], str)
            and isinstance(args[1], str)
        ):
            self.limits.check_replace(text, args[0], args[1])
        return args

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a safe ``str.format``: the sandbox's, with a limit on the width of fields."""
        if super().wrap_str_format(value) is None:
            return None
        text = value.__self__
        takes_mapping = value.__name__ == "format_map"
        if isinstance(text, Markup):
            raise ChatTemplateError(
                "The chat template formats escaped HTML, which is not supported."
            )

        def format_text(*args: Any, **kwargs: Any) -> str:
            if takes_mapping:
                return _Formatter(self).vformat(text, (), args[0])
            return _Formatter(self).vformat(text, args, kwargs)

        return format_text

    def _limit_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter so that its arguments and its result are checked."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context comes first

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            limits = self.limits
            limits.tick()
            context = args[:skipped]
            args = args[skipped:]
            for value in (*args, *kwargs.values()):
                limits.check_operand(value)
            if name in _COUNTING_FILTERS:
                for value in (*args[1:], *kwargs.values()):
                    limits.check_items(abs(value) if isinstance(value, int) else 0)
            if args and name not in _FAST_FILTERS and hasattr(args[0], "__len__"):
                limits.check_items(len(args[0]))
            args = self._check_filter(name, args, kwargs)
            result = function(*context, *args, **kwargs)
            if isinstance(result, Iterator):
                return limits.tick_each(result)
            return limits.check_result(result)

        return limited

    def _check_filter(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Check the cost of a filter. Return its arguments, an iterator made a list."""
        if not args:
            return args
        if name == "join":
            separator = args[1] if len(args) > 1 else kwargs.get("d", "")
            return (self.limits.check_join(str(separator), args[0]), *args[1:])
        if name == "replace" and len(args) > 2:
            self.limits.check_replace(str(args[0]), str(args[1]), str(args[2]))
        elif name == "indent":
            width = args[1] if len(args) > 1 else kwargs.get("width", 4)
            size = len(width) if isinstance(width, str) else int(width)
            self.limits.check_characters((len(str(args[0]).splitlines()) + 1) * size)
        elif name == "format":
            self.limits.check_percent_format(str(args[0]), kwargs or args[1:])
        elif name == "sum":
            start = args[2] if len(args) > 2 else kwargs.get("start", 0)
            if not isinstance(start, (int, float)):
                raise ChatTemplateError(
                    "The chat template sums up something else than numbers, which is not supported."
                )
        return args

    def _limit_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a test so that its arguments are checked."""

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.limits.tick()
            for value in args:
                self.limits.check_operand(value)
            return function(*args, **kwargs)

        return limited

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        for blanks in (indent, *(separators or ())):
            width = len(blanks) if isinstance(blanks, str) else blanks or 0
            if width > _MAX_JSON_INDENT:
                raise limit_error(f"it indents JSON by more than {_MAX_JSON_INDENT}")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        if indent is None:
            text = encoder.encode(value)
        else:
            text = self._join_bounded(encoder.iterencode(value), tick=True)
        return text.replace(_ESCAPED_MARK, MARK) if ensure_ascii else text


class _Formatter(SandboxedFormatter):
    """The sandbox's formatter, with limits on each field."""

    def __init__(self, environment: Sandbox):
        super().__init__(environment)
        self._limits = environment.limits

    def format_field(self, value: Any, format_spec: str) -> str:
        self._limits.check_format_spec(format_spec)
        text = super().format_field(self._limits.check_operand(value), format_spec)
        return self._limits.check_result(text)


class _Dict:
    """``dict`` without the other attributes of Python's type object."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _CheckedNamespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise ChatTemplateError(
            f"The chat template stores {name!r} in a namespace; no name there starts with '_'."
        )


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message)[:MAX_CHARACTERS])


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_DATE_FORMAT:
        raise limit_error(f"it formats the date with more than {_MAX_DATE_FORMAT} characters")
    return datetime.now().strftime(format)
