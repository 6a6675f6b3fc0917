"""Models of which some experts are in memory, and a fingerprint of all that a model computes."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxarch.blocks import CausalLM
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.execution import Execution
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.ssd_streaming.attach import experts_of
from mlxarch.ssd_streaming.experts import streaming_of


def slots(folder: Path, count: int) -> tuple[int, ...]:
    """``count`` in every layer that has experts."""
    return tuple(count if sparse else 0 for sparse in sparse_layers(folder))


@cache
def sparse_layers(folder: Path) -> list[bool]:
    """Which layers have experts; no test writes another model in the place of one."""
    resolved = resolve(open_checkpoint(folder))
    return [layer in experts_of(resolved.model) for layer in range(len(resolved.model.layers))]


def load(folder: Path, count: int | None = None) -> CausalLM:
    execution = Execution() if count is None else Execution(slots=slots(folder, count))
    return load_model(folder, dtype="float32", execution=execution)[0]


def fingerprint(model: CausalLM, prompt: int = 70, tokens: int = 6) -> str:
    """Hash of the logits of a long pass, of a pass after it and of single steps, and of the generated tokens."""
    ids = np.random.default_rng(1).integers(0, model.vocab_size, prompt)
    seen, caches = hashlib.sha256(), model.make_caches()
    for some in (ids[: prompt // 2], ids[prompt // 2 : -3], *ids[-3:, None]):
        seen.update(np.asarray(model(mx.array(some[None]), caches)).tobytes())
    session = Session(model.make_caches(), renew=model.make_caches)
    seen.update(
        repr(
            [token for token, _ in decode(model, session, ids.tolist(), Sampling(), tokens)]
        ).encode()
    )
    seen.update(
        np.asarray(
            mx.concatenate([a.flatten() for c in session.caches if c for a in c.arrays()])
        ).tobytes()
    )
    return seen.hexdigest()


def attached(model: CausalLM) -> Any:
    """The offloaded experts of a network that has some."""
    found = streaming_of(model)
    assert found is not None
    return found
