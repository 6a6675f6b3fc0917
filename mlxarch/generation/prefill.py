"""Prefill: fill the KV caches with a prompt, chunk by chunk, and return the logits after its last token.

Chunks bound the memory of activations. Layers whose experts stay on the SSD process several chunks
together, so that each expert is read once for all of them (see
``ssd_streaming.layerwise_prefill``).
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from mlxarch.blocks import Cache, CausalLM
from mlxarch.generation.pace import OnPart, compute_caches, compute_state, pace_of
from mlxarch.generation.session import Session
from mlxarch.kv_cache.base import evaluate_caches
from mlxarch.ssd_streaming.experts import ExpertStreaming, streaming_of
from mlxarch.ssd_streaming.layerwise_prefill import prefill as prefill_by_layers
from mlxarch.ssd_streaming.layerwise_prefill import segments


def default_chunk() -> int:
    """Most tokens of a prompt that run in one pass by default: 512 on a CPU, which gains nothing
    from more, else 2048.
    """
    return 512 if mx.default_device() == mx.cpu else 2048


Report = Callable[[int, int], None]
"""Callback with the tokens of a prompt that are read and their number, after each evaluation."""


def prefill(
    model: CausalLM, session: Session, prompt: Sequence[int], report: Report | None = None
) -> mx.array:
    """Process the part of ``prompt`` that the session does not hold yet, and save a snapshot.

    The snapshot is taken after the prompt, or shortly before its end if there are recurrent layers:
    see ``Session.resume_tokens``.

    Args:
        report: called with the tokens of ``prompt`` that are processed, and their number.

    Returns:
        Logits (1, V) after the last token of the prompt.
    """
    resume = len(prompt) - session.resume_tokens
    if len(session.tokens) < resume < len(prompt):
        _read(model, session, prompt, resume, report)
        session.save_snapshot()
        state = _read(model, session, prompt, len(prompt), report)
    else:
        state = _read(model, session, prompt, len(prompt), report)
        session.save_snapshot()
    return model.head(state[:, -1:])[:, 0]


def _read(
    model: CausalLM, session: Session, prompt: Sequence[int], end: int, report: Report | None
) -> mx.array:
    """Process tokens of ``prompt`` up to ``end``; gives the hidden states of the last chunk."""
    rest = mx.array([prompt[len(session.tokens) : end]])

    def on_tokens(count: int) -> None:
        session.tokens += prompt[len(session.tokens) :][:count]

    def on_part(count: float) -> None:
        if report is not None:
            report(len(session.tokens) + int(count), len(prompt))

    chunk = session.prefill_chunk
    return feed(model, rest, session.caches, streaming_of(model), chunk, on_tokens, on_part)


def feed(
    model: CausalLM,
    tokens: mx.array,
    caches: Sequence[Cache | None],
    streaming: ExpertStreaming | None,
    chunk: int | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
    on_part: Callable[[float], None] = lambda count: None,
) -> mx.array:
    """Append tokens (B, L) to the caches, chunk by chunk.

    Args:
        streaming: offloaded experts of the model, see ``streaming_of``.
        chunk: most tokens of a chunk; None takes the default of the machine.
        on_tokens: called with the number of tokens (L) that the caches hold since the last call.
        on_part: called after each evaluation inside a chunk, with the tokens to which its work
            corresponds since the last call of ``on_tokens``.

    Returns:
        Hidden states (B, L, hidden_size) after the last layer, of the last chunk.
    """
    chunks = _chunks(model, tokens, chunk or default_chunk())
    groups = segments(model, streaming, [*chunks]) if streaming else ([each] for each in chunks)
    left = tokens.shape[1]
    for group in groups:
        count = sum(each.shape[1] for each in group)
        left -= count
        if left:
            fill_caches(model, group, caches, streaming, lambda done, n=count: on_part(done * n))
            on_tokens(count)
            continue
        if streaming and len(group) > 1:
            state = prefill_by_layers(model, streaming, group, caches)
        else:
            state = compute_state(model, group[0], caches, lambda done, n=count: on_part(done * n))
        on_tokens(count)
        return state
    raise AssertionError("there are no tokens")


def fill_caches(
    model: CausalLM,
    group: Sequence[mx.array],
    caches: Sequence[Cache | None],
    streaming: ExpertStreaming | None,
    on_part: OnPart = lambda done: None,
) -> None:
    """Append chunks (B, L) to the caches, and compute nothing after the last of them.

    Args:
        group: one chunk, or with offloaded experts the chunks of a segment.
        on_part: see ``pace``; of a segment it is not called.
    """
    if streaming and len(group) > 1:
        prefill_by_layers(model, streaming, group, caches, only_caches=True)
        evaluate_caches(caches)
    else:
        compute_caches(model, group[0], caches, on_part)


def _chunks(model: CausalLM, tokens: mx.array, most: int) -> Iterator[mx.array]:
    """Split tokens (B, L) into chunks; each is drawn when its pass begins, and sized by the pace."""
    # A pass that only fills caches skips the rest of the last layer. On a CPU, where a pass over
    # one token costs little, all tokens of a single prompt but the last go that way.
    batch, length = tokens.shape
    last_apart = batch == 1 and mx.default_device() == mx.cpu
    start = 0
    while start < length:
        size = pace_of(model).tokens(most, batch)
        left = length - start
        if left > 1 and (last_apart or left > size):
            size = min(size, left - 1)
        yield tokens[:, start : start + size]
        start += size
