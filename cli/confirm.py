"""Question before a download or a conversion that is large or takes long."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from mlxarch.cli.output import is_terminal, print_stderr
from mlxarch.progress import format_duration, format_size

if TYPE_CHECKING:
    from mlxarch.store.obtain import Acquisition

CONFIRM_ABOVE = 5 * 10**9  # bytes of download or disk


def make_confirm(yes: bool) -> "Callable[[Acquisition], bool]":
    """Make a function that announces an acquisition, and asks about one that is large or slow.

    Raises:
        click.UsageError: it is, and there is neither a terminal nor --yes.
    """
    from mlxarch.store.obtain import LONG_SECONDS

    def confirm(plan: "Acquisition") -> bool:
        print_stderr(f"{plan.name}: {plan.description}; to {plan.target}")
        if plan.verdict:
            print_stderr(f"{plan.name}: {plan.verdict}")
        large = max(plan.download_bytes, plan.disk_bytes) > CONFIRM_ABOVE
        slow = plan.seconds > LONG_SECONDS
        costs = f"{format_size(plan.disk_bytes)} of disk"
        if slow:
            costs += f" and about {format_duration(plan.seconds)}"
            print_stderr(
                f"{plan.name}: the search for the best scales takes about "
                f"{format_duration(plan.seconds)} on this machine"
            )
            if plan.quicker:
                print_stderr(f"quicker: {plan.quicker}")
        fits = not plan.verdict.startswith("does not fit")
        if yes or (fits and not large and not slow):
            return True
        if not is_terminal(sys.stdin):
            if large or slow:
                raise click.UsageError(
                    f"{plan.name} takes {costs}, and nobody is there to be asked: --yes agrees"
                )
            return True
        warning = "" if fits else ", and it does not fit into the memory of this machine"
        return click.confirm(f"That takes {costs}{warning}. Go on?", default=fits, err=True)

    return confirm
