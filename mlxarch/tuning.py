"""How much memory experts should have on this machine: tried, and remembered.

More is not always faster: what the experts take, the system's own cache of their files cannot have.
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxarch.blueprints import plan_for, remembered, tuned_file
from mlxarch.errors import InvalidInput, OutputError
from mlxarch.generation import Session, check_tokens, decode
from mlxarch.limits import set_limits
from mlxarch.loading import load_model
from mlxarch.memory import Plan, Request
from mlxarch.sampling import Sampling
from mlxarch.tokenizer import Tokenizer

SHARES = (1.0, 0.8, 0.6, 0.4)  # of the memory that experts could have
WARM_UP = 8  # tokens that are not timed: the first ones wait for kernels, and for a cold disk
TEXT = "Write a short story about a lighthouse keeper who repairs radios, and explain how one of them works."


@dataclass(frozen=True)
class Trial:
    """What came of one size: ``bank`` bytes for experts, ``rate`` in tokens a second, ``read`` bytes a token."""

    bank: int
    rate: float
    hit_rate: float
    read: float


def tune(folder: Path, request: Request, tokens: int = 64) -> Iterator[Trial]:
    """Let a model generate ``tokens`` tokens with some sizes of the memory for experts, and remember the best.

    Raises:
        InvalidInput: the model does not stream experts, so there is nothing to choose; or the tokenizer is another's.
        MemoryBudgetError: it does not fit.
        OutputError: what is found out could not be remembered; nothing was tried.
    """
    most = plan_for(folder, replace(request, bank=_UNBOUNDED)).require()
    if most.execution.slots is None:
        raise InvalidInput(f"{folder.name} fits into memory as a whole: there is nothing to tune. {most.words}")
    _keep(remembered())  # if that cannot be done, it is told now and not after minutes
    prompt, trials, seen = Tokenizer.from_folder(folder).encode(TEXT), list[Trial](), set[object]()
    for share in SHARES:
        plan = plan_for(folder, replace(request, bank=int(share * most.weights["experts"])))
        if plan.verdict == "does not fit" or plan.execution.slots in seen:
            continue
        seen.add(plan.execution.slots)
        trials.append(_try(folder, plan, prompt, tokens))
        yield trials[-1]
    remember(folder, max(trials, key=lambda trial: trial.rate))


_UNBOUNDED = 2**62


def _try(folder: Path, plan: Plan, prompt: list[int], tokens: int) -> Trial:
    with set_limits(plan) as claim:
        model, _ = load_model(folder, execution=plan.execution)
    claim.belongs_to(model)
    check_tokens(prompt, model.vocab_size)
    session = Session(model.make_caches(kv=plan.execution.kv))
    warm = [token for token, _ in decode(model, session, prompt, Sampling(), WARM_UP)]
    [(_, timings)] = deque(decode(model, session, [*prompt, *warm], Sampling(), tokens), maxlen=1)
    stats = model.streaming.stats
    found = Trial(plan.weights["experts"], timings.decode_rate, stats.steady_hit_rate, stats.bytes_per_token)
    model.streaming.close()
    del model, session
    mx.clear_cache()
    return found


def remember(folder: Path, best: Trial) -> None:
    """Let later plans give the experts of this model no more than the best trial did. Raises OutputError."""
    _keep(remembered() | {str(folder.resolve()): {"bank": best.bank, "rate": best.rate}})


def _keep(found: dict[str, Any]) -> None:
    file = tuned_file()
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(found))
        partial.replace(file)
    except OSError as error:
        raise OutputError(
            f"{file}, where sizes are remembered, cannot be written: {error.strerror or error}"
        ) from error
