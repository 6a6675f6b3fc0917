"""The Jinja environment in which chat templates run: transformers' one, with limits.

The same as there: the immutable sandbox, ``trim_blocks``, ``lstrip_blocks``, loop controls, a ``{% generation %}``
tag, ``tojson`` without HTML escapes, ``raise_exception``, ``strftime_now``, ``dict`` and ``namespace``. Left out:
``lipsum``, ``cycler``, ``joiner``; blocks and includes; filters whose cost cannot be told beforehand.

Every loop and macro body starts with a tick (the template's syntax tree is rewritten), and so does every filter, test,
call, operator and attribute: no step takes long, and between two steps ``Limits`` looks at the clock. Rendering one
template is serialized by a lock, since the environment holds the limits of the rendering that is going on.
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
from mlxarch.template_limits import MAX_CHARACTERS, Limits, exceeded
from mlxarch.template_syntax import GenerationTag, Guards, bounded

MAX_TEMPLATE_BYTES = 256 << 10

Made = TypeVar("Made")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STRING_METHODS = _words(
    "capitalize casefold center count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition removeprefix "
    "removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title "
    "upper zfill"
)
_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, _STRING_METHODS),
    (dict, _words("copy get items keys values")),
    (list, _words("copy count index")),
    (tuple, _words("count index")),
    ((int, float, complex, bytes, set, type(None)), frozenset()),
)
_PADDING_METHODS = _words("center ljust rjust zfill")
_COUNTING_FILTERS = _words("batch center filesizeformat indent round slice truncate")
# These handle a text of any length at the speed of a copy; all others go item by item.
_FAST_FILTERS = _words(
    "capitalize center count d default e escape first float format indent int last length lower replace reverse safe "
    "string tojson trim upper"
)
_DROPPED_FILTERS = ("forceescape", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one chat template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[GenerationTag, Guards, loopcontrols]
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
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = self._tojson
        self.filters = {name: self._limited_filter(name, filter_) for name, filter_ in self.filters.items()}
        self.tests = {name: self._limited_test(test) for name, test in self.tests.items()}
        self.finalize = self._printed

    def compile_template(self, source: str) -> jinja2.Template:
        """The template, ready to render. Raises jinja2's errors, and ChatTemplateError for one that is refused."""
        return self._limited(self.from_string, source)

    def syntax_tree(self, source: str) -> nodes.Template:
        """What the template consists of. Raises as ``compile_template`` does."""
        return self._limited(self.parse, source)

    def _limited(self, function: Callable[[str], Made], source: str) -> Made:
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise exceeded(f"it is larger than {MAX_TEMPLATE_BYTES} bytes")
        with self._lock:
            self.limits = Limits()
            return function(source)

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The text that a template of this environment makes of the variables, which hold plain JSON values."""
        with self._lock:
            self.limits = Limits()
            self.limits.inputs(dict(variables))
            pieces, length = [], 0
            for piece in template.generate(variables):
                length += len(piece)
                self.limits.characters(length)
                pieces.append(piece)
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = bounded(super()._parse(source, name, filename), self._guards)
        tree.set_environment(self)
        return tree

    @pass_context
    def _printed(self, context: Context, value: Any) -> Any:
        if isinstance(value, Namespace):
            raise exceeded("it prints a namespace")
        text = value if isinstance(value, str) else str(self.limits.given(value))
        self.limits.tick(len(text))
        return text

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of Python's own types only the methods that neither change them nor explode."""
        for kind, names in _METHODS:
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute``"""
        self.limits.tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """``obj[argument]``"""
        self.limits.tick()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can make something large."""
        limits = self.limits
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers:
            limits.bits(left.bit_length() * max(1, right))
        elif operator == "*" and numbers:
            limits.bits(left.bit_length() + right.bit_length())
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            times, sequence = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(sequence, (str, list, tuple)):
                (limits.characters if isinstance(sequence, str) else limits.items)(len(sequence) * times)
        elif operator == "%" and isinstance(left, str):
            limits.percent_format(left, right)
        return limits.made(super().call_binop(context, operator, limits.given(left), limits.given(right)))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call in the template. (The names are mangled so that they cannot clash with its keyword arguments.)"""
        if isinstance(__obj, MethodType) and __obj.__self__ is __self._guards:
            return __obj(*args)  # Jinja passes the loop's variables by keyword, to whom it concerns
        limits = __self.limits
        limits.tick()
        for name, value in (*((None, value) for value in args), *kwargs.items()):
            if name not in ("_loop_vars", "_block_vars"):
                limits.given(value)
        if isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str) and args:
            args = __self._bounded_arguments(__obj.__self__, __obj.__name__, args)
        return limits.made(super().call(__context, __obj, *args, **kwargs))

    def _bounded_arguments(self, text: str, method: str, args: Any) -> Any:
        if method == "join":
            return (self.limits.joined(text, args[0]), *args[1:])
        if method in _PADDING_METHODS and isinstance(args[0], int):
            self.limits.items(args[0])
        if method == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            self.limits.replacement(text, args[0], args[1])
        return args

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` with safe attributes, as the sandbox has it, and with narrow fields."""
        if super().wrap_str_format(value) is None:
            return None
        text, takes_mapping = value.__self__, value.__name__ == "format_map"
        if isinstance(text, Markup):
            raise ChatTemplateError("The chat template formats escaped HTML, which is not supported.")

        def format_text(*args: Any, **kwargs: Any) -> str:
            positional, named = ((), args[0]) if takes_mapping else (args, kwargs)
            return _Formatter(self).vformat(text, positional, named)

        return format_text

    def _limited_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context comes first

        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            limits = self.limits
            limits.tick()
            passed, args = args[:skipped], args[skipped:]
            for value in (*args, *kwargs.values()):
                limits.given(value)
            if name in _COUNTING_FILTERS:
                for value in (*args[1:], *kwargs.values()):
                    limits.items(abs(value) if isinstance(value, int) else 0)
            if args and name not in _FAST_FILTERS and hasattr(args[0], "__len__"):
                limits.items(len(args[0]))
            args = self._bounded_filter(name, args, kwargs)
            result = function(*passed, *args, **kwargs)
            return limits.ticking(result) if isinstance(result, Iterator) else limits.made(result)

        return limited

    def _bounded_filter(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        if not args:
            return args
        if name == "join":
            separator = args[1] if len(args) > 1 else kwargs.get("d", "")
            return (self.limits.joined(str(separator), args[0]), *args[1:])
        if name == "replace" and len(args) > 2:
            self.limits.replacement(str(args[0]), str(args[1]), str(args[2]))
        elif name == "indent":
            width = args[1] if len(args) > 1 else kwargs.get("width", 4)
            size = len(width) if isinstance(width, str) else int(width)
            self.limits.characters((len(str(args[0]).splitlines()) + 1) * size)
        elif name == "format":
            self.limits.percent_format(str(args[0]), kwargs or args[1:])
        elif name == "sum" and not isinstance(args[2] if len(args) > 2 else kwargs.get("start", 0), (int, float)):
            raise ChatTemplateError("The chat template sums up something else than numbers, which is not supported.")
        return args

    def _limited_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.limits.tick()
            for value in args:
                self.limits.given(value)
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
            if (len(blanks) if isinstance(blanks, str) else blanks or 0) > 16:
                raise exceeded("it indents JSON by more than 16")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        if indent is None:
            return encoder.encode(value)
        pieces, length = [], 0
        for piece in encoder.iterencode(value):
            length += len(piece)
            self.limits.tick()
            self.limits.characters(length)
            pieces.append(piece)
        return "".join(pieces)


class _Formatter(SandboxedFormatter):
    def __init__(self, environment: Sandbox):
        super().__init__(environment)
        self._limits = environment.limits

    def format_field(self, value: Any, format_spec: str) -> str:
        self._limits.format_spec(format_spec)
        return self._limits.made(super().format_field(self._limits.given(value), format_spec))


class _Dict:
    """``dict`` without what Python's type object offers beyond making one."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _CheckedNamespace(Namespace):
    """Jinja's namespace, refusing names that begin with an underscore."""

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
        raise ChatTemplateError(f"The chat template stores {name!r} in a namespace; no name there starts with '_'.")


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message)[:MAX_CHARACTERS])


def _strftime_now(format: str) -> str:
    if len(format) > 256:
        raise exceeded("it formats the date with more than 256 characters")
    return datetime.now().strftime(format)
