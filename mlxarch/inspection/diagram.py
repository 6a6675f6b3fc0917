"""Draw the decoder blocks of several models side by side as one SVG."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from mlxarch.inspection.structure import Structure, format_activation, format_parameters
from mlxarch.inspection.trace import Block, Branch, Submodule

# All sizes are in pixels
BOX_WIDTH = 226
PARALLEL_BOX_WIDTH = 190  # of a box that stands beside another
MARGIN = 62  # to the left and right of the boxes of a model
LINE_HEIGHT = 15
PADDING = 9  # above and below the text of a box
VERTICAL_GAP = 22
HORIZONTAL_GAP = 12
TEXT_SIZE = 11
LETTER_WIDTH = 0.5  # of the text's size, on average
STROKE = "#5a6270"
FILLS = {
    "norm": "#e4e7ee",
    "attention": "#c9dfff",
    "recurrence": "#c6ecec",
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
    """Lines of text on a colored rectangle; the first line is the title, a long one is broken."""

    lines: Sequence[str]
    fill: str
    width: float = BOX_WIDTH

    @property
    def rows(self) -> list[str]:
        """The lines, those that are wider than the box in several parts."""
        title, *others = self.lines
        most = int(self.width / (TEXT_SIZE * LETTER_WIDTH)) - 1
        return [title, *(row for line in others for row in textwrap.wrap(line, most))]

    @property
    def height(self) -> float:
        """Height in pixels."""
        return LINE_HEIGHT * len(self.rows) + 2 * PADDING


@dataclass
class Canvas:
    """SVG shapes, collected in drawing order; y grows downwards, as in SVG."""

    shapes: list[str] = field(default_factory=list)

    def box(self, box: Box, x: float, bottom: float) -> float:
        """Draw a box centered at x that stands on ``bottom``, and return the y of its top."""
        top = bottom - box.height
        self.rectangle(x - box.width / 2, top, box.width, box.height, FILLS[box.fill], STROKE, 6)
        for index, line in enumerate(box.rows):
            size, weight = (12.5, "600") if index == 0 else (TEXT_SIZE, "400")
            self.text(line, x, top + PADDING + LINE_HEIGHT * (index + 0.75), size, weight)
        return top

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str, radius: int
    ) -> None:
        """Draw a rectangle with rounded corners."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        text: str,
        x: float,
        y: float,
        size: float,
        weight: str = "400",
        anchor: str = "middle",
    ) -> None:
        """Draw a line of text with its baseline at y."""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" font-weight="{weight}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )

    def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
        """Draw a line through the points."""
        path = " ".join(f"{'L' if n else 'M'}{x:g} {y:g}" for n, (x, y) in enumerate(points))
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.shapes.append(
            f'<path d="{path}" fill="none" stroke="{STROKE}" stroke-width="1.3"{end}/>'
        )

    def plus(self, x: float, y: float) -> None:
        """Draw the sign of a residual addition."""
        self.shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="#fff" stroke="{STROKE}" '
            'stroke-width="1.3"/>'
        )
        self.line((x - 4, y), (x + 4, y))
        self.line((x, y - 4), (x, y + 4))


def draw_svg(models: Sequence[tuple[str, Structure]]) -> str:
    """Return an SVG with a column for each (title, structure), read from bottom to top."""
    canvases = [Canvas() for _ in models]
    extents = [
        _draw_model(canvas, title, structure)
        for canvas, (title, structure) in zip(canvases, models, strict=True)
    ]
    top = min(top for top, _ in extents) - 16
    bottom = max(bottom for _, bottom in extents) + 16
    widths = [_stack_width(structure) + 2 * MARGIN for _, structure in models]
    width = sum(widths)
    height = bottom - top
    columns = "\n".join(
        f'<g transform="translate({sum(widths[:index])} {-top:g})">\n'
        + "\n".join(canvas.shapes)
        + "\n</g>"
        for index, canvas in enumerate(canvases)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" '
        f'viewBox="0 0 {width} {height:g}" '
        'font-family="Helvetica, Arial, sans-serif" fill="#1c2026">\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{STROKE}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height:g}" fill="#ffffff"/>\n{columns}\n</svg>\n'
    )


def _stack_width(structure: Structure) -> int:
    """Width of the widest row of boxes."""
    widest = max(len(stage) for branch in structure.blocks[0].branches for stage in branch)
    if widest == 1:
        return BOX_WIDTH
    return PARALLEL_BOX_WIDTH * widest + HORIZONTAL_GAP * (widest - 1)


def _draw_model(canvas: Canvas, title: str, structure: Structure) -> tuple[float, float]:
    """Draw a model with its embedding at y = 0; return the y of its top and of its bottom."""
    width = _stack_width(structure)
    block = structure.blocks[0]
    x = MARGIN + width / 2 + 10
    embedding = [
        "Token embedding",
        f"{structure.vocab_size:,} tokens × {structure.hidden_size:,}",
        *(["+ learned positions"] if structure.positions == "learned" else []),
    ]
    block_bottom = canvas.box(Box(embedding, "end"), x, 0) - VERTICAL_GAP
    background_index = len(canvas.shapes)  # the background is drawn before what stands on it
    y = block_bottom
    for branch in block.branches:
        y = _draw_branch(canvas, structure, block, branch, x, y)
    block_top = y - 10
    background = Canvas()
    background.rectangle(
        x - width / 2 - 26,
        block_top,
        width + 42,
        block_bottom - block_top,
        "#f8fafd",
        "#b4bac6",
        10,
    )
    background.text(
        f"{structure.layers} ×",
        x - width / 2 - 32,
        (block_bottom + block_top) / 2,
        14,
        "600",
        "end",
    )
    canvas.shapes[background_index:background_index] = background.shapes
    canvas.line((x, block_bottom + VERTICAL_GAP), (x, block_bottom))
    canvas.line((x, y), (x, block_top - VERTICAL_GAP), arrow=True)
    top = _draw_head(canvas, title, structure, x, block_top - VERTICAL_GAP)
    notes = [line for other in structure.blocks[1:] for line in _describe_difference(other, block)]
    for index, note in enumerate(notes):
        canvas.text(note, x, 20 + LINE_HEIGHT * index, 11)
    return top - 50, LINE_HEIGHT * len(notes)


def _draw_head(canvas: Canvas, title: str, structure: Structure, x: float, bottom: float) -> float:
    """Draw final norm, output head and title above ``bottom``; return the y of the head's top."""
    top = canvas.box(Box([structure.norm], "norm"), x, bottom)
    canvas.line((x, top), (x, top - VERTICAL_GAP), arrow=True)
    matrix = f"{structure.hidden_size:,} × {structure.vocab_size:,}"
    if structure.tied:
        matrix = "the matrix of the embedding"
    top = canvas.box(Box(["Output head", matrix], "end"), x, top - VERTICAL_GAP)
    size = f"{format_parameters(structure.parameters)} parameters"
    if structure.experts != "no":
        size += f", {format_parameters(structure.active_parameters)} active"
    canvas.text(size, x, top - 14, 12)
    canvas.text(title, x, top - 33, 16, "700")
    return top


def _draw_branch(
    canvas: Canvas, structure: Structure, block: Block, branch: Branch, x: float, y: float
) -> float:
    """Draw a residual branch upwards from y; return the y where the residual stream continues."""
    start = y - 12
    left = x - _stack_width(structure) / 2 - 14
    canvas.line((x, y), (x, start))
    y = start
    for stage in branch:
        canvas.line((x, y), (x, y - VERTICAL_GAP + 6), arrow=True)
        width = (_stack_width(structure) - HORIZONTAL_GAP * (len(stage) - 1)) / len(stage)
        boxes = [_submodule_box(structure, block, submodule, width) for submodule in stage]
        tallest = max(box.height for box in boxes)
        for index, box in enumerate(boxes):
            center = x + (index - (len(stage) - 1) / 2) * (width + HORIZONTAL_GAP)
            canvas.box(box, center, y - VERTICAL_GAP + 6 - (tallest - box.height) / 2)
        y -= VERTICAL_GAP - 6 + tallest
    plus = y - VERTICAL_GAP
    canvas.line((x, y), (x, plus + 8), arrow=True)
    canvas.line((x, start), (left, start), (left, plus), (x - 8, plus), arrow=True)
    canvas.plus(x, plus)
    return plus - 8


def _submodule_box(structure: Structure, block: Block, submodule: Submodule, width: float) -> Box:
    if submodule.kind == "norm":
        return Box([structure.norm], "norm", width)
    if submodule.kind == "attention":
        return Box(_attention_lines(structure), "attention", width)
    if submodule.kind == "recurrence":
        return Box([submodule.label[:1].upper() + submodule.label[1:]], "recurrence", width)
    if submodule.kind == "feed-forward":
        activation = format_activation(block.feed_forward.activation)
        if submodule.num_experts:
            return Box(_expert_lines(block), "experts", width)
        return Box([activation, f"{submodule.intermediate_size:,} wide"], "feed-forward", width)
    return Box([submodule.name.replace("_", " ")], "other", width)


def _attention_lines(structure: Structure) -> list[str]:
    heads = f"{structure.heads} heads"
    if structure.kv_heads != structure.heads:
        heads += f", {structure.kv_heads} KV heads"
    lines = [
        ATTENTION[structure.attention],
        f"{heads} of {structure.head_size}",
        *structure.positions.split(" : "),
    ]
    if structure.qk_norm != "no":
        lines.append(f"QK-norm {structure.qk_norm}")
    if structure.score_modifiers:
        lines.append(structure.score_modifiers)
    if structure.windows != "full":
        lines.append(structure.windows)
    return lines


def _expert_lines(block: Block) -> list[str]:
    network = block.feed_forward
    lines = [
        "Mixture of experts",
        f"{network.experts_per_token} of {network.num_experts} experts",
        f"{format_activation(network.activation)}, {network.intermediate_size:,} wide",
    ]
    # a dense network in parallel has a box of its own
    sequential = all(len(stage) == 1 for branch in block.branches for stage in branch)
    if network.shared_intermediate_size and sequential:
        lines.append(f"+ shared, {network.shared_intermediate_size:,} wide")
    return lines


def _describe_difference(other: Block, drawn: Block) -> list[str]:
    """Describe how a kind of layers differs from the kind that is drawn."""
    network = other.feed_forward
    layers = describe_layers(other.layers)
    mixer = _mixer(other)
    if mixer != _mixer(drawn):
        return [f"{layers}: {mixer}"]
    if network == drawn.feed_forward:
        return [f"{layers}: other norms or order"]
    if network.num_experts:
        text = f"{network.experts_per_token} of {network.num_experts} experts"
    else:
        text = format_activation(network.activation)
    return [f"{layers}: {text}, {network.intermediate_size:,} wide"]


def _mixer(block: Block) -> str:
    """Name of the module that mixes tokens."""
    modules = [module for branch in block.branches for stage in branch for module in stage]
    mixers = [m for m in modules if m.kind in ("attention", "recurrence")]
    return " and ".join(m.label or "attention" for m in mixers) or "no attention"


def describe_layers(layers: Sequence[int]) -> str:
    """Name layers given by index, counting from 1: "layers 1 to 3", "layers 2, 4 … 48"."""
    first = layers[0] + 1
    last = layers[-1] + 1
    if len(layers) == 1:
        return f"layer {first}"
    step = (last - first) // (len(layers) - 1)
    if list(layers) != list(range(layers[0], layers[-1] + 1, step)):
        return f"{len(layers)} other layers"
    return f"layers {first} to {last}" if step == 1 else f"layers {first}, {first + step} … {last}"
