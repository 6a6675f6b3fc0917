"""A chat template's syntax tree, rewritten so that no step of it goes unwatched.

Every loop and macro body starts with a tick; what ``~``, a slice or a literal makes is bounded; what is compared too.
Blocks, includes and imports are refused: a chat template is one file.
"""

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

from mlxarch.errors import ChatTemplateError
from mlxarch.template_limits import exceeded

MAX_SYNTAX_TOKENS = 25_000
"""Words and signs in a template: compiling that many takes about a second, and published templates have far fewer."""

_REFUSED = (
    nodes.Block,
    nodes.Extends,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
    nodes.ScopedEvalContextModifier,
)


def bounded(tree: nodes.Template, guards: "Guards") -> nodes.Template:
    """The tree with ticks and bounds in it. Raises ChatTemplateError for what a chat template may not have."""
    for node in tree.find_all(_REFUSED):
        raise ChatTemplateError(
            f"The chat template uses {{% {type(node).__name__.lower()} %}} in line {node.lineno}, which chat templates "
            "may not: a template is one file without blocks."
        )
    return _Rewriter(guards).visit(tree)


class Guards(Extension):
    """What a rewritten template calls, and the bound on its number of words."""

    environment: Any  # a Sandbox: it has limits

    def filter_stream(self, stream: Any) -> Iterator[Any]:
        """The template's words and signs, counted."""
        for count, token in enumerate(stream):
            if count > MAX_SYNTAX_TOKENS:
                raise exceeded(f"it has more than {MAX_SYNTAX_TOKENS} words and signs")
            self.environment.limits.tick()
            yield token

    def tick(self, characters: int) -> bool:
        """A body begins that writes so many characters of fixed text."""
        self.environment.limits.tick(characters)
        return True

    def given(self, value: Any) -> Any:
        """A value to compare."""
        self.environment.limits.tick()
        return self.environment.limits.given(value)

    def made(self, value: Any) -> Any:
        """A literal."""
        return self.environment.limits.made(value)

    def concatenated(self, *values: Any) -> str:
        """``a ~ b``"""
        limits = self.environment.limits
        texts = [value if isinstance(value, str) else str(limits.given(value)) for value in values]
        limits.characters(sum(map(len, texts)))
        return limits.made("".join(texts))

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """``value[start:stop:step]``"""
        return self.environment.limits.made(value[start:stop:step])


class _Rewriter(NodeTransformer):
    """Puts ticks and bounds into a template's syntax tree."""

    def __init__(self, guards: Guards):
        self._guards = guards

    def _call(self, name: str, node: nodes.Node, *args: nodes.Expr) -> nodes.Call:
        call = nodes.Call(self._guards.attr(name), list(args), [], None, None)
        return call.set_lineno(node.lineno)  # type: ignore[return-value]

    def _ticking_body(self, node: Any) -> Any:
        """A body that may run many times: it starts with a tick that counts the fixed text in it."""
        text = sum(len(data.data) for part in node.body for data in _own_text(part))
        self.generic_visit(node)
        tick = self._call("tick", node, nodes.Const(text))
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        node = self._ticking_body(node)
        if node.test is not None:
            node.test = nodes.And(self._call("tick", node, nodes.Const(0)), node.test)
        return node

    visit_Macro = visit_CallBlock = _ticking_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call("concatenated", node, *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._call("given", node, node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        parts = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return self._call("sliced", node, node.node, *parts)

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._call("made", node, node)

    visit_List = visit_Tuple = visit_Dict = _literal


def _own_text(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """The fixed text in a node, outside the loops and macros in it."""
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
        for child in node.iter_child_nodes():
            yield from _own_text(child)


class GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks what the model writes, for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """What stands between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)
