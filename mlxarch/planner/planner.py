"""Memory planner: how much memory a model needs on a machine, and what must be offloaded.

This is the only place that decides memory limits. Every term is in bytes:

    weights + KV cache + activations of the largest step                  counted by MLX
    + MLX's buffer cache + Python and its libraries + headroom            taken by the process

If the sum exceeds the memory budget, the per-layer embeddings are offloaded first, which costs
little speed, then as many experts as necessary. Dense layers are needed for every token and are
never offloaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlxarch.errors import InvalidInput
from mlxarch.generation.session import snapshot_count
from mlxarch.loading.execution import Execution
from mlxarch.planner.activation_memory import Peak
from mlxarch.planner.blueprint import Blueprint
from mlxarch.planner.decode_speed import decode_tokens_per_second
from mlxarch.planner.expert_placement import ExpertPlacement
from mlxarch.planner.footprint import Footprint
from mlxarch.planner.plan import HEADROOM_FRACTION, MB, Plan, Request
from mlxarch.progress import format_size
from mlxarch.quantization.formats import KV_BITS, KV_GROUP_SIZE
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming.expert_slots import concurrent_reads
from mlxarch.ssd_streaming.experts import READER_THREADS
from mlxarch.ssd_streaming.layerwise_prefill import SEGMENT_BYTES
from mlxarch.ssd_streaming.row_cache import CACHE_BYTES
from mlxarch.system.machines import Machine

DEFAULT_REQUEST = Request()
# Bytes of Python and the libraries
PROCESS_BYTES = {"cpu": 60 * MB, "metal": 150 * MB, "cuda": 500 * MB}
# Bytes that a tokenizer takes for each entry of its vocabulary
TOKENIZER_ENTRY_BYTES = 1100
# Bytes of freed buffers that MLX may keep for later arrays
MLX_CACHE_BYTES = {"cpu": 32 * MB, "metal": 512 * MB, "cuda": 512 * MB}
# Prompt tokens of a prefill chunk: usually, and where memory is short
PREFILL_CHUNKS = {"cpu": (512, 128), "metal": (2048, 512), "cuda": (2048, 512)}
# Without a requested context, experts are offloaded before the context becomes shorter than this
ENOUGH_CONTEXT = 4096
# A context that was not requested is a multiple of this
CONTEXT_STEP = 1024
PER_LAYER_EMBEDDINGS = "per-layer embeddings"


def plan(
    blueprint: Blueprint,
    machine: Machine,
    request: Request = DEFAULT_REQUEST,
    *,
    advise: bool = True,
) -> Plan:
    """Plan how a model runs on a machine.

    If it does not fit, the verdict says so: see ``Plan.require``.

    Args:
        advise: look for remedies if it does not fit.

    Raises:
        InvalidInput: the context is longer than the model supports, or its per-layer embeddings
            should be read from the disk and it has none.
    """
    planner = _Planner(blueprint, machine, request)
    max_context = planner.footprint.max_context
    if request.context is None:
        return planner.plan_longest_context(advise)
    if type(request.context) is not int or not 1 <= request.context <= max_context:
        raise InvalidInput(
            f"context must lie in 1 … {max_context}, what {blueprint.name} was made for; "
            f"found {request.context!r}"
        )
    found = planner.plan_at(request.context)
    if advise and found.verdict == "does not fit":
        return planner.with_remedies(found)
    return found


def best_plan(blueprint: Blueprint, machine: Machine, request: Request = DEFAULT_REQUEST) -> Plan:
    """Plan at the larger of 8 and 4 bits that fits; without requested bits only.

    8 bits must fit in memory with enough context. Otherwise it is the plan at 4 bits, which may
    offload weights or not fit.
    """
    if request.bits is not None:
        return plan(blueprint, machine, request)
    larger = plan(blueprint, machine, replace(request, bits=8), advise=False)
    enough = min(blueprint.max_context, request.context or ENOUGH_CONTEXT)
    if larger.verdict == "resident" and larger.context >= enough:
        return larger
    return plan(blueprint, machine, replace(request, bits=4))


@dataclass(frozen=True)
class _Candidate:
    """One way to run the model.

    Attributes:
        context: tokens of prompt and answer together.
        grows: the KV caches grow on demand; otherwise they are allocated for the whole context.
        chunk: prompt tokens of a prefill chunk.
        offload_ple: read the per-layer embeddings from the disk.
        slots: experts of each layer in memory; None keeps all.
        segment: prompt tokens that pass a layer with streamed experts together.
    """

    context: int
    grows: bool
    chunk: int
    offload_ple: bool
    slots: tuple[int, ...] | None = None
    segment: int = 0


class _Planner:
    """Planner of one model on one machine for one request."""

    def __init__(self, blueprint: Blueprint, machine: Machine, request: Request) -> None:
        self.blueprint = blueprint
        self.machine = machine
        self.request = request
        self.memory = machine.memory if request.memory is None else request.memory
        self.footprint: Footprint = blueprint.footprint(request.bits)
        self.kv_bits = request.kv_bits if request.kv_bits in KV_BITS else None
        self.kv = Quantization(self.kv_bits, KV_GROUP_SIZE) if self.kv_bits else None
        self.float_bytes = request.float_bytes or machine.float_bytes
        self.weight_bytes = self.footprint.weight_bytes(self.float_bytes)
        self.expert_bytes = self.footprint.expert_bytes(self.float_bytes)
        self.placement = ExpertPlacement(self.footprint, self.float_bytes)
        self.has_ple = PER_LAYER_EMBEDDINGS in self.weight_bytes
        if request.ple == "ssd" and not self.has_ple:
            raise InvalidInput(
                f"ple is ssd, and {blueprint.name} has no table of per-layer embeddings to be read "
                "from the disk, as Gemma 3n has; leave it at auto"
            )

    def plan_at(self, context: int, grows: bool = False, short_chunks: bool = True) -> Plan:
        """Plan for a context: all weights in memory if possible, else with experts offloaded.

        Args:
            grows: see ``_Candidate``.
            short_chunks: also try short prefill chunks.
        """
        offload_ple = {"ssd": (True,), "memory": (False,), "auto": (False, True)}[
            self.request.ple if self.has_ple else "memory"
        ]
        chunk, short_chunk = PREFILL_CHUNKS[self.machine.backend]
        candidates = [_Candidate(context, grows, chunk, offload) for offload in offload_ple]
        if short_chunks:
            candidates.append(_Candidate(context, grows, short_chunk, offload_ple[-1]))
        for candidate in candidates:
            found = self._plan(candidate)
            if self._fits(found):
                return found
            if candidate.offload_ple == offload_ple[-1] and self._is_hopeless(found):
                return found
        if any(self.expert_bytes):
            for candidate in candidates[-2:]:
                streamed = self._plan_streamed(candidate)
                if streamed is not None:
                    return streamed
        return self._plan(candidates[-1])

    def _is_hopeless(self, found: Plan) -> bool:
        """Whether the weights and caches alone are too much, so that no chunk is short enough."""
        least = found.total - (1 + HEADROOM_FRACTION) * found.activations - found.mlx_cache
        return not any(self.expert_bytes) and least > self.memory

    def plan_longest_context(self, advise: bool) -> Plan:
        """Plan for the longest context that fits beside all weights.

        If not even ``ENOUGH_CONTEXT`` tokens fit, plan for that or less with offloaded experts.
        """
        max_context = self.footprint.max_context
        low = -(-min(max_context, ENOUGH_CONTEXT) // CONTEXT_STEP)
        high = -(-max_context // CONTEXT_STEP)

        def plan_resident(steps: int) -> Plan | None:
            context = min(steps * CONTEXT_STEP, max_context)
            found = self.plan_at(context, grows=True, short_chunks=False)
            return found if found.verdict != "does not fit" and not found.execution.slots else None

        best = plan_resident(high) or plan_resident(low)
        if best is None:
            return self._plan_short_context(advise)
        low = -(-best.context // CONTEXT_STEP)
        while low + 1 < high:
            middle = (low + high) // 2
            found = plan_resident(middle)
            if found:
                low = middle
                best = found
            else:
                high = middle
        return best

    def _plan_short_context(self, advise: bool) -> Plan:
        """Plan for the first of a few short contexts that fits, with offloaded experts if need be.

        Caches that grow come first: they take less while a conversation is short.
        """
        max_context = self.footprint.max_context
        longest: Plan | None = None
        for divisor in (1, 2, 4):
            for grows in (True, False):
                found = self.plan_at(min(ENOUGH_CONTEXT // divisor, max_context), grows)
                if found.verdict != "does not fit":
                    return found
            longest = longest or found
        assert longest is not None, "there is at least one divisor"
        return self.with_remedies(longest) if advise else longest

    def _fits(self, found: Plan) -> bool:
        return found.total <= self.memory

    def _plan(self, candidate: _Candidate) -> Plan:
        """Add up the memory of one candidate."""
        float_bytes = self.float_bytes
        slots = candidate.slots
        weights = dict(self.weight_bytes)
        offloaded: list[str] = []
        ple_on_disk = self.has_ple and candidate.offload_ple
        if ple_on_disk:
            size = format_size(weights[PER_LAYER_EMBEDDINGS])
            offloaded.append(f"per-layer embeddings ({size}) from the disk")
            weights[PER_LAYER_EMBEDDINGS] = 0
        if slots:
            weights["experts"] = sum(
                count * size for count, size in zip(slots, self.expert_bytes, strict=True)
            )
            offloaded.append(self.placement.describe(slots))
        kv = self._kv_terms(candidate)
        step = self._step_peak(candidate)
        loading = 0
        if not offloaded:  # while weights are loaded there are neither caches nor activations
            overhead = self.footprint.loading_overhead(float_bytes)
            loading = max(overhead - sum(kv.values()) - step.touched, 0)
        activations = max(step.allocated, step.touched + loading)
        backend = self.machine.backend
        usual_chunk = candidate.chunk == PREFILL_CHUNKS[backend][0]
        found = Plan(
            model=self.blueprint.name,
            machine=self.machine,
            memory=self.memory,
            bits=self.footprint.bits,
            kv_bits=self.kv_bits,
            context=candidate.context,
            execution=Execution(
                kv=self.kv,
                slots=slots,
                ple="ssd" if ple_on_disk else "memory",
                chunk=None if usual_chunk else candidate.chunk,
                segment=candidate.segment if slots else None,
            ),
            weights=weights,
            kv=kv,
            activations=activations,
            touched_activations=step.touched + loading if backend == "cpu" else activations,
            mlx_cache=MLX_CACHE_BYTES[backend] if usual_chunk else MLX_CACHE_BYTES["cpu"],
            process=self._process_bytes(candidate),
            verdict="streamed" if offloaded else "resident",
            offloaded=", ".join(offloaded),
            tokens_per_second=decode_tokens_per_second(
                self.footprint, self.machine, candidate.context, float_bytes, self.kv_bits, slots
            ),
            grows=candidate.grows,
        )
        return found if self._fits(found) else replace(found, verdict="does not fit")

    # Terms ---------------------------------------------------------------------------------------

    def _kv_terms(self, candidate: _Candidate) -> dict[str, int]:
        """Bytes of the KV cache, of its growth, and of the copies that a session can return to."""
        arguments = (candidate.context, self.float_bytes, self.kv_bits)
        kv = self.footprint.kv_bytes(*arguments)
        if candidate.grows:
            kv["to grow"] = self.footprint.growth_bytes(*arguments)
        if size := self.footprint.snapshot_bytes(*arguments):
            kv["to go back"] = snapshot_count(size, self.footprint.has_states) * size
        return kv

    def _step_peak(self, candidate: _Candidate) -> Peak:
        """Activations of the largest step of prefill."""
        step = self.blueprint.activation_peak(
            candidate.context,
            candidate.chunk,
            self.float_bytes,
            self.machine.backend != "cpu",
            self.kv,
            self.footprint.bits < 16,
            bool(candidate.slots),
        )
        if candidate.slots:
            return self.placement.segment_peak(step, candidate.segment, candidate.chunk)
        return step

    def _process_bytes(self, candidate: _Candidate) -> int:
        """Bytes that the process takes outside of MLX."""
        total = PROCESS_BYTES[self.machine.backend]
        total += TOKENIZER_ENTRY_BYTES * self.footprint.vocab_size
        if self.has_ple and candidate.offload_ple:
            total += self._row_cache_bytes(candidate)
        if candidate.slots:
            total += self._in_flight_bytes()
        return total

    def _row_cache_bytes(self, candidate: _Candidate) -> int:
        """Bytes of rows of per-layer embeddings outside of the model: cached, and of one step."""
        row = self.footprint.row_bytes(self.float_bytes)
        return min(CACHE_BYTES, candidate.context * row) + 2 * candidate.chunk * row

    def _in_flight_bytes(self) -> int:
        """Bytes of expert records that are being read.

        On a CPU records are read into their slots, and each thread converts one to float32.
        """
        converts = self.machine.backend == "cpu" and self.float_bytes == 4
        record = max(self.expert_bytes)
        return (READER_THREADS if converts else concurrent_reads(record)) * record

    # Offloading of experts -----------------------------------------------------------------------

    def _plan_streamed(self, candidate: _Candidate) -> Plan | None:
        """Plan with as many experts in memory as fit; None if those of one token do not.

        Room for a prompt segment of ``SEGMENT_BYTES`` is set aside first. If no experts fit beside
        it, it is halved, down to one chunk. Memory that is left afterwards makes the segment
        longer.
        """
        token_bytes = self.placement.token_bytes
        shortest = min(candidate.context, candidate.chunk)
        segment = max(min(candidate.context, SEGMENT_BYTES // token_bytes), shortest)
        while (slots := self._fit_slots(replace(candidate, segment=segment))) is None:
            if segment == shortest:
                return None
            segment = max(segment // 2, shortest)
        candidate = replace(candidate, slots=slots, segment=segment)
        left = self.memory - self._plan(candidate).total
        extra = max(int(left / (1 + HEADROOM_FRACTION)), 0) // token_bytes
        return self._plan(replace(candidate, segment=min(candidate.context, segment + extra)))

    def _fit_slots(self, candidate: _Candidate) -> tuple[int, ...] | None:
        """Experts of each layer that fit in memory; None if those of one token do not."""
        without_experts = self._plan(replace(candidate, slots=(0,) * len(self.expert_bytes)))
        budget = int((self.memory - without_experts.total) / (1 + HEADROOM_FRACTION))
        limit = self.request.expert_cache_bytes
        if limit is not None:
            budget = min(budget, max(limit, self.placement.min_bytes))
        return self.placement.fit_slots(budget, self.machine)

    # Remedies ------------------------------------------------------------------------------------

    def with_remedies(self, found: Plan) -> Plan:
        """Add the options that would make the plan fit, the least harmful first."""
        remedies = [
            option
            for options in self._remedy_options(found)
            if (option := self._first_that_fits(options)) is not None
        ]
        if not remedies:
            largest = max(found.terms.items(), key=lambda term: term[1])[0]
            return replace(
                found,
                remedies=(f"The largest term is {largest}: take a smaller model or more memory",),
            )
        return replace(found, remedies=tuple(f"{option} makes it fit" for option in remedies))

    def _remedy_options(self, found: Plan) -> Iterator[list[tuple[str, Request]]]:
        """Command line options with their requests: KV cache bits, shorter contexts, fewer bits."""
        request = replace(self.request, context=found.context)
        yield [
            (f"--kv-bits {bits}", replace(request, kv_bits=bits))
            for bits in KV_BITS
            if bits < (found.kv_bits or 16)
        ]
        halved = [found.context >> n for n in range(1, 8)]
        yield [
            (f"--context {context}", replace(request, context=context))
            for context in halved
            if context >= CONTEXT_STEP
        ]
        yield [
            (f"--bits {bits}", replace(request, bits=bits))
            for bits in (8, 6, 5, 4, 3, 2)
            if bits < found.bits
        ]

    def _first_that_fits(self, options: list[tuple[str, Request]]) -> str | None:
        for option, request in options:
            planner = _Planner(self.blueprint, self.machine, request)
            if planner.plan_at(request.context or ENOUGH_CONTEXT).verdict != "does not fit":
                return option
        return None
