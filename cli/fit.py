"""``mlxarch fit``: what a model takes on a machine, before it is downloaded."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mlxarch.cli import options
from mlxarch.cli.output import answer, answer_json, say, size, table

if TYPE_CHECKING:
    from mlxarch.memory import Plan

DOES_NOT_FIT = 4  # exit code, as of MemoryBudgetError
CONTEXTS = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
BITS = (16, 8, 6, 5, 4, 3, 2)
WIDTHS = tuple(map(str, BITS))


@click.command("fit")
@click.argument("model", required=False)
@options.model_option
@options.memory_options
@click.option("--machine", metavar="NAME", help="Plan for this one, such as m4-24gb or m4-pro-48gb.")
@click.option("--bits", type=click.Choice(WIDTHS), help="Of the weights; else as they are, or of a short name 8, or 4.")
@click.option(*options.CONTEXT, type=options.Tokens(), metavar="TOKENS", help="Such as 32k; else what fits.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; docs/fit.md explains the keys.")
def fit_command(
    model: str | None,
    named: str | None,
    machine: str | None,
    bits: str | None,
    context: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Tell whether a model fits, with every term, and how fast it would be.

    No weights are needed: a short name is known already, of a repository only headers are fetched. The exit code is 0
    where it fits, in memory or with a part of it read from the disk, and 4 where it does not.
    """
    from mlxarch.backend import require_backend

    require_backend()
    from mlxarch import machines
    from mlxarch.blueprints import blueprint_of
    from mlxarch.memory import best_plan, plan

    blueprint, asked = blueprint_of(options.the_model(named, model))
    if isinstance(asked, int) and bits not in (None, str(asked)):
        raise click.UsageError(f"the name asks for {asked} bits and --bits for {bits}; say it once")
    target = machines.named(machine) if machine else machines.here()
    wanted = int(bits) if bits else asked if isinstance(asked, int) else None
    request = replace(options.asked(context=context, **given), bits=wanted)
    chosen = (plan if asked == "original" or blueprint.packed else best_plan)(blueprint, target, request)
    widths = [chosen.bits] if wanted or blueprint.packed else BITS
    contexts = [context] if context else [c for c in CONTEXTS if c <= blueprint.longest] or [blueprint.longest]

    def cell(width: int, context: int) -> "Plan":
        width_or_own = wanted if blueprint.packed else width
        return plan(blueprint, target, replace(request, bits=width_or_own, context=context), advise=False)

    cells = [[cell(width, context) for context in contexts] for width in widths]
    if as_json:
        answer_json(_json(chosen, cells))
    else:
        _show(chosen, cells)
    if chosen.verdict == "does not fit":
        raise click.exceptions.Exit(DOES_NOT_FIT)


def _json(chosen: "Plan", cells: "list[list[Plan]]") -> dict[str, Any]:
    from mlxarch.rates import FORMULA

    machine = chosen.machine
    return {
        **_cell(chosen),
        "model": chosen.model,
        "machine": {
            **{"name": machine.name, "memory_bytes": machine.memory, "backend": machine.backend},
            **{"bandwidth": machine.bandwidth, "ssd": machine.ssd},
        },
        "memory_bytes": chosen.memory,
        "terms": chosen.terms,
        "remedies": list(chosen.remedies),
        "formula": FORMULA,
        "table": [_cell(cell) for row in cells for cell in row],
    }


def _cell(plan: "Plan") -> dict[str, Any]:
    slots = plan.execution.slots
    return {
        **{"bits": plan.bits, "context": plan.context, "kv_bits": plan.kv_bits, "verdict": plan.verdict},
        **{"streamed": plan.streamed, "ple": plan.execution.ple, "slots": list(slots) if slots else None},
        **{"chunk": plan.execution.chunk, "segment": plan.execution.segment},
        **{"total_bytes": plan.total, "mlx_peak_bytes": plan.mlx, "process_peak_bytes": plan.peak},
        "tokens_per_second": plan.rate and round(plan.rate, 2),
    }


def _show(chosen: "Plan", cells: "list[list[Plan]]") -> None:
    from mlxarch.rates import FORMULA

    kv = f", keys and values at {chosen.kv_bits}" if chosen.kv_bits else ""
    answer(f"{chosen.model} at {chosen.bits} bits{kv}, {chosen.context} tokens of context, on {chosen.machine.name}")
    rows = [(term, f"{count / 1e9:.2f} GB") for term, count in chosen.terms.items() if count >= 5 * 10**6]
    rows += [("together", f"{chosen.total / 1e9:.2f} GB"), ("may use", f"{chosen.memory / 1e9:.2f} GB")]
    width = max(len(term) for term, _ in rows)
    for term, amount in rows:
        answer(f"  {term.ljust(width)}  {amount:>10}")
    how = chosen.streamed or ("all of it in memory" if chosen.verdict == "resident" else "")
    answer(f"{chosen.verdict}{': ' if how else ''}{how}{_rate(chosen)}")
    for remedy in chosen.remedies:
        answer(f"  {remedy}")
    answer()
    table([["bits", *(_tokens(cell.context) for cell in cells[0])], *([str(r[0].bits), *map(_word, r)] for r in cells)])
    told = {word: text for word, text in _CELLS.items() if any(word in _word(cell) for row in cells for cell in row)}
    say("each cell: the memory it takes" + "".join(f"; {word}: {text}" for word, text in told.items()), dim=True)
    if chosen.rate is not None:
        say(f"estimated: {FORMULA}; bandwidths as measured elsewhere", dim=True)


_CELLS = {
    "no": "does not fit",
    "streamed": "experts from the disk, as many as need be",
    "PLE": "per-layer embeddings from the disk",
    "/s": "tokens a second",
}


def _rate(plan: "Plan") -> str:
    return f", about {plan.rate:.3g} tokens a second" if plan.rate and plan.verdict != "does not fit" else ""


def _word(plan: "Plan") -> str:
    if plan.verdict == "does not fit":
        return f"no, {size(plan.total)}"
    rate = f" {plan.rate:.3g}/s" if plan.rate else ""
    if plan.verdict == "resident":
        return f"{size(plan.total)}{rate}"
    return f"streamed{rate}" if plan.execution.slots else f"{size(plan.total)} PLE{rate}"


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)
