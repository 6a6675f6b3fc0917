"""The planner: what a model will take on a machine, what of it stays on the disk, and whether it fits at all.

It is the only place that decides limits. Every term is in bytes:

    weights + keys and values + activations of the largest step          what MLX counts
    + MLX's free memory + Python and its libraries + headroom             what the process takes

If the sum is more than the process may use, the per-layer embeddings go to the disk first, which costs little, then as
many experts as must; a dense layer is needed for every token and never goes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mlxarch.blocks import Quantization
from mlxarch.errors import InvalidInput, MemoryBudgetError
from mlxarch.execution import Execution
from mlxarch.footprint import KV_GROUP, Blueprint, Footprint
from mlxarch.machines import Machine
from mlxarch.progress import gigabytes
from mlxarch.streaming.banks import STAGED
from mlxarch.streaming.prefill import HELD
from mlxarch.streaming.rows import CACHE

MB = 10**6
PROCESS = {"cpu": 200 * MB, "metal": 200 * MB, "cuda": 600 * MB}  # Python, libraries, tokenizer; CUDA's own buffers
FREE = {"cpu": 32 * MB, "metal": 512 * MB, "cuda": 512 * MB}  # of let-go memory that MLX keeps for the next array
HEADROOM = 0.03  # of what MLX counts: how far the plan may be off
CHUNK = {"cpu": 512, "metal": 2048, "cuda": 2048}  # tokens of a prompt that pass at once, see generation
ROWS = CACHE + 40 * MB  # of per-layer embeddings: those that are kept, and those of a step
KV_BITS = (8, 4)
SHORTEST = 4096  # tokens of context below which experts go to the disk first, where nobody said how many
GRAIN = 1024  # tokens: a context that nobody named is a multiple
Verdict = Literal["resident", "streamed", "does not fit"]

# Decode rate: t = (core + experts + kv) / (ETA * bandwidth) + layers * T_LAYER
#                  + streamed layers * T_SYNC + misses * expert / ssd
ETA, T_LAYER, T_SYNC = 0.75, 0.12e-3, 0.4e-3
SSD = 2.8e9  # bytes a second where nothing is known
# share of the experts in memory -> share of those asked for that are there: the middle of what was reported elsewhere
HITS = ((0, 0), (0.03, 0.14), (0.05, 0.29), (0.125, 0.56), (0.25, 0.71), (0.36, 0.78), (0.5, 0.855), (0.75, 0.935))
HITS += ((0.9, 0.975), (1, 1))
FORMULA = (
    "seconds a token = (core + experts + kv) / (0.75 bandwidth) + 0.12 ms a layer"
    " + 0.4 ms a streamed layer + misses x expert / ssd"
)


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
        activations: bytes of the largest step.
        free: bytes that MLX may keep for the next array.
        process: bytes of Python and its libraries.
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
        """What the process will take at its peak, headroom not counted."""
        return self.mlx + self.process

    @property
    def total(self) -> int:
        """What must fit."""
        return self.mlx + self.free + self.process + self.headroom

    @property
    def terms(self) -> dict[str, int]:
        """All of it, term by term."""
        found = {f"weights: {kind}": size for kind, size in self.weights.items()}
        found |= {f"keys and values: {kind} layers": size for kind, size in self.kv.items()}
        found |= {"activations": self.activations, "MLX's free memory": self.free}
        return found | {"Python and libraries": self.process, "headroom": self.headroom}

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
    """

    memory: int | None = None
    context: int | None = None
    bits: int | None = None
    kv_bits: int | None = None
    ple: Literal["ssd", "memory", "auto"] = "auto"
    float_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.kv_bits not in (None, 16, *KV_BITS):
            raise InvalidInput(f"kv_bits must be 16, 8 or 4, found {self.kv_bits!r}")
        if self.ple not in ("ssd", "memory", "auto"):
            raise InvalidInput(f"ple must be ssd, memory or auto, found {self.ple!r}")
        if self.memory is not None and (type(self.memory) is not int or self.memory < 1):
            raise InvalidInput(f"memory must be a whole number of bytes from 1 on, found {self.memory!r}")


def plan(blueprint: Blueprint, machine: Machine, request: Request = Request()) -> Plan:
    """Decide how a model runs. A plan that does not fit says so in its verdict: see ``Plan.require``.

    Raises:
        InvalidInput: a context longer than the model was made for.
    """
    planner = _Planner(blueprint, machine, request)
    longest = planner.footprint.longest
    if request.context is not None:
        if type(request.context) is not int or not 1 <= request.context <= longest:
            raise InvalidInput(
                f"context must lie in 1 … {longest}, what {blueprint.name} was made for; found {request.context!r}"
            )
        return planner.at(request.context)
    whole = planner.longest_resident()
    return whole if whole is not None else planner.at(min(longest, SHORTEST))


def best_plan(blueprint: Blueprint, machine: Machine, request: Request = Request()) -> Plan:
    """As ``plan``, at the largest of 8 and 4 bits that fits: beside all else in memory, or with parts on the disk.

    Where neither does, the plan of 4 bits says so.
    """
    if request.bits is not None:
        return plan(blueprint, machine, request)
    plans = [plan(blueprint, machine, replace(request, bits=bits)) for bits in (8, 4)]
    return next((p for p in plans if p.verdict == "resident"), plans[-1])


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
        self.has_ple = "per-layer embeddings" in self.held

    def at(self, context: int) -> Plan:
        """At this context: resident if it can be, else streamed, else not at all."""
        first = self._plan(context, ple_on_disk=self.request.ple == "ssd")
        if self._fits(first):
            return first
        last = first
        if self.has_ple and self.request.ple == "auto":
            last = self._plan(context, ple_on_disk=True)
            if self._fits(last):
                return last
        if any(self.expert):
            slots = self._slots(self.memory - last.total, last)
            if slots:
                return self._plan(context, last.execution.ple == "ssd", slots)
        return self._refusal(last)

    def longest_resident(self) -> Plan | None:
        """With as much context as fits beside all weights; None if that is little."""
        longest = self.footprint.longest
        low, high = -(-min(longest, SHORTEST) // GRAIN), -(-longest // GRAIN)

        def resident(grains: int) -> Plan | None:
            ple = self.request.ple
            found = self._plan(min(grains * GRAIN, longest), ple == "ssd")
            if not self._fits(found) and self.has_ple and ple == "auto":
                found = self._plan(min(grains * GRAIN, longest), True)
            return found if self._fits(found) else None

        best = resident(high)
        if best is not None:
            return best
        best = resident(low)
        while best is not None and low + 1 < high:
            middle = (low + high) // 2
            found = resident(middle)
            low, high, best = (middle, high, found) if found else (low, middle, best)
        return best

    def _fits(self, found: Plan) -> bool:
        return found.total <= self.memory

    def _plan(self, context: int, ple_on_disk: bool, slots: tuple[int, ...] | None = None) -> Plan:
        wide, backend = self.float_bytes, self.machine.backend
        weights, words = dict(self.held), []
        ple = self.has_ple and ple_on_disk
        if ple:
            words.append(f"per-layer embeddings ({gigabytes(weights['per-layer embeddings'])}) from the disk")
            weights["per-layer embeddings"] = 0
        if slots:
            weights["experts"] = sum(n * size for n, size in zip(slots, self.expert, strict=True))
            words.append(self._slots_in_words(slots))
        execution = Execution(kv=self.kv, slots=slots, ple="ssd" if ple else "memory")
        kv = self.footprint.kv(context, wide, self.kv_bits)
        step = self.blueprint.activations(context, CHUNK[backend], wide, backend != "cpu", self.kv)
        found = Plan(
            model=self.blueprint.name,
            machine=self.machine,
            memory=self.memory,
            bits=self.footprint.bits,
            kv_bits=self.kv_bits,
            context=context,
            execution=execution,
            weights=weights,
            kv=kv,
            activations=step + (HELD if slots else 0),
            free=FREE[backend],
            process=PROCESS[backend] + (ROWS if ple else 0) + (STAGED if slots else 0),
            verdict="streamed" if words else "resident",
            streamed=", ".join(words),
            rate=self._rate(context, slots),
        )
        return found if self._fits(found) else replace(found, verdict="does not fit")

    # What goes to the disk ----------------------------------------------------------------------------------------

    def _slots(self, room: int, resident: Plan) -> tuple[int, ...] | None:
        """Places for experts in each layer, for the fastest decode; None if those of one token do not fit.

        Whole layers come first, as they need not wait for their router; what is left is shared by the others.
        """
        room += round(resident.weights["experts"] * (1 + HEADROOM))
        budget = int(room / (1 + HEADROOM))
        layers = [n for n, e in enumerate(self.footprint.experts) if e]
        best: tuple[float, tuple[int, ...]] | None = None
        for whole in range(len(layers) + 1):
            slots = self._with_whole(layers, whole, budget)
            if slots is not None:
                cost = self._streaming_seconds(slots)
                best = min(best, (cost, slots)) if best else (cost, slots)
        return best[1] if best else None

    def _with_whole(self, layers: list[int], whole: int, budget: int) -> tuple[int, ...] | None:
        experts, slots = self.footprint.experts, [0] * len(self.expert)
        for n in layers[:whole]:
            slots[n] = experts[n].count  # type: ignore[union-attr]
            budget -= slots[n] * self.expert[n]
        others = layers[whole:]
        share = budget // sum(self.expert[n] for n in others) if others else 0
        for n in others:
            slots[n] = min(share, experts[n].count)  # type: ignore[union-attr]
            if slots[n] < experts[n].chosen:  # type: ignore[union-attr]
                return None
        return tuple(slots) if budget >= 0 else None

    def _slots_in_words(self, slots: tuple[int, ...]) -> str:
        layers = [(n, e) for n, e in zip(slots, self.footprint.experts, strict=True) if e]
        whole = sum(n == e.count for n, e in layers)
        least, most = min(n for n, _ in layers), layers[0][1].count
        size = sum((e.count - n) * b for n, e, b in zip(slots, self.footprint.experts, self.expert, strict=True) if e)
        words = f"{gigabytes(size)} of experts from the disk, {least} of {most} a layer in memory"
        return words + (f", all of them in {whole} layers" if whole else "")

    # How fast ----------------------------------------------------------------------------------------------------

    def _rate(self, context: int, slots: tuple[int, ...] | None) -> float | None:
        if self.machine.bandwidth is None:
            return None
        looked_up = {"per-layer embeddings", "experts"} | (set() if self.footprint.tied else {"embeddings"})
        core = sum(size for kind, size in self.held.items() if kind not in looked_up)
        experts = sum(e.chosen * size for e, size in zip(self.footprint.experts, self.expert, strict=True) if e)
        kv = sum(self.footprint.kv(context, self.float_bytes, self.kv_bits).values())
        seconds = (core + experts + kv) / (ETA * self.machine.bandwidth) + len(self.expert) * T_LAYER
        return 1 / (seconds + (self._streaming_seconds(slots) if slots else 0))

    def _streaming_seconds(self, slots: tuple[int, ...]) -> float:
        """What streaming adds to a token."""
        total, ssd = 0.0, self.machine.ssd or SSD
        for n, e, size in zip(slots, self.footprint.experts, self.expert, strict=True):
            if e and n < e.count:
                total += T_SYNC + (1 - hit_rate(n / e.count)) * e.chosen * size / ssd
        return total

    # What to do ---------------------------------------------------------------------------------------------------

    def _refusal(self, found: Plan) -> Plan:
        """With the ways to make it fit, the gentlest first."""
        remedies = [words for words, request in self._gentler(found) if _tries(self.blueprint, self.machine, request)]
        if not remedies:
            largest = max(found.terms.items(), key=lambda term: term[1])[0]
            remedies = [f"The largest term is {largest}: take a smaller model, or a machine with more memory"]
        return replace(found, remedies=tuple(remedies[:3]))

    def _gentler(self, found: Plan) -> Iterable[tuple[str, Request]]:
        r = self.request
        for bits in KV_BITS:
            if found.kv_bits is None or bits < found.kv_bits:
                yield f"--kv-bits {bits} makes it fit", replace(r, context=found.context, kv_bits=bits)
        context = found.context // 2
        while context >= GRAIN:
            request = replace(r, context=context)
            if _tries(self.blueprint, self.machine, request):
                yield f"--context {context} makes it fit", request
                break
            context //= 2
        for bits in (8, 6, 5, 4, 3, 2):
            if bits < found.bits:
                request = replace(r, context=found.context, bits=bits)
                if _tries(self.blueprint, self.machine, request):
                    yield f"--bits {bits} makes it fit", request
                    break


def _tries(blueprint: Blueprint, machine: Machine, request: Request) -> bool:
    """Whether it would fit, streamed or not, remedies not asked for."""
    planner = _Planner(blueprint, machine, request)
    planner._refusal = lambda found: found  # type: ignore[method-assign]
    return planner.at(request.context or SHORTEST).verdict != "does not fit"


def hit_rate(share: float) -> float:
    """Of the experts asked for, how many are there when ``share`` of all have a place in memory."""
    for (low, below), (high, above) in zip(HITS, HITS[1:], strict=False):
        if share <= high:
            return below + (above - below) * (share - low) / (high - low)
    return 1.0
