"""Instrument a chat template's syntax tree so that ``Limits`` checks each of its steps.

Every loop and macro body starts with a tick, and the results of ``~``, slices and literals are
checked, as are the operands of comparisons. Blocks, includes and imports are rejected: a chat
template is one file.
"""

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

from mlxarch.errors import ChatTemplateError
from mlxarch.tokenizer.jinja.limits import limit_error

MAX_SYNTAX_TOKENS = 25_000
"""Most tokens of Jinja syntax in a template; compiling that many takes about a second."""

_REJECTED = (
    nodes.Block,
    nodes.Extends,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
    nodes.ScopedEvalContextModifier,
)


def insert_guards(tree: nodes.Template, guards: "Guards") -> nodes.Template:
    """Insert calls of ``guards`` into a template's syntax tree.

    Raises:
        ChatTemplateError: the template uses blocks, includes or imports.
    """
    for node in tree.find_all(_REJECTED):
        raise ChatTemplateError(
            f"The chat template uses {{% {type(node).__name__.lower()} %}} in line {node.lineno}, "
            "which chat templates may not: a template is one file without blocks."
        )
    return _GuardInserter(guards).visit(tree)


class Guards(Extension):
    """Functions that an instrumented template calls, and the limit on its number of tokens."""

    environment: Any  # a Sandbox: it has limits

    def filter_stream(self, stream: Any) -> Iterator[Any]:
        """Yield the tokens of the template's source, up to a maximum."""
        for count, token in enumerate(stream):
            if count > MAX_SYNTAX_TOKENS:
                raise limit_error(f"it has more than {MAX_SYNTAX_TOKENS} words and signs")
            self.environment.limits.tick()
            yield token

    def tick(self, characters: int) -> bool:
        """Begin a body that writes so many characters of fixed text."""
        self.environment.limits.tick(characters)
        return True

    def check_operand(self, value: Any) -> Any:
        """Check an operand of a comparison, and return it."""
        self.environment.limits.tick()
        return self.environment.limits.check_operand(value)

    def check_literal(self, value: Any) -> Any:
        """Check a list, tuple or mapping literal, and return it."""
        return self.environment.limits.check_result(value)

    def concatenate(self, *values: Any) -> str:
        """Compute ``a ~ b``."""
        limits = self.environment.limits
        texts = [
            value if isinstance(value, str) else str(limits.check_operand(value))
            for value in values
        ]
        limits.check_characters(sum(map(len, texts)))
        return limits.check_result("".join(texts))

    def take_slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """Compute ``value[start:stop:step]``."""
        return self.environment.limits.check_result(value[start:stop:step])


class _GuardInserter(NodeTransformer):
    """Visitor that inserts calls of ``Guards`` into a syntax tree."""

    def __init__(self, guards: Guards):
        self._guards = guards

    def _call_guard(self, name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Call:
        call = nodes.Call(self._guards.attr(name), list(args), [], None, None)
        return call.set_lineno(node.lineno)  # type: ignore[return-value]

    def _insert_tick(self, node: Any) -> Any:
        """Insert a tick before a body that may run many times; it counts the body's fixed text."""
        characters = sum(len(data.data) for child in node.body for data in _fixed_text(child))
        self.generic_visit(node)
        tick = self._call_guard("tick", node, nodes.Const(characters))
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        node = self._insert_tick(node)
        if node.test is not None:
            node.test = nodes.And(self._call_guard("tick", node, nodes.Const(0)), node.test)
        return node

    visit_Macro = visit_CallBlock = _insert_tick

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call_guard("concatenate", node, *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._call_guard("check_operand", node, node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = [
            bound or nodes.Const(None) for bound in (node.arg.start, node.arg.stop, node.arg.step)
        ]
        return self._call_guard("take_slice", node, node.node, *bounds)

    def _guard_literal(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return self._call_guard("check_literal", node, node)

    visit_List = visit_Tuple = visit_Dict = _guard_literal


def _fixed_text(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """Yield the fixed text in a node, outside the loops and macros in it."""
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
        for child in node.iter_child_nodes():
            yield from _fixed_text(child)


class GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}``, which marks the assistant's text for training.

    It has no effect on the rendered text.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """Parse the statements between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
