"""Several requests run to their ends on an engine."""

import queue
from collections.abc import Callable, Sequence
from functools import partial

from mlxarch.engine.engine import Engine
from mlxarch.engine.request import GenerationRequest, RowOutput


def run_batch(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    on_output: Callable[[int, RowOutput], bool],
) -> None:
    """Run requests until each has ended.

    Args:
        on_output: called on this thread with the index of a request and its next output; a request
            for which it returns False is cancelled.

    Raises:
        MlxArchError: the error of the first request that failed; the others are cancelled.
    """
    outputs: queue.SimpleQueue[tuple[int, RowOutput]] = queue.SimpleQueue()

    def deliver(index: int, output: RowOutput) -> None:
        outputs.put((index, output))

    handles = [
        engine.submit(request, partial(deliver, index)) for index, request in enumerate(requests)
    ]
    left = len(handles)
    try:
        while left:
            index, output = outputs.get()
            if output.error is not None:
                raise output.error
            if not on_output(index, output):
                handles[index].cancel()
            left -= output.finish_reason is not None
    finally:
        for handle in handles:
            handle.cancel()
