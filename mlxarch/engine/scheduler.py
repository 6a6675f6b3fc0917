"""Which requests run in the next step, and which part of a prompt is read.

Each turn computes one decoding step for all running rows, and then reads at most one chunk of a
prompt, of the request that has waited longest. A running answer therefore pauses for a chunk at
most, and a long prompt gets on at every step.
"""

from collections import Counter, deque
from collections.abc import Callable

import mlx.core as mx

from mlxarch.blocks import Cache, CausalLM
from mlxarch.engine.probe import BatchSizes, probe_batch_sizes
from mlxarch.engine.request import FinishReason
from mlxarch.engine.row import Row
from mlxarch.engine.steps import NOT_FINITE, Choice, PromptReader, choose, forward
from mlxarch.errors import MlxArchError, NonFiniteLogits


class Scheduler:
    """Requests of one engine; used by the engine's thread only.

    Args:
        model: network.
        make_caches: creates the empty caches of a row.
        reader: reader of prompts.
        max_rows: rows that run at the same time.

    Attributes:
        waiting: requests that have not begun.
        reading: rows whose prompt is being read, the oldest first.
        running: rows that decode.
        counters: totals since the start, by name.
        batch_sizes: numbers of rows that a decoding pass may have.
    """

    def __init__(
        self,
        model: CausalLM,
        make_caches: Callable[[], list[Cache | None]],
        reader: PromptReader,
        max_rows: int,
    ) -> None:
        self.model = model
        self.reader = reader
        self.waiting: deque[Row] = deque()
        self.reading: list[Row] = []
        self.running: list[Row] = []
        self.counters: Counter[str] = Counter()
        self.batch_sizes = BatchSizes((), independent=False)
        self._make_caches = make_caches
        self._max_rows = max_rows
        self._unread: list[Choice] = []

    @property
    def rows(self) -> list[Row]:
        """All rows that have caches."""
        return [*self.running, *self.reading]

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute or deliver."""
        return not (self.waiting or self.reading or self.running or self._unread)

    def probe(self, deterministic: bool) -> None:
        """Find out in which batch sizes a row does not depend on its neighbours."""
        self.batch_sizes = probe_batch_sizes(self.model, self._max_rows, deterministic)

    def turn(self) -> None:
        """Compute one decoding step and one chunk of a prompt, and deliver the step before."""
        self._drop_cancelled()
        self._admit()
        try:
            self._decode()
        except MlxArchError as error:  # such as an expert that cannot be read
            for row in self.running:
                self.finish(row, "error", error)
            self._unread = []
        self._remove_finished()
        self._read_prompts()
        self._remove_finished()

    def finish(self, row: Row, reason: FinishReason, error: MlxArchError | None = None) -> None:
        """End a row without another token."""
        if not row.finished:
            self.counters[f"finished_{reason}"] += 1
            row.finish(reason, error)

    def finish_all(self, reason: FinishReason, error: MlxArchError | None = None) -> None:
        """End every request."""
        for row in [*self.rows, *self.waiting]:
            self.finish(row, reason, error)
        self.waiting.clear()
        self._unread = []
        self._remove_finished()

    def _drop_cancelled(self) -> None:
        for row in [*self.rows, *self.waiting]:
            if row.handle.cancelled:
                self.finish(row, "cancelled")
        self.waiting = deque(row for row in self.waiting if not row.finished)
        self._remove_finished()

    def _remove_finished(self) -> None:
        self.running = [row for row in self.running if not row.finished]
        self.reading = [row for row in self.reading if not row.finished]

    def _admit(self) -> None:
        while self.waiting and len(self.rows) < self._max_rows:
            row = self.waiting.popleft()
            row.admit(self._make_caches())
            self.reading.append(row)

    def _decode(self) -> None:
        """Queue the next step, deliver the tokens of the one before, and choose the next ones.

        Where a matcher needs the token before to know which ones may follow, the logits are
        computed while that token is delivered, and the choice comes after.
        """
        rows = [row for row in self.running if row.may_choose]
        unread = self._unread
        self._unread = []
        logits = None
        if rows:
            logits = forward(self.model, rows, self.batch_sizes.at_least(len(rows)))
            if any(row.request.matcher is not None for row in rows):
                mx.async_eval(logits)
            else:
                self._unread.append(choose(rows, logits))
        for choice in unread:
            self._deliver(choice)
        if logits is not None and not self._unread:
            left = [index for index, row in enumerate(rows) if not row.finished]
            if left:
                some = logits if len(left) == len(rows) else logits[mx.array(left)]
                self._unread.append(choose([rows[index] for index in left], some))

    def _deliver(self, choice: Choice) -> None:
        for row, token, logprobs in choice.read():
            if row.finished:
                continue
            if token == NOT_FINITE:
                error = NonFiniteLogits(
                    f"the model's output is not finite at generated token {len(row.tokens)}: a "
                    "weight file is damaged, or the precision too low; download it again, or load "
                    "it with dtype='float32'"
                )
                self.finish(row, "error", error)
                continue
            row.add(token, logprobs)
            self.counters["generated_tokens"] += 1
            if row.finished:
                self.counters[f"finished_{row.reason}"] += 1

    def _read_prompts(self) -> None:
        """Read one chunk, or the rest of several short prompts that are no longer together."""
        budget = self.reader.chunk
        for row in list(self.reading):
            count = self.reader.next_tokens(row)
            if count > budget:
                break
            try:
                done = self._read_chunk(row)
            except MlxArchError as error:
                self.finish(row, "error", error)
                continue
            budget -= count
            if not done:
                break

    def _read_chunk(self, row: Row) -> bool:
        """Read the next chunk of a prompt; gives whether the row is done with it."""
        before = row.fed
        logits = self.reader.read(row)
        self.counters["prompt_tokens"] += row.fed - before
        if logits is None:
            row.report_progress()
            return False
        self.reading.remove(row)
        if row.may_choose:
            self._unread.append(choose([row], logits))
            self.running.append(row)
        else:
            self.finish(row, "length")
        return True
