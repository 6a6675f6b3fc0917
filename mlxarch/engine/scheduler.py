"""Which requests run in the next step, and which part of a prompt is read.

Each turn computes one decoding step for all running rows, and then reads at most one chunk of a
prompt, of the request that has waited longest. A running answer therefore pauses for a chunk at
most, and a long prompt gets on at every step.
"""

import logging
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlxarch.blocks import CausalLM
from mlxarch.engine.admission import MakeCaches, MemoryRoom
from mlxarch.engine.prefix.use import PrefixUse
from mlxarch.engine.probe import BatchSizes, candidates, probe_batch_sizes
from mlxarch.engine.request import FinishReason
from mlxarch.engine.row import Row
from mlxarch.engine.steps import NOT_FINITE, Cancelled, Choice, PromptReader, choose, forward
from mlxarch.errors import GenerationError, MlxArchError, NonFiniteLogits
from mlxarch.kv_cache import CacheBatch, can_batch

logger = logging.getLogger(__name__)


class Scheduler:
    """Requests of one engine; used by the engine's thread only.

    Args:
        model: network.
        make_caches: creates the empty caches of a row.
        reader: reader of prompts.
        room: memory for the rows and the prefix cache.
        prefixes: reuse of earlier prompts.
        max_rows: rows that run at the same time.
        spill: folder for the caches of rows that are set aside; None keeps them in memory.
        shares_arrays: whether rows that decode together have their caches in shared arrays.

    Attributes:
        waiting: requests that have not begun.
        reading: rows whose prompt is being read, the oldest first.
        running: rows that decode.
        aside: rows that were set aside because older ones needed their memory.
        counters: totals since the start, by name.
        seconds_per_request: moving average of the seconds that a request runs.
        batch_sizes: numbers of rows that a decoding pass may have.
        shared: shared arrays of the rows that decode together.
    """

    floor_tokens = 2048  # for each place of a batch, which may be allocated whatever the rows hold
    most_padding = 3  # tokens allocated in shared arrays for each that the rows hold

    def __init__(
        self,
        model: CausalLM,
        make_caches: MakeCaches,
        reader: PromptReader,
        room: MemoryRoom,
        prefixes: PrefixUse,
        max_rows: int,
        spill: Path | None = None,
        shares_arrays: bool = False,
    ) -> None:
        self.model = model
        self.reader = reader
        self.room = room
        self.prefixes = prefixes
        self.waiting: deque[Row] = deque()
        self.reading: list[Row] = []
        self.running: list[Row] = []
        self.aside: list[Row] = []
        self.counters: Counter[str] = Counter()
        self.batch_sizes = BatchSizes(tuple(candidates(max_rows)), independent=False)
        self._make_caches = make_caches
        self._max_rows = max_rows
        self._spill = spill
        self._shares_arrays = shares_arrays
        self.shared = CacheBatch()
        self._unread: list[Choice] = []
        self.seconds_per_request = 0.0
        self._turns = 0
        self._blocked = False  # whether the first that waits found no room in the last turn

    @property
    def rows(self) -> list[Row]:
        """All rows that have caches."""
        return [*self.running, *self.reading]

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute or deliver."""
        return not (self.waiting or self.aside or self.rows or self._unread)

    @property
    def has_work(self) -> bool:
        """Whether a turn would do something; rows that are paused only hold their caches."""
        if self._unread or self.reading or any(self._goes_on(row) for row in self.running):
            return True
        rows = [*self.rows, *self.aside, *self.waiting]
        if any(row.handle.cancelled for row in rows):
            return True
        return bool(self.aside or self.waiting) and not self._is_full

    @property
    def _is_full(self) -> bool:
        """Whether rows that are paused leave no room for those that wait."""
        return bool(self.running) and (self._blocked or len(self.rows) >= self._max_rows)

    @staticmethod
    def _goes_on(row: Row) -> bool:
        return row.may_choose and not row.handle.paused

    def settle(self) -> None:
        """Wait until the device has computed what was queued."""
        mx.eval([choice.checked for choice in self._unread])

    def probe(self, deterministic: bool) -> None:
        """Find out in which batch sizes a row does not depend on its neighbours."""
        self.batch_sizes = probe_batch_sizes(
            self.model, self._max_rows, deterministic, self._shares_arrays
        )

    def turn(self) -> None:
        """Compute one decoding step and one chunk of a prompt, and deliver the step before."""
        self._drop_cancelled()
        self._reserve_for_growth()
        self._resume()
        self._admit()
        try:
            self._decode()
        except MlxArchError as error:  # such as an expert that cannot be read
            for row in self.running:
                row.finish("error", error)
            self._unread = []
        self._remove_finished()
        self._read_prompts()
        self._remove_finished()

    def finish_all(self, reason: FinishReason, error: MlxArchError | None = None) -> None:
        """End every request."""
        for row in [*self.rows, *self.aside, *self.waiting]:
            row.finish(reason, error)
        self._unread = []
        self._remove_finished()

    def _drop_cancelled(self) -> None:
        for row in [*self.rows, *self.aside, *self.waiting]:
            if row.handle.cancelled:
                row.finish("cancelled")
        self._remove_finished()

    def _remove_finished(self) -> None:
        finished = [row for row in [*self.rows, *self.aside, *self.waiting] if row.finished]
        if not finished:
            return
        self.running = [row for row in self.running if not row.finished]
        self.reading = [row for row in self.reading if not row.finished]
        self.aside = [row for row in self.aside if not row.finished]
        self.waiting = deque(row for row in self.waiting if not row.finished)
        for row in finished:
            if self.prefixes.cache.most_bytes:
                self.shared.release(row.caches)
            self.shared.discard(row.caches)
            self.prefixes.store(row, self._free_bytes())
            row.caches = []
            self.counters[f"finished_{row.reason}"] += 1
            share = 0.1 if self.seconds_per_request else 1.0
            self.seconds_per_request += share * (row.seconds - self.seconds_per_request)

    def _admit(self) -> None:
        self._blocked = bool(self.aside)
        while self.waiting and not self.aside and len(self.rows) < self._max_rows:
            request = self.waiting[0].request
            tokens = self.room.first_reservation(len(request.prompt), request.max_tokens)
            if not self._make_room(self.room.bytes_for(tokens), request.prompt):
                self._blocked = True
                return
            row = self.waiting.popleft()
            row.admit(self._make_caches(), tokens)
            self.reading.append(row)

    def _resume(self) -> None:
        """Continue rows that were set aside, the oldest first."""
        for row in sorted(self.aside, key=lambda row: row.arrived):
            tokens = max(row.reserved, row.held + 1)
            if not self._make_room(self.room.bytes_for(tokens)):
                return
            row.resume(self._make_caches())
            row.reserved = tokens
            self.aside.remove(row)
            (self.running if row.prompt_is_read else self.reading).append(row)

    def _make_room(self, needed: int, prompt: Sequence[int] = ()) -> bool:
        """Whether so many bytes are free, after dropping what is needed from the prefix cache.

        Args:
            prompt: prompt whose cached beginning is dropped last.
        """
        if self.room.total is None:
            return True
        cache = self.prefixes.cache
        if needed > self.room.total - self._reserved_bytes():
            return False
        while needed > self.room.total - self._reserved_bytes() - cache.nbytes:
            if not cache.drop_least_recently_used(cache.path(prompt)):
                cache.drop_least_recently_used()
        return True

    def _reserved_bytes(self) -> int:
        return sum(self.room.bytes_for(row.reserved) for row in self.rows)

    def _free_bytes(self) -> int | None:
        """Bytes that are neither reserved nor in the prefix cache; None without a limit."""
        if self.room.total is None:
            return None
        return self.room.total - self._reserved_bytes() - self.prefixes.cache.nbytes

    def _reserve_for_growth(self) -> None:
        """Reserve more memory for rows that have used up theirs; the youngest make room for older ones.

        The oldest row gets what it needs in the end: a request that does not fit alone was refused.
        """
        for row in sorted(self.running, key=lambda row: row.arrived):
            if row.held < row.reserved or row not in self.running:
                continue
            prompt, most = len(row.request.prompt), row.request.max_tokens
            tokens = self.room.next_reservation(row.reserved, prompt, most)
            more = self.room.bytes_for(tokens) - self.room.bytes_for(row.reserved)
            while not self._make_room(more) and row in self.running:
                self._set_aside(max(self.rows, key=lambda other: other.arrived))
            row.reserved = tokens

    def _set_aside(self, row: Row) -> None:
        self.shared.release(row.caches)
        row.set_aside(self._spill)
        for rows in (self.running, self.reading):
            if row in rows:
                rows.remove(row)
        self.aside.append(row)
        self.counters["set_aside"] += 1

    def _decode(self) -> None:
        """Queue the next step, deliver the tokens of the one before, and choose the next ones.

        Where a matcher needs the token before to know which ones may follow, the logits are
        computed while that token is delivered, and the choice comes after.
        """
        rows = [row for row in self.running if self._goes_on(row)]
        unread = self._unread
        self._unread = []
        logits = None
        if rows:
            logits = self._forward(rows)
            if any(row.request.matcher is not None for row in rows):
                mx.async_eval(logits)
            else:
                self._choose(rows, logits)
        for choice in unread:
            self._deliver(choice)
        if logits is not None and not self._unread:
            left = [index for index, row in enumerate(rows) if not row.finished]
            if left:
                some = logits if len(left) == len(rows) else logits[mx.array(left)]
                self._choose([rows[index] for index in left], some)

    def _forward(self, rows: list[Row]) -> mx.array:
        """Logits (B, V) after the newest token of each row."""
        batch = self.batch_sizes.at_least(len(rows))
        if self._can_share(rows, batch):
            return forward(self.model, rows, batch, self.shared)
        self.shared.clear()
        return forward(self.model, rows, batch)

    def _can_share(self, rows: list[Row], places: int) -> bool:
        """Whether to keep the caches of the rows in shared arrays.

        In these each row takes as much memory as the longest.
        """
        if not self._shares_arrays or len(rows) < 2 or not can_batch(rows[0].caches):
            return False
        held = [row.held for row in rows]
        tokens = max(held) * 9 // 8  # ``CacheBatch`` allocates an eighth more
        most = max(self.most_padding * sum(held), self.floor_tokens * places)
        if self.shared.rows:  # so that rows near the limit are not copied in and out
            most = most * 3 // 2
        if places * tokens > most:
            return False
        if self.room.total is None:
            return True
        decoding = sum(self.room.bytes_for(row.reserved) for row in rows)
        free = self.room.total - self.prefixes.cache.nbytes - self._reserved_bytes() + decoding
        return places * self.room.bytes_for(tokens) <= free

    def _choose(self, rows: list[Row], logits: mx.array) -> None:
        """Choose the next token of each row from logits (B, V); a matcher that fails ends its row."""
        masks: list[mx.array | None] = []
        for row in rows:
            try:
                masks.append(row.next_mask())
            except Exception as error:
                masks.append(None)
                _end_by_matcher(row, error)
        self._unread.append(choose(rows, logits, masks))

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
                row.finish("error", error)
                continue
            try:
                row.add(token, logprobs)
            except Exception as error:
                _end_by_matcher(row, error)
                continue
            self.counters["generated_tokens"] += 1

    def _read_prompts(self) -> None:
        """Read one chunk, or several short prompts that are no longer together."""
        budget = self.reader.budget
        for row in self._reading_order():
            count = self.reader.next_tokens(row)
            if count > budget:
                break
            try:
                done = self._read_chunk(row)
            except Cancelled:
                row.caches = []
                row.finish("cancelled")
                continue
            except MlxArchError as error:
                row.finish("error", error)
                continue
            budget -= count
            if not done:
                break

    def _reading_order(self) -> list[Row]:
        """Rows that read, in every second turn the one with the least left to read first.

        Otherwise a short prompt would wait until all of a long one before it has been read.
        """
        self._turns += 1
        if self._turns % 2 or len(self.reading) < 2:
            return list(self.reading)
        shortest = min(self.reading, key=lambda row: len(row.request.prompt) - row.fed)
        return [shortest, *(row for row in self.reading if row is not shortest)]

    def _read_chunk(self, row: Row) -> bool:
        """Read the next chunk of a prompt; gives whether the row is done with it."""
        if row.fed == 0:
            self.prefixes.restore(row, self._free_bytes())
            self.counters["cached_tokens"] += row.fed
        before = row.fed
        logits = self.reader.read(row)
        self.counters["prompt_tokens"] += row.fed - before
        if logits is None:
            row.report_progress()
            if row.fed in row.borders:
                self.prefixes.store(row, self._free_bytes())
            return False
        self.reading.remove(row)
        if row.may_choose:
            self.running.append(row)
            self._choose([row], logits)
            self.prefixes.store(row, self._free_bytes())
        else:
            row.finish("length")
        return True


def _end_by_matcher(row: Row, error: Exception) -> None:
    """End a row whose matcher raised an error; the other rows go on."""
    if not isinstance(error, MlxArchError):
        logger.exception("the matcher of request %s failed", row.handle.id)
        error = GenerationError(f"the constraint of the answer failed: {error!r}")
    row.finish("error", error)
