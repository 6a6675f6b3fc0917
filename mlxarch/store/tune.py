"""Find the amount of memory for streamed experts with which a model decodes fastest.

More is not always faster: memory for experts is missing in the operating system's page cache of the
expert files.
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxarch.errors import InvalidInput, OutputError
from mlxarch.generation.decode import check_tokens, decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.hub.hub_cache import model_title
from mlxarch.loading.load import load_model
from mlxarch.planner.mlx_limits import set_limits
from mlxarch.planner.plan import Plan, Request
from mlxarch.ssd_streaming.experts import streaming_of
from mlxarch.store.lookup import plan_folder, read_tuning_results, tuning_file
from mlxarch.tokenizer.tokenizer import Tokenizer

FRACTIONS = (1.0, 0.8, 0.6, 0.4)  # of the memory that is available for experts
WARM_UP_TOKENS = 8  # not timed: the first tokens wait for kernel compilation and a cold disk
PROMPT = (
    "Write a short story about a lighthouse keeper who repairs radios, "
    "and explain how one of them works."
)
_UNLIMITED = 2**62


@dataclass(frozen=True)
class Trial:
    """Measurements with one amount of memory for experts.

    Attributes:
        expert_cache_bytes: memory for experts.
        tokens_per_second: decode speed.
        hit_rate: fraction of the requested experts that were in memory.
        bytes_read_per_token: bytes read from the disk for each token.
    """

    expert_cache_bytes: int
    tokens_per_second: float
    hit_rate: float
    bytes_read_per_token: float

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of ``mlxarch tune --json``; docs/fit.md explains the keys."""
        return {
            "bank": self.expert_cache_bytes,
            "rate": self.tokens_per_second,
            "hit_rate": self.hit_rate,
            "read": self.bytes_read_per_token,
        }


def tune(folder: Path, request: Request, tokens: int = 64) -> Iterator[Trial]:
    """Generate ``tokens`` tokens with several amounts of memory for experts, and save the best.

    Yields:
        Each trial when it is finished.

    Raises:
        InvalidInput: the model does not stream experts, so there is nothing to choose; or the
            tokenizer does not belong to the model.
        MemoryBudgetError: the model does not fit.
        OutputError: results cannot be saved; this is checked before the first trial.
    """
    largest = plan_folder(folder, replace(request, expert_cache_bytes=_UNLIMITED)).require()
    if largest.execution.slots is None:
        raise InvalidInput(
            f"{model_title(folder)} fits into memory as a whole: there is nothing to tune. "
            f"{largest.summary}"
        )
    _write_tuning_results(read_tuning_results())  # fails now rather than after minutes
    prompt = Tokenizer.from_folder(folder).encode(PROMPT)
    trials: list[Trial] = []
    tried: set[object] = set()
    for fraction in FRACTIONS:
        expert_cache_bytes = int(fraction * largest.weights["experts"])
        plan = plan_folder(folder, replace(request, expert_cache_bytes=expert_cache_bytes))
        if plan.verdict == "does not fit" or plan.execution.slots in tried:
            continue
        tried.add(plan.execution.slots)
        trials.append(_run_trial(folder, plan, prompt, tokens))
        yield trials[-1]
    save_best_trial(folder, max(trials, key=lambda trial: trial.tokens_per_second))


def _run_trial(folder: Path, plan: Plan, prompt: list[int], tokens: int) -> Trial:
    with set_limits(plan) as reservation:
        model, _ = load_model(folder, execution=plan.execution)
    reservation.release_with(model)
    check_tokens(prompt, model.vocab_size)
    caches = model.make_caches(kv=plan.execution.kv)
    session = Session(caches, prefill_chunk=plan.execution.chunk)
    warm = [token for token, _ in decode(model, session, prompt, Sampling(), WARM_UP_TOKENS)]
    [(_, timings)] = deque(decode(model, session, [*prompt, *warm], Sampling(), tokens), maxlen=1)
    streaming = streaming_of(model)
    assert streaming is not None  # the plan has slots
    stats = streaming.stats
    trial = Trial(
        plan.weights["experts"], timings.decode_rate, stats.steady_hit_rate, stats.bytes_per_token
    )
    streaming.close()
    del model, session, streaming
    mx.clear_cache()
    return trial


def save_best_trial(folder: Path, best: Trial) -> None:
    """Save a trial, whose memory for experts later plans for this folder do not exceed.

    Raises:
        OutputError: the file of the results cannot be written.
    """
    result = {"bank": best.expert_cache_bytes, "rate": best.tokens_per_second}
    _write_tuning_results(read_tuning_results() | {str(folder.resolve()): result})


def _write_tuning_results(results: dict[str, Any]) -> None:
    file = tuning_file()
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(results))
        partial.replace(file)
    except OSError as error:
        raise OutputError(
            f"{file}, where sizes are remembered, cannot be written: {error.strerror or error}"
        ) from error
