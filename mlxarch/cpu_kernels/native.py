"""Operations with kernels for CPUs, from the optional package ``mlxarch-cpu``.

MLX's CPU back end computes quantized products, attention and elementwise functions without vector
instructions. ``mlxarch-cpu`` has kernels for AVX2, AVX-512 and a portable form, exact in float32.
Each function here returns None where they do not apply (another device, another dtype, the package
is missing), and the caller computes with MLX.

Environment: ``MLXARCH_CPU_KERNELS`` = off, baseline, avx2 or avx512 chooses the instruction set,
``MLXARCH_THREADS`` the number of threads (default: one for each physical core).
"""

import importlib.metadata
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxarch.errors import InvalidInput

BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "dense": (32,)}  # modes that have a kernel

MOST_FUSED_ROWS = 16  # of a feed-forward in one operation, whose inner arrays MLX does not count


class Format(NamedTuple):
    """Format of the arrays of a matrix, as ``matmul`` takes it."""

    mode: str = "dense"
    bits: int = 32
    group_size: int = 0


class HeadTransform(NamedTuple):
    """Norm and position embedding of single heads.

    Attributes:
        offset: position of the first token.
        dims: features that RoPE rotates; 0 for no RoPE.
        periods: of the rotation (dims / 2,).
        weight: weight (D,) of an RMS norm before it; None for no norm.
    """

    offset: int = 0
    dims: int = 0
    interleaved: bool = False
    periods: mx.array | None = None
    weight: mx.array | None = None
    eps: float = 0.0

    def arguments(self, start: int) -> tuple[Any, ...]:
        """Arguments of the kernels, for heads that begin at feature ``start``."""
        periods = self.periods if self.dims else None
        return (start, self.offset, self.dims, self.interleaved, self.eps, self.weight, periods)


NO_TRANSFORM = HeadTransform()

_suspended = 0  # blocks of ``suspended``


@cache
def _load() -> tuple[Any, str]:
    """Import and test the kernels; return the module, or None and the reason."""
    wanted = os.environ.get("MLXARCH_CPU_KERNELS", "")
    if wanted == "off":
        return None, "switched off by MLXARCH_CPU_KERNELS"
    try:
        import mlxarch_cpu._kernels as module  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return None, f"the package mlxarch-cpu is not installed or not built for this MLX: {error}"
    mlx_version = importlib.metadata.version("mlx")
    if mlx_version != module.MLX_VERSION:
        return None, f"mlxarch-cpu is built for MLX {module.MLX_VERSION}, found {mlx_version}"
    if not module.use_instruction_set(wanted):
        return None, f"this machine has no kernels named {wanted!r} (MLXARCH_CPU_KERNELS)"
    module.set_threads(_thread_count())
    try:
        problem = _test(module)
    except Exception as error:  # such as arrays of another binding library than the kernels'
        problem = f"mlxarch-cpu does not work with this MLX: {type(error).__name__}: {error}"
    if problem:
        return None, problem
    return module, module.instruction_set()


def status() -> tuple[bool, str]:
    """Whether the kernels are used on a CPU, and their instruction set or the reason why not."""
    module, text = _load()
    return module is not None, text


def is_used() -> bool:
    """Whether operations in float32 are computed by the kernels here and now."""
    return not _suspended and mx.default_device() == mx.cpu and _load()[0] is not None


def description() -> str:
    """Describe the kernels in a few words, for statistics; empty on another device than a CPU."""
    if mx.default_device() != mx.cpu:
        return ""
    module, text = _load()
    if module is None:
        return f"CPU kernels: none, {text}"
    return f"CPU kernels: {text}, {module.threads()} threads"


def advice() -> str:
    """Say how to make this machine faster; empty where the kernels are used or switched off."""
    module, _ = _load()
    if module is not None or mx.default_device() != mx.cpu or "MLXARCH_CPU_KERNELS" in os.environ:
        return ""
    return "the package mlxarch-cpu makes this CPU some ten times faster: see docs/cpu.md"


@contextmanager
def suspended() -> Iterator[None]:
    """Compute with MLX alone in the block, by operations that it can export."""
    global _suspended
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1


def _kernels(*arrays: mx.array) -> Any:
    """Module of the kernels if they apply to the arrays, else None."""
    if _suspended or mx.default_device() != mx.cpu:
        return None
    if any(array.dtype != mx.float32 for array in arrays):
        return None
    return _load()[0]


def matmul(
    x: mx.array, arrays: Mapping[str, mx.array], mode: str, bits: int = 32, group_size: int = 0
) -> mx.array | None:
    """x (…, in) @ weight.T -> (…, out).

    Args:
        arrays: ``weight`` (out, in); with mode "affine" packed, with ``scales`` and ``biases``, with
            "mxfp4" packed, with ``scales``, and with "dense" in float32.
    """
    kernels = _kernels(x)
    if kernels is None or x.ndim == 0 or x.size == 0:
        return None
    matrix = _matrix(arrays, mode, bits, 2)
    return None if matrix is None else kernels.matmul(x, matrix, mode, bits, group_size)


def expert_matmul(
    x: mx.array,
    arrays: Mapping[str, mx.array],
    chosen: mx.array,
    mode: str,
    bits: int = 32,
    group_size: int = 0,
) -> mx.array | None:
    """Product of each row of x (…, 1, in) with one matrix, transposed, of a stack (E, out, in).

    Args:
        arrays: as for ``matmul``, stacked.
        chosen: index of the matrix for each row (…); on its last axis x may have size 1.
    """
    kernels = _kernels(x)
    if kernels is None or x.shape[-2] != 1 or chosen.size == 0:
        return None
    matrix = _matrix(arrays, mode, bits, 3)
    rows = tuple(x.shape[:-2])
    if rows == tuple(chosen.shape):
        repeats = 1
    elif rows == (*chosen.shape[:-1], 1):
        repeats = chosen.shape[-1]
    else:
        return None
    if matrix is None:
        return None
    flat = x.reshape(-1, x.shape[-1])
    y = kernels.expert_matmul(flat, matrix, chosen.reshape(-1), repeats, mode, bits, group_size)
    return y.reshape(*chosen.shape, 1, matrix[0].shape[-2])


def _matrix(
    arrays: Mapping[str, mx.array], mode: str, bits: int, ndim: int
) -> list[mx.array] | None:
    """Arrays of a matrix in the order of the kernels; None if they have another form."""
    weight = arrays["weight"]
    if bits not in BITS.get(mode, ()) or weight.ndim != ndim:
        return None
    if mode == "dense":
        return [weight] if weight.dtype == mx.float32 else None
    scales = arrays["scales"]
    if mode == "mxfp4":
        return [weight, scales]
    return [weight, scales, arrays["biases"]] if scales.dtype == mx.float32 else None


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array | None:
    """Attention of q (B, H, L, D) over k, v (B, K, S, D) -> (B, H, L, D).

    Args:
        mask: "causal", None, or booleans (L, S) or (B, 1, L, S).
    """
    kernels = _kernels(q, k, v)
    if kernels is None or q.size == 0 or q.shape[1] > 64 * k.shape[1]:
        return None
    if isinstance(mask, mx.array):
        if mask.dtype != mx.bool_ or mask.shape[-2:] != (q.shape[2], k.shape[2]):
            return None
        return kernels.attention(q, k, v, scale, False, mask, sinks)
    return kernels.attention(q, k, v, scale, mask == "causal", None, sinks)


def store(
    buffer: mx.array, x: mx.array, start: int, slot: int, transform: HeadTransform
) -> mx.array:
    """Write heads of x (B, L, features) into a cache (B, K, C, D).

    It is written in place unless something else still reads it.

    Args:
        start: feature of x at which the K heads begin.
        slot: token of the cache at which the L tokens begin.
    """
    return _load()[0].store(buffer, x, slot, *transform.arguments(start))


def cached_attention(
    x: mx.array,
    keys: mx.array,
    values: mx.array,
    heads: int,
    tokens: int,
    scale: float,
    transform: HeadTransform,
) -> mx.array:
    """Causal attention of the first ``heads`` heads of x (B, L, features) -> (B, L, heads * D).

    Args:
        keys, values: caches (B, K, C, D), of which the first ``tokens`` tokens are set; the last L
            of them are those of x.
    """
    kernels = _load()[0]
    return kernels.cached_attention(x, keys, values, heads, tokens, scale, *transform.arguments(0))


def feed_forward(
    x: mx.array,
    gate_up: Mapping[str, mx.array],
    gate_up_format: Format,
    down: Mapping[str, mx.array],
    down_format: Format,
    activation: str,
) -> mx.array | None:
    """Gated feed-forward of few rows: down(activation(gate) * up), for x (…, in) -> (…, out).

    Args:
        gate_up: arrays of both projections, joined; as for ``matmul``.
        activation: "silu" or "gelu".
    """
    kernels = _kernels(x)
    if kernels is None or not 0 < x.size <= MOST_FUSED_ROWS * x.shape[-1]:
        return None
    first = _matrix(gate_up, gate_up_format.mode, gate_up_format.bits, 2)
    second = _matrix(down, down_format.mode, down_format.bits, 2)
    if first is None or second is None:
        return None
    gelu = activation == "gelu"
    return kernels.feed_forward(x, first, *gate_up_format, second, *down_format, gelu)


def gated(a: mx.array, b: mx.array, activation: str) -> mx.array | None:
    """activation(a) * b, with "silu" or "gelu" (tanh approximation)."""
    kernels = _kernels(a, b)
    if kernels is None or a.shape != b.shape or a.size == 0:
        return None
    return kernels.gated(a, b, activation == "gelu")


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array | None:
    """x / rms(x) * weight over the last axis."""
    kernels = _kernels(x, weight)
    return None if kernels is None or x.size == 0 else kernels.rms_norm(x, weight, eps)


def rope(
    x: mx.array, dims: int, interleaved: bool, offset: int | mx.array, periods: mx.array
) -> mx.array | None:
    """Rotate the first ``dims`` features of x (B, H, L, D) by position / period."""
    kernels = _kernels(x, periods)
    if kernels is None or x.ndim != 4 or x.size == 0 or not isinstance(offset, int):
        return None
    return kernels.rope(x, dims, interleaved, offset, periods)


def _thread_count() -> int:
    """Threads of the kernels: ``MLXARCH_THREADS``, or the physical cores that this process may use.

    Raises:
        InvalidInput: the variable is not a whole number of at least 1.
    """
    if text := os.environ.get("MLXARCH_THREADS", ""):
        if text.isdecimal() and int(text) > 0:
            return int(text)
        raise InvalidInput(
            f"MLXARCH_THREADS is {text!r}; allowed is a whole number of at least 1, or remove it"
        )
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    count = len(usable) if usable else os.cpu_count() or 1
    cores = set()
    for cpu in usable or ():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            return count
    return len(cores) or count


def _test(module: Any) -> str:
    """Compare a product at each number of bits with MLX's; return the problem, or "" if there is none."""
    for bits in BITS["affine"]:
        exact = mx.sin(mx.arange(48 * 64, dtype=mx.float32)).reshape(48, 64)
        weight, scales, biases = mx.quantize(exact, 32, bits)
        x = mx.cos(mx.arange(9 * 64, dtype=mx.float32)).reshape(9, 64)
        wanted = mx.quantized_matmul(x, weight, scales, biases, True, 32, bits)
        for rows in (1, 9):
            found = module.matmul(x[:rows], [weight, scales, biases], "affine", bits, 32)
            if not bool(mx.allclose(found, wanted[:rows], 1e-5, 1e-4)):
                return f"the kernels {module.instruction_set()} compute a wrong product"
    return ""
