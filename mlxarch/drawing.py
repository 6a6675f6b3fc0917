"""The blocks of several models side by side, as one SVG, drawn from what their layers are made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from mlxarch.structure import Structure, activation, count
from mlxarch.tracing import Block, Branch, Part

BOX, NARROW, MARGIN = 226, 190, 62  # widths of a box, of one of two side by side, and beside them; in pixels
LINE, PADDING, GAP, SPACE = 15, 9, 22, 12  # height of a line, space in a box, between boxes, and side by side
STROKE = "#5a6270"
FILLS = {
    "norm": "#e4e7ee",
    "attention": "#c9dfff",
    "feed-forward": "#cfeccf",
    "experts": "#ffe0ad",
    "other": "#ecd8f2",
    "end": "#f4f4f1",
}
ATTENTION = {
    "MHA": "Multi-head attention",
    "GQA": "Grouped-query attention",
    "MQA": "Multi-query attention",
    "MLA": "Multi-head latent attention",
}


@dataclass(frozen=True)
class Box:
    """Lines of text on a ground; the first line is its title."""

    lines: Sequence[str]
    fill: str
    width: float = BOX

    @property
    def height(self) -> float:
        """In pixels."""
        return LINE * len(self.lines) + 2 * PADDING


@dataclass
class Canvas:
    """Shapes, collected; y grows downwards, as in SVG."""

    shapes: list[str] = field(default_factory=list)

    def box(self, box: Box, x: float, bottom: float) -> float:
        """Draw it around x, standing on ``bottom``, and return its top."""
        top = bottom - box.height
        self.rectangle(x - box.width / 2, top, box.width, box.height, FILLS[box.fill], STROKE, 6)
        for index, line in enumerate(box.lines):
            size, weight = (12.5, "600") if index == 0 else (11, "400")
            self.text(line, x, top + PADDING + LINE * (index + 0.75), size, weight)
        return top

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, stroke: str, radius: int) -> None:
        """A rectangle with round corners."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )

    def text(self, text: str, x: float, y: float, size: float, weight: str = "400", anchor: str = "middle") -> None:
        """A line of text on the base line y."""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
        """A line through the points."""
        path = " ".join(f"{'L' if n else 'M'}{x:g} {y:g}" for n, (x, y) in enumerate(points))
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.shapes.append(f'<path d="{path}" fill="none" stroke="{STROKE}" stroke-width="1.3"{end}/>')

    def plus(self, x: float, y: float) -> None:
        """Where a branch is added to the residual stream."""
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="#fff" stroke="{STROKE}" stroke-width="1.3"/>')
        self.line((x - 4, y), (x + 4, y))
        self.line((x, y - 4), (x, y + 4))


def draw(models: Sequence[tuple[str, Structure]]) -> str:
    """An SVG with a column for each (title, structure), to be read from the bottom to the top."""
    canvases = [Canvas() for _ in models]
    drawn = [_column(canvas, title, s) for canvas, (title, s) in zip(canvases, models, strict=True)]
    top, bottom = min(top for top, _ in drawn) - 16, max(bottom for _, bottom in drawn) + 16
    widths = [_width(s) + 2 * MARGIN for _, s in models]
    width, height = sum(widths), bottom - top
    columns = "\n".join(
        f'<g transform="translate({sum(widths[:index])} {-top:g})">\n' + "\n".join(canvas.shapes) + "\n</g>"
        for index, canvas in enumerate(canvases)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}" '
        'font-family="Helvetica, Arial, sans-serif" fill="#1c2026">\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{STROKE}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height:g}" fill="#ffffff"/>\n{columns}\n</svg>\n'
    )


def _width(s: Structure) -> int:
    """Of the stack of boxes."""
    widest = max(len(stage) for branch in s.blocks[0].branches for stage in branch)
    return BOX if widest == 1 else NARROW * widest + SPACE * (widest - 1)


def _column(canvas: Canvas, title: str, s: Structure) -> tuple[float, float]:
    """Draw a model, its embedding standing on y = 0; returns its highest and its lowest y."""
    width, block = _width(s), s.blocks[0]
    x = MARGIN + width / 2 + 10
    table = [
        f"{s.vocabulary:,} tokens × {s.hidden_size:,}",
        *(["+ learned positions"] if s.positions == "learned" else []),
    ]
    low = canvas.box(Box(["Token embedding", *table], "end"), x, 0) - GAP
    behind = len(canvas.shapes)  # the ground of the block goes below what stands on it
    y = low
    for branch in block.branches:
        y = _branch(canvas, s, block, branch, x, y)
    high = y - 10
    ground = Canvas()
    ground.rectangle(x - width / 2 - 26, high, width + 42, low - high, "#f8fafd", "#b4bac6", 10)
    ground.text(f"{s.layers} ×", x - width / 2 - 32, (low + high) / 2, 14, "600", "end")
    canvas.shapes[behind:behind] = ground.shapes
    canvas.line((x, low + GAP), (x, low))
    canvas.line((x, y), (x, high - GAP), arrow=True)
    top = canvas.box(Box([s.norm], "norm"), x, high - GAP)
    canvas.line((x, top), (x, top - GAP), arrow=True)
    head = "the matrix of the embedding" if s.tied else f"{s.hidden_size:,} × {s.vocabulary:,}"
    top = canvas.box(Box(["Output head", head], "end"), x, top - GAP)
    active = f", {count(s.active)} active" if s.experts != "no" else ""
    canvas.text(f"{count(s.parameters)} parameters{active}", x, top - 14, 12)
    canvas.text(title, x, top - 33, 16, "700")
    notes = [line for other in s.blocks[1:] for line in _difference(other, block)]
    for index, note in enumerate(notes):
        canvas.text(note, x, 20 + LINE * index, 11)
    return top - 50, LINE * len(notes)


def _branch(canvas: Canvas, s: Structure, block: Block, branch: Branch, x: float, y: float) -> float:
    """Draw a residual branch that leaves the stream at y, upwards; returns where the stream goes on."""
    start, left = y - 12, x - _width(s) / 2 - 14
    canvas.line((x, y), (x, start))
    y = start
    for stage in branch:
        canvas.line((x, y), (x, y - GAP + 6), arrow=True)
        width = (_width(s) - SPACE * (len(stage) - 1)) / len(stage)
        boxes = [_box(s, block, part, width) for part in stage]
        tallest = max(box.height for box in boxes)
        for index, box in enumerate(boxes):
            at = x + (index - (len(stage) - 1) / 2) * (width + SPACE)
            canvas.box(box, at, y - GAP + 6 - (tallest - box.height) / 2)
        y -= GAP - 6 + tallest
    plus = y - GAP
    canvas.line((x, y), (x, plus + 8), arrow=True)
    canvas.line((x, start), (left, start), (left, plus), (x - 8, plus), arrow=True)
    canvas.plus(x, plus)
    return plus - 8


def _box(s: Structure, block: Block, part: Part, width: float) -> Box:
    if part.kind == "norm":
        return Box([s.norm], "norm", width)
    if part.kind == "attention":
        heads = f"{s.heads} heads" + (f", {s.kv_heads} KV heads" if s.kv_heads != s.heads else "")
        lines = [ATTENTION[s.attention], f"{heads} of {s.head_size}", *s.positions.split(" : ")]
        lines += [f"QK-norm {s.qk_norm}"] if s.qk_norm != "no" else []
        lines += [s.scores] if s.scores else []
        return Box(lines + ([s.windows] if s.windows != "full" else []), "attention", width)
    if part.kind == "feed-forward":
        feed = block.feed_forward
        if not part.experts:
            return Box([activation(feed.gate), f"{part.width:,} wide"], "feed-forward", width)
        alone = all(len(stage) == 1 for branch in block.branches for stage in branch)
        beside = [f"+ shared, {feed.beside:,} wide"] if feed.beside and alone else []
        chosen = f"{feed.chosen} of {feed.experts} experts"
        return Box(
            ["Mixture of experts", chosen, f"{activation(feed.gate)}, {feed.width:,} wide", *beside], "experts", width
        )
    return Box([part.name.replace("_", " ")], "other", width)


def _difference(other: Block, block: Block) -> list[str]:
    """How some layers differ from those that are drawn, in words."""
    feed = other.feed_forward
    if feed == block.feed_forward:
        return [f"{in_words(other.layers)}: other norms or order"]
    words = f"{feed.chosen} of {feed.experts} experts" if feed.experts else activation(feed.gate)
    return [f"{in_words(other.layers)}: {words}, {feed.width:,} wide"]


def in_words(layers: Sequence[int]) -> str:
    """Which layers, counted from 1."""
    first, last = layers[0] + 1, layers[-1] + 1
    if len(layers) == 1:
        return f"layer {first}"
    step = (last - first) // (len(layers) - 1)
    if list(layers) != list(range(layers[0], layers[-1] + 1, step)):
        return f"{len(layers)} other layers"
    return f"layers {first} to {last}" if step == 1 else f"layers {first}, {first + step} … {last}"
