"""The planner: what a model will take on a machine, what of it stays on the disk, and whether it fits at all.

It is the only place that decides limits. Every term is in bytes:

    weights + keys and values + activations of the largest step          what MLX counts
    + MLX's free memory + Python and its libraries + headroom             what the process takes

If the sum is more than the process may use, the per-layer embeddings go to the disk first, which costs little, then as
many experts as must; a dense layer is needed for every token and never goes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mlxarch.blocks import Quantization
from mlxarch.errors import InvalidInput, MemoryBudgetError
from mlxarch.execution import Execution
from mlxarch.footprint import KV_GROUP, Blueprint, Footprint
from mlxarch.generation import MARKS, REWIND
from mlxarch.machines import Machine
from mlxarch.progress import gigabytes
from mlxarch.rates import decode_rate
from mlxarch.slots import Places
from mlxarch.streaming.banks import in_flight
from mlxarch.streaming.experts import THREADS
from mlxarch.streaming.prefill import HELD
from mlxarch.streaming.rows import CACHE

MB = 10**6
PROCESS = {"cpu": 60 * MB, "metal": 150 * MB, "cuda": 500 * MB}  # Python and libraries
TOKEN = 1100  # bytes that a tokenizer takes for each entry of its vocabulary
FREE = {"cpu": 32 * MB, "metal": 512 * MB, "cuda": 512 * MB}  # of let-go memory that MLX keeps for the next array
HEADROOM = 0.03  # of what MLX counts: how far the plan may be off
CHUNKS = {"cpu": (512, 128), "metal": (2048, 512), "cuda": (2048, 512)}  # tokens of a prompt that pass at once
KV_BITS = (8, 4)
SHORTEST = 4096  # tokens of context below which experts go to the disk first, where nobody said how many
GRAIN = 1024  # tokens: a context that nobody named is a multiple
Verdict = Literal["resident", "streamed", "does not fit"]


@dataclass(frozen=True)
class Plan:
    """How a model runs on a machine, or why it does not.

    Attributes:
        model, machine: what was planned for.
        memory: bytes that the process may use.
        bits: of most matrices.
        kv_bits: of keys and values; None: as they are computed.
        context: tokens of prompt and answer together.
        execution: for loading and generation to carry out.
        weights, kv: bytes by kind; what is read from the disk counts with its place in memory.
        activations: bytes of the largest step, as MLX counts them.
        touched: what of these the process has at a time: MLX counts arrays before they are written to.
        free: bytes that MLX may keep for the next array.
        process: bytes of Python, its libraries and the tokenizer; what streaming reads into is in it.
        verdict: whether it fits, and how.
        streamed: in words, what is read from the disk.
        rate: tokens a second with a full context, estimated; None where nobody knows how fast the memory is.
        remedies: what would make it fit.
    """

    model: str
    machine: Machine
    memory: int
    bits: int
    kv_bits: int | None
    context: int
    execution: Execution
    weights: Mapping[str, int]
    kv: Mapping[str, int]
    activations: int
    touched: int
    free: int
    process: int
    verdict: Verdict
    streamed: str = ""
    rate: float | None = None
    remedies: Sequence[str] = field(default=())

    @property
    def mlx(self) -> int:
        """What MLX will count at its peak."""
        return sum(self.weights.values()) + sum(self.kv.values()) + self.activations

    @property
    def headroom(self) -> int:
        """For what the plan does not know."""
        return round(HEADROOM * self.mlx)

    @property
    def peak(self) -> int:
        """What the process will take at its peak, headroom not counted. MLX keeps what a step let go of."""
        return self.mlx - self.activations + self.touched + min(self.free, self.touched) + self.process

    @property
    def total(self) -> int:
        """What must fit."""
        return self.mlx + self.free + self.process + self.headroom

    @property
    def terms(self) -> dict[str, int]:
        """All of it, term by term."""
        found = {f"weights: {kind}": size for kind, size in self.weights.items()}
        found |= {f"keys and values: {kind}": size for kind, size in self.kv.items()}
        found |= {"activations": self.activations, "MLX's free memory": self.free}
        return found | {"Python, libraries, tokenizer": self.process, "headroom": self.headroom}

    @property
    def words(self) -> str:
        """The verdict in a line."""
        room = f"{gigabytes(self.total)} of the {gigabytes(self.memory)} that it may use of {self.machine.name}"
        what = f"with {self.context} tokens of context it takes {room}"
        speed = f", about {self.rate:.3g} tokens a second" if self.rate and self.verdict != "does not fit" else ""
        return f"{self.verdict}{': ' if self.streamed else ''}{self.streamed}; {what}{speed}"

    def require(self) -> "Plan":
        """Itself, if it fits.

        Raises:
            MemoryBudgetError: it does not; with the arithmetic and what to do.
        """
        if self.verdict != "does not fit":
            return self
        lines = [f"  {size / 1e9:8.2f} GB  {term}" for term, size in self.terms.items() if size >= 5 * MB]
        what = f"{self.model} at {self.bits} bits with {self.context} tokens of context"
        raise MemoryBudgetError(
            f"{what} takes {gigabytes(self.total)}, and it may use {gigabytes(self.memory)} of {self.machine.name}:\n"
            + "\n".join([*lines, f"  {self.total / 1e9:8.2f} GB  together"])
            + f"\n{'; or '.join(self.remedies) or 'Take a smaller model.'}"
        )


@dataclass(frozen=True)
class Request:
    """What a person asked for; None leaves it to the planner.

    Attributes:
        memory: bytes that the process may use; None: what the machine gives.
        context: tokens; None: as many as fit, up to what the model was made for.
        bits: of the weights; None: as they are.
        kv_bits: of keys and values, 8 or 4; None or 16: as they are computed.
        ple: where the per-layer embeddings are; "auto": in memory if they fit.
        float_bytes: of a number that is computed with; None: what suits the machine.
        bank: bytes that streamed experts take at most; None: as much as there is.
    """

    memory: int | None = None
    context: int | None = None
    bits: int | None = None
    kv_bits: int | None = None
    ple: Literal["ssd", "memory", "auto"] = "auto"
    float_bytes: int | None = None
    bank: int | None = None

    def __post_init__(self) -> None:
        if self.kv_bits not in (None, 16, *KV_BITS):
            raise InvalidInput(f"kv_bits must be 16, 8 or 4, found {self.kv_bits!r}")
        if self.ple not in ("ssd", "memory", "auto"):
            raise InvalidInput(f"ple must be ssd, memory or auto, found {self.ple!r}")
        if self.memory is not None and (type(self.memory) is not int or self.memory < 1):
            raise InvalidInput(f"memory must be a whole number of bytes from 1 on, found {self.memory!r}")


def plan(blueprint: Blueprint, machine: Machine, request: Request = Request(), *, advise: bool = True) -> Plan:
    """Decide how a model runs. A plan that does not fit says so in its verdict: see ``Plan.require``.

    ``advise``: look for what would make it fit.

    Raises:
        InvalidInput: a context longer than the model was made for, or a table on the disk that it does not have.
    """
    planner = _Planner(blueprint, machine, request)
    longest = planner.footprint.longest
    if request.context is not None:
        if type(request.context) is not int or not 1 <= request.context <= longest:
            raise InvalidInput(
                f"context must lie in 1 … {longest}, what {blueprint.name} was made for; found {request.context!r}"
            )
        found = planner.at(request.context)
        return planner.refusal(found) if advise and found.verdict == "does not fit" else found
    return planner.longest()


def best_plan(blueprint: Blueprint, machine: Machine, request: Request = Request()) -> Plan:
    """As ``plan``, at the largest of 8 and 4 bits that fits: beside all else in memory, or with parts on the disk.

    Where neither does, the plan of 4 bits says so.
    """
    if request.bits is not None:
        return plan(blueprint, machine, request)
    plans = [plan(blueprint, machine, replace(request, bits=bits)) for bits in (8, 4)]
    enough = min(blueprint.longest, request.context or SHORTEST)
    return next((p for p in plans if p.verdict == "resident" and p.context >= enough), plans[-1])


@dataclass(frozen=True)
class _Way:
    """One way to run: what is asked of the machine, and what goes to the disk."""

    context: int
    grows: bool
    chunk: int
    ple_on_disk: bool
    slots: tuple[int, ...] | None = None
    segment: int = 0  # tokens that pass through a streamed layer together


class _Planner:
    """One model on one machine at one width."""

    def __init__(self, blueprint: Blueprint, machine: Machine, request: Request) -> None:
        self.blueprint, self.machine, self.request = blueprint, machine, request
        self.memory = machine.memory if request.memory is None else request.memory
        self.footprint: Footprint = blueprint.at(request.bits)
        self.kv_bits = request.kv_bits if request.kv_bits in KV_BITS else None
        self.kv = Quantization(self.kv_bits, KV_GROUP) if self.kv_bits else None
        self.float_bytes = request.float_bytes or machine.float_bytes
        self.held = self.footprint.held(self.float_bytes)
        self.expert = self.footprint.expert_bytes(self.float_bytes)
        self.places = Places(self.footprint, self.float_bytes)
        self.has_ple = "per-layer embeddings" in self.held
        if request.ple == "ssd" and not self.has_ple:
            raise InvalidInput(
                f"ple is ssd, and {blueprint.name} has no table of per-layer embeddings to be read from the disk, as "
                "Gemma 3n has; leave it at auto"
            )

    def at(self, context: int, grows: bool = False, short: bool = True) -> Plan:
        """At this context: resident if it can be, else streamed, else not at all.

        ``grows``: the caches take memory as they need it, and not at once; ``short``: prompts may pass in short chunks.
        """
        ple = {"ssd": (True,), "memory": (False,), "auto": (False, True)}[
            self.request.ple if self.has_ple else "memory"
        ]
        usual, less = CHUNKS[self.machine.backend]
        ways = [_Way(context, grows, usual, place) for place in ple]
        ways += [_Way(context, grows, less, ple[-1])] if short else []
        resident = (self._plan(way) for way in ways)
        if best := next(filter(self._fits, resident), None):
            return best
        streamed = map(self._streamed, ways[-2:]) if any(self.expert) else ()
        return next(filter(None, streamed), None) or self._plan(ways[-1])

    def longest(self) -> Plan:
        """With as much context as fits beside all weights; if that is little, with a little and what is streamed."""
        longest = self.footprint.longest
        low, high = -(-min(longest, SHORTEST) // GRAIN), -(-longest // GRAIN)

        def resident(grains: int) -> Plan | None:
            found = self.at(min(grains * GRAIN, longest), grows=True, short=False)
            return found if found.verdict != "does not fit" and not found.execution.slots else None

        best = resident(high) or resident(low)
        if best is None:
            tried = [self.at(min(SHORTEST // part, longest), grows=True) for part in (1, 2, 4)]
            return next((found for found in tried if found.verdict != "does not fit"), self.refusal(tried[0]))
        low = -(-best.context // GRAIN)
        while low + 1 < high:
            middle = (low + high) // 2
            found = resident(middle)
            low, high, best = (middle, high, found) if found else (low, middle, best)
        return best

    def _fits(self, found: Plan) -> bool:
        return found.total <= self.memory

    def _plan(self, way: "_Way") -> Plan:
        wide, backend = self.float_bytes, self.machine.backend
        weights, words = dict(self.held), []
        ple, slots = self.has_ple and way.ple_on_disk, way.slots
        if ple:
            words.append(f"per-layer embeddings ({gigabytes(weights['per-layer embeddings'])}) from the disk")
            weights["per-layer embeddings"] = 0
        if slots:
            weights["experts"] = sum(n * size for n, size in zip(slots, self.expert, strict=True))
            words.append(self.places.in_words(slots))
        kv = self.footprint.kv(way.context, wide, self.kv_bits)
        kv |= {"to grow": self.footprint.growth(way.context, wide, self.kv_bits)} if way.grows else {}
        if window := self.footprint.windows(way.context, wide, self.kv_bits):
            kv["to go back"] = min(MARKS, REWIND // window) * window
        step = self.blueprint.activations(
            way.context, way.chunk, wide, backend != "cpu", self.kv, self.footprint.bits < 16, bool(slots)
        )
        if slots:
            step = self.places.peak(step, way.segment, way.chunk)
        # while it loads there are neither caches nor activations yet
        loading = max(self.footprint.loading(wide) - sum(kv.values()) - step.touched, 0) if not words else 0
        prepared = max(step.prepared, step.touched + loading)
        usual = way.chunk == CHUNKS[backend][0]
        found = Plan(
            model=self.blueprint.name,
            machine=self.machine,
            memory=self.memory,
            bits=self.footprint.bits,
            kv_bits=self.kv_bits,
            context=way.context,
            execution=Execution(
                kv=self.kv,
                slots=slots,
                ple="ssd" if ple else "memory",
                chunk=None if usual else way.chunk,
                segment=way.segment if slots else None,
            ),
            weights=weights,
            kv=kv,
            activations=prepared,
            touched=step.touched + loading if backend == "cpu" else prepared,
            free=FREE[backend] if usual else FREE["cpu"],
            process=PROCESS[backend]
            + TOKEN * self.footprint.vocabulary
            + (self._rows(way) if ple else 0)
            + (self._on_the_way() if slots else 0),
            verdict="streamed" if words else "resident",
            streamed=", ".join(words),
            rate=decode_rate(self.footprint, self.machine, way.context, wide, self.kv_bits, slots),
        )
        return found if self._fits(found) else replace(found, verdict="does not fit")

    # What goes to the disk ----------------------------------------------------------------------------------------

    def _rows(self, way: "_Way") -> int:
        """Rows of per-layer embeddings beside the model: those that are kept, and those of a step."""
        row = self.held["per-layer embeddings"] // self.footprint.vocabulary
        return min(CACHE, way.context * row) + 2 * way.chunk * row

    def _on_the_way(self) -> int:
        """Records beside a bank that are to go into it. On a CPU they are read in place, and each thread widens one."""
        widened = self.machine.backend == "cpu" and self.float_bytes == 4
        record = max(self.expert)
        return (THREADS if widened else in_flight(record)) * record

    def _streamed(self, way: "_Way") -> Plan | None:
        """With as many experts as there is room for beside so many tokens of a prompt as usually pass a layer together.

        Where those are too many, half of them must do, and so on, down to a chunk. What is left lets more tokens do so.
        """
        one, least = self.places.token_bytes, min(way.context, way.chunk)
        segment = max(min(way.context, HELD // one), least)
        while (slots := self._slots(replace(way, segment=segment))) is None:
            if segment == least:
                return None
            segment = max(segment // 2, least)
        found = self._plan(way := replace(way, slots=slots, segment=segment))
        more = max(int((self.memory - found.total) / (1 + HEADROOM)), 0) // one
        return self._plan(replace(way, segment=min(way.context, segment + more)))

    def _slots(self, way: "_Way") -> tuple[int, ...] | None:
        """Places for experts in each layer; None if those of one token do not fit."""
        without = self._plan(replace(way, slots=(0,) * len(self.expert)))
        budget = int((self.memory - without.total) / (1 + HEADROOM))
        if self.request.bank is not None:
            budget = min(budget, max(self.request.bank, self.places.least))
        return self.places.within(budget, self.machine)

    # What to do ---------------------------------------------------------------------------------------------------

    def refusal(self, found: Plan) -> Plan:
        """With the ways to make it fit, the gentlest first."""
        r = replace(self.request, context=found.context)
        halves = [found.context >> n for n in range(1, 8) if found.context >> n >= GRAIN]
        narrower = [bits for bits in (8, 6, 5, 4, 3, 2) if bits < found.bits]
        ways = [
            *([(f"--kv-bits {bits}", replace(r, kv_bits=bits))] for bits in KV_BITS if bits < (found.kv_bits or 16)),
            [(f"--context {context}", replace(r, context=context)) for context in halves],
            [(f"--bits {bits}", replace(r, bits=bits)) for bits in narrower],
        ]
        remedies = [name for way in ways if (name := next((n for n, request in way if self._would_fit(request)), None))]
        if not remedies:
            largest = max(found.terms.items(), key=lambda term: term[1])[0]
            return replace(found, remedies=(f"The largest term is {largest}: take a smaller model or more memory",))
        return replace(found, remedies=tuple(f"{name} makes it fit" for name in remedies))

    def _would_fit(self, request: Request) -> bool:
        planner = _Planner(self.blueprint, self.machine, request)
        return planner.at(request.context or SHORTEST).verdict != "does not fit"
