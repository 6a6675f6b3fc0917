"""``mlxarch fit``: predicted memory and speed of a model on a machine, before any download."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mlxarch.cli import options
from mlxarch.cli.output import print_json, print_line, print_stderr, print_table
from mlxarch.quantization import formats

if TYPE_CHECKING:
    from mlxarch.planner.blueprint import Blueprint
    from mlxarch.planner.plan import Plan, Request
    from mlxarch.system.machines import Machine

DOES_NOT_FIT = 4  # exit code, the same as of MemoryBudgetError
CONTEXTS = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
BITS = (16, *sorted(formats.BITS, reverse=True))


@click.command("fit")
@click.argument("model", required=False)
@options.model_option
@options.memory_options
@click.option(
    "--machine",
    metavar="NAME",
    help="Machine to plan for, e.g. m4-24gb or m4-pro-48gb (default: this one)",
)
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in BITS]),
    help="Weight bits (default: as stored; for a short name 8, or 4 if 8 does not fit)",
)
@click.option(
    *options.CONTEXT_FLAGS,
    type=options.TokenCount(),
    metavar="TOKENS",
    help="Context window, e.g. 32k (default: as large as model and memory allow)",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (keys: docs/fit.md).")
def fit_command(
    model: str | None,
    model_flag: str | None,
    machine: str | None,
    bits: str | None,
    context: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Estimate whether a model fits into memory, and its speed.

    No weights are downloaded: the catalog knows short names, and of a repository only the headers
    are read. The exit code is 0 if the model fits, in memory or partly on the SSD, and 4 if not.
    """
    from mlxarch.system.backend import require_backend

    require_backend()
    from mlxarch.planner.planner import best_plan, plan
    from mlxarch.store.named_blueprint import blueprint_from_name
    from mlxarch.system import machines

    name = options.resolve_model_name(model_flag, model)
    blueprint, named_bits = blueprint_from_name(name)
    if isinstance(named_bits, int) and bits not in (None, str(named_bits)):
        raise click.UsageError(
            f"the name asks for {named_bits} bits and --bits for {bits}; say it once"
        )
    target = machines.find_machine(machine) if machine else machines.this_machine()
    if bits:
        wanted = int(bits)
    else:
        wanted = named_bits if isinstance(named_bits, int) else None
    request = replace(options.make_request(context=context, **given), bits=wanted)
    as_stored = named_bits == "original" or blueprint.is_quantized
    chosen = (plan if as_stored else best_plan)(blueprint, target, request)
    table = _plan_table(blueprint, target, request, chosen.bits)
    if as_json:
        print_json(_plan_json(chosen, table))
    else:
        _print_plan(chosen, table)
    if chosen.verdict == "does not fit":
        raise click.exceptions.Exit(DOES_NOT_FIT)


def _plan_table(
    blueprint: "Blueprint", machine: "Machine", request: "Request", chosen_bits: int
) -> "list[list[Plan]]":
    """Plan every combination of bits (rows) and context windows (columns) not fixed by the request.

    The bits of a quantized checkpoint are fixed.
    """
    from mlxarch.planner.planner import plan

    fixed_bits = request.bits or blueprint.is_quantized
    all_bits = [chosen_bits] if fixed_bits else BITS
    contexts = [context for context in CONTEXTS if context <= blueprint.max_context]
    if request.context:
        contexts = [request.context]
    table = []
    for bits in all_bits:
        row = []
        for context in contexts or [blueprint.max_context]:
            planned_bits = request.bits if blueprint.is_quantized else bits
            cell = replace(request, bits=planned_bits, context=context)
            row.append(plan(blueprint, machine, cell, advise=False))
        table.append(row)
    return table


def _plan_json(chosen: "Plan", table: "list[list[Plan]]") -> dict[str, Any]:
    from mlxarch.planner.decode_speed import FORMULA

    machine = chosen.machine
    return {
        **_cell_json(chosen),
        "model": chosen.model,
        "machine": {
            "name": machine.name,
            "memory_bytes": machine.memory,
            "backend": machine.backend,
            "bandwidth": machine.bandwidth,
            "ssd": machine.ssd,
        },
        "memory_bytes": chosen.memory,
        "terms": chosen.terms,
        "remedies": list(chosen.remedies),
        "formula": FORMULA,
        "table": [_cell_json(cell) for row in table for cell in row],
    }


def _cell_json(plan: "Plan") -> dict[str, Any]:
    execution = plan.execution
    return {
        "bits": plan.bits,
        "context": plan.context,
        "kv_bits": plan.kv_bits,
        "verdict": plan.verdict,
        "streamed": plan.offloaded,
        "ple": execution.ple,
        "slots": list(execution.slots) if execution.slots else None,
        "chunk": execution.chunk,
        "segment": execution.segment,
        "total_bytes": plan.total,
        "mlx_peak_bytes": plan.mlx_peak,
        "process_peak_bytes": plan.process_peak,
        "tokens_per_second": plan.tokens_per_second and round(plan.tokens_per_second, 2),
    }


SMALL_TERM = 0.02  # part of the sum below which a term is listed with others


def _print_plan(chosen: "Plan", table: "list[list[Plan]]") -> None:
    """Print the terms of the memory, the table, and last the verdict, on one screen."""
    kv = f", keys and values at {chosen.kv_bits}" if chosen.kv_bits else ""
    print_line(
        f"{chosen.model} at {chosen.bits} bits{kv}, {chosen.context} tokens of context, "
        f"on {chosen.machine.name}"
    )
    least = SMALL_TERM * chosen.total
    terms = [(term, f"{size / 1e9:.2f} GB") for term, size in chosen.terms.items() if size >= least]
    if rest := sum(size for size in chosen.terms.values() if size < least):
        terms.append(("the rest", f"{rest / 1e9:.2f} GB"))
    terms.append(("together", f"{chosen.total / 1e9:.2f} GB"))
    width = max(len(term) for term, _ in terms)
    for term, amount in terms:
        print_line(f"  {term.ljust(width)}  {amount:>10}")
    print_line()
    _print_plan_table(chosen, table)
    placement = chosen.offloaded or ("all of it in memory" if chosen.verdict == "resident" else "")
    speed = ""
    if chosen.tokens_per_second and chosen.verdict != "does not fit":
        speed = f", about {chosen.tokens_per_second:.3g} tokens a second"
    print_line(
        f"{chosen.verdict}{': ' if placement else ''}{placement}{speed}; "
        f"{chosen.total / 1e9:.2f} GB of the {chosen.memory / 1e9:.2f} GB that it may use"
    )
    for remedy in chosen.remedies:
        print_line(f"  {remedy}")


_CELL_LEGEND = {
    "no": "does not fit",
    "SSD": "experts from the disk, as many as need be",
    "PLE": "per-layer embeddings from the disk",
    "*": "reads prompts in shorter chunks",
    "/s": "tokens a second, estimated (docs/fit.md)",
}


def _print_plan_table(chosen: "Plan", table: "list[list[Plan]]") -> None:
    cells = [[_format_cell(plan) for plan in row] for row in table]
    header = ["bits", *(_format_tokens(plan.context) for plan in table[0])]
    rows = [[str(plans[0].bits), *row] for plans, row in zip(table, cells, strict=True)]
    # the longest contexts go first where a terminal is too narrow
    print_table([header, *rows], optional=range(len(header) - 1, 1, -1))
    legend = "GB of memory"
    for mark, meaning in _CELL_LEGEND.items():
        if any(mark in cell for row in cells for cell in row):
            legend += f"; {mark}: {meaning}"
    print_stderr(legend, dim=True)


def _format_cell(plan: "Plan") -> str:
    size = f"{plan.total / 1e9:.{1 if plan.total >= 10**9 else 2}f}"
    if plan.verdict == "does not fit":
        return f"no {size}"
    speed = f" {plan.tokens_per_second:.2g}/s" if plan.tokens_per_second else ""
    if plan.tokens_per_second and plan.tokens_per_second >= 100:
        speed = f" {plan.tokens_per_second:.0f}/s"
    mark = "*" if plan.execution.chunk else ""
    if plan.execution.slots:
        return f"SSD{mark}{speed}"
    return f"{size}{mark}{speed}{' PLE' if plan.verdict == 'streamed' else ''}"


def _format_tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)
