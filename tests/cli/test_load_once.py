"""From a name to an answer, each step of loading happens once: lookup, opening, resolving, building."""

import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mlxarch
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.hub import catalog
from mlxarch.loading.registry import Architecture
from mlxarch.loading.resolve import resolve
from mlxarch.store.obtain import obtain

STEPS: dict[str, Callable[..., Any]] = {
    "obtain": obtain,
    "parse": catalog.parse,
    "open": open_checkpoint,
    "resolve": resolve,
    "build": Architecture.build,
}
ONCE = dict.fromkeys(STEPS, 1)


def count_calls(action: Callable[[], object]) -> dict[str, int]:
    """Calls of each step while ``action`` runs, in any thread and wherever it is imported from."""
    names = {step.__code__: name for name, step in STEPS.items()}
    counts = Counter[str]()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in names:
            counts[names[frame.f_code]] += 1

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return dict(counts)


def run(invoke: Any, *arguments: str) -> Callable[[], object]:
    def action() -> None:
        result = invoke("run", *arguments, "Hello", "-n", "2")
        assert result.exit_code == 0, result.output

    return action


def test_a_folder_is_opened_resolved_and_built_once(invoke: Any, tiny: str) -> None:
    assert count_calls(run(invoke, tiny)) == ONCE


def test_a_catalog_name_is_looked_up_opened_resolved_and_built_once(
    invoke: Any, tiny: str, home: Path
) -> None:
    shutil.copytree(tiny, home / "data" / "models" / "smollm2-135m-8bit")
    assert count_calls(run(invoke, "smollm2-135m")) == ONCE


def test_a_second_load_is_counted(tiny: str) -> None:
    def twice() -> None:
        mlxarch.load(tiny)
        mlxarch.load(tiny)

    assert count_calls(twice) == dict.fromkeys(STEPS, 2)
