"""CPU kernels against MLX's own operations, where they are built; without them, MLX computes alone."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlxarch.cli.main import cli
from mlxarch.cpu_kernels import native
from mlxarch.errors import InvalidInput

pytestmark = pytest.mark.kernels

Arrays = dict[str, mx.array]

BUILT, REASON = native.status()
FORMATS = [
    *(("affine", bits, group_size) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)),
    ("mxfp4", 4, 32),
    ("dense", 32, 0),
]
CHECKS = """
import mlx.core as mx
from mlxarch.cpu_kernels import native
used, text = native.status()
w, s, b = mx.quantize(mx.ones((32, 64)), 32, 4)
y = native.matmul(mx.ones((1, 64)), {"weight": w, "scales": s, "biases": b}, "affine", 4, 32)
print(native.description() + "|" + native.advice() + "|", used, text, None if y is None else y[0, 0].item())
"""


def run(**environment: str) -> str:
    """Report of a fresh process with these environment variables."""
    done = subprocess.run(
        [sys.executable, "-c", CHECKS],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    description, advice, report = done.stdout.strip().split("|")
    assert description.startswith("CPU kernels: ") or mx.default_device() != mx.cpu
    assert not advice  # since the variable is set
    return report.strip()


def difference(found: mx.array | None, wanted: mx.array) -> float:
    assert found is not None and found.shape == wanted.shape
    return float(mx.abs(found - wanted).max())


def test_switched_off_or_named_wrongly_the_kernels_are_not_used_and_the_reason_is_given() -> None:
    assert run(MLXARCH_CPU_KERNELS="off") == "False switched off by MLXARCH_CPU_KERNELS None"
    report = run(MLXARCH_CPU_KERNELS="mmx")
    assert report.startswith("False ") and report.endswith(" None")
    assert "mmx" in report or not BUILT


def test_the_number_of_threads_is_that_of_the_variable_and_a_wrong_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLXARCH_THREADS", "3")
    assert native._thread_count() == 3
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("MLXARCH_THREADS", wrong)
        with pytest.raises(InvalidInput, match=re.escape(f"{wrong!r}; allowed is a whole number")):
            native._thread_count()
    monkeypatch.delenv("MLXARCH_THREADS")
    assert 1 <= native._thread_count() <= (os.cpu_count() or 1)


def test_the_option_of_the_command_line_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXARCH_THREADS", "1")
    for command in ("run", "chat", "serve", "quantize", "eval", "pull", "tune"):
        done = CliRunner().invoke(cli, [command, "-t", "0"])
        assert done.exit_code == 2 and "'-t'" in done.output
        assert os.environ["MLXARCH_THREADS"] == "1"
    assert CliRunner().invoke(cli, ["eval", "--threads", "5"]).exit_code == 2  # no model is named
    assert native._thread_count() == 5


def quantize(shape: tuple[int, ...], bits: int, group_size: int, mode: str = "affine") -> Arrays:
    values = mx.random.normal(shape, key=mx.random.key(1))
    arrays = mx.quantize(values, group_size, bits, mode)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=False))


def mlx_matmul(x: mx.array, arrays: Arrays, mode: str, bits: int, group_size: int) -> mx.array:
    if mode == "dense":
        return x @ arrays["weight"].T
    options: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    weight, *others = arrays.values()
    names = ("scales", "biases")
    return mx.quantized_matmul(x, weight, **dict(zip(names, others, strict=False)), **options)


def mlx_expert_matmul(
    x: mx.array, arrays: Arrays, chosen: mx.array, mode: str, bits: int, group_size: int
) -> mx.array:
    if mode == "dense":
        return mx.gather_mm(x, arrays["weight"].swapaxes(-1, -2), rhs_indices=chosen)
    options: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    return mx.gather_qmm(x, *arrays.values(), rhs_indices=chosen, transpose=True, **options)


def test_another_device_dtype_or_format_is_left_to_mlx() -> None:
    arrays = quantize((32, 64), 4, 32)
    x = mx.ones((2, 64))
    assert native.matmul(x.astype(mx.float16), arrays, "affine", 4, 32) is None
    half = {name: arrays[name].astype(mx.float16) for name in ("scales", "biases")}
    assert native.matmul(x, arrays | half, "affine", 4, 32) is None
    assert native.matmul(x, quantize((32, 64), 8, 32, "mxfp8"), "mxfp8", 8, 32) is None
    assert native.matmul(x, {"weight": mx.ones((3, 64), mx.bfloat16)}, "dense") is None
    with native.suspended():
        assert native.matmul(x, arrays, "affine", 4, 32) is None
        assert native.rms_norm(x, mx.ones((64,)), 1e-5) is None
    q = mx.ones((1, 2, 1, 8))
    assert native.attention(q, q, q, 1.0, mx.zeros((1, 1)), None) is None
    assert native.rope(q, 8, False, mx.array([3]), mx.ones((4,))) is None


if BUILT:

    @pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
    def test_a_set_that_the_machine_has_computes_and_another_is_refused(
        instruction_set: str,
    ) -> None:
        report = run(MLXARCH_CPU_KERNELS=instruction_set)
        assert report in (
            f"True {instruction_set} 64.0",
            f"False this machine has no kernels named {instruction_set!r} (MLXARCH_CPU_KERNELS) None",
        )
        assert instruction_set != "baseline" or report.startswith("True")

    def matrix(shape: tuple[int, ...], mode: str, bits: int, group_size: int) -> Arrays:
        if mode == "dense":
            return {"weight": mx.random.normal(shape, key=mx.random.key(1))}
        return quantize(shape, bits, group_size, mode)

    @pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
    def test_a_product_is_that_of_mlx_for_any_number_of_rows(
        mode: str, bits: int, group_size: int
    ) -> None:
        arrays = matrix((83, 384), mode, bits, group_size)
        x = mx.random.normal((2, 20, 384), key=mx.random.key(2))
        wanted = mlx_matmul(x, arrays, mode, bits, group_size)
        found = native.matmul(x, arrays, mode, bits, group_size)
        assert difference(found, wanted) < 3e-4
        assert difference(found, wanted + 1e-3) > 5e-4  # negative control
        for rows in (1, 2, 5, 7):
            part = native.matmul(x[:, :rows], arrays, mode, bits, group_size)
            assert difference(part, wanted[:, :rows]) < 3e-4

    @pytest.mark.parametrize(
        ("mode", "bits", "group_size"), [("affine", 4, 64), ("affine", 5, 32), ("dense", 32, 0)]
    )
    def test_a_row_does_not_depend_on_its_neighbours_up_to_sixteen(
        mode: str, bits: int, group_size: int
    ) -> None:
        arrays = matrix((70, 256), mode, bits, group_size)
        x = mx.random.normal((16, 256), key=mx.random.key(2))
        together = native.matmul(x, arrays, mode, bits, group_size)
        assert together is not None
        for row in range(16):
            alone = native.matmul(x[row : row + 1], arrays, mode, bits, group_size)
            assert alone is not None and bool(mx.array_equal(together[row : row + 1], alone))

    def test_evaluated_weights_are_used_as_they_are(tmp_path: Path) -> None:
        arrays = quantize((70, 256), 4, 64)
        x = mx.zeros((1, 256))
        mx.eval(arrays, x)

        def operations(weights: Arrays) -> str:
            y = native.matmul(x, weights, "affine", 4, 64)
            assert y is not None
            mx.export_to_dot(str(tmp_path / "graph.dot"), y)
            return (tmp_path / "graph.dot").read_text()

        assert "CpuMatmul" in operations(arrays) and "Contiguous" not in operations(arrays)
        assert "Contiguous" in operations({name: array + 0 for name, array in arrays.items()})

    @pytest.mark.parametrize("repeats", [1, 3])
    @pytest.mark.parametrize(
        ("mode", "bits", "group_size"), [("affine", 4, 32), ("mxfp4", 4, 32), ("dense", 32, 0)]
    )
    def test_experts_are_those_of_mlx(mode: str, bits: int, group_size: int, repeats: int) -> None:
        arrays = matrix((5, 33, 64), mode, bits, group_size)
        rows = 9 if repeats == 1 else 3
        x = mx.random.normal((rows, 1, 1, 64), key=mx.random.key(2))
        chosen = mx.random.randint(0, 5, (rows, repeats), key=mx.random.key(3))
        wanted = mlx_expert_matmul(x, arrays, chosen, mode, bits, group_size)
        found = native.expert_matmul(x, arrays, chosen, mode, bits, group_size)
        assert difference(found, wanted) < 1e-4
        other = mlx_expert_matmul(x, arrays, (chosen + 1) % 5, mode, bits, group_size)
        assert difference(found, other) > 1e-2

    @pytest.mark.parametrize("batch", [1, 2])
    def test_attention_with_a_mask_is_that_of_mlx(batch: int) -> None:
        keys = mx.random.split(mx.random.key(4), 4)
        q = mx.random.normal((2, 6, 9, 32), key=keys[0])
        k, v = (mx.random.normal((2, 2, 50, 32), key=key) for key in keys[1:3])
        mask = mx.random.bernoulli(0.5, (batch, 1, 9, 50), key=keys[3])
        wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
        assert difference(native.attention(q, k, v, 0.3, mask, None), wanted) < 1e-5
        assert difference(native.attention(q, k, v, 0.3, None, None), wanted) > 1e-2

    @pytest.mark.parametrize("length", [1, 7, 45])
    @pytest.mark.parametrize("mask", ["causal", None])
    @pytest.mark.parametrize("with_sinks", [True, False])
    def test_attention_is_that_of_mlx(length: int, mask: str | None, with_sinks: bool) -> None:
        keys = mx.random.split(mx.random.key(4), 4)
        q = mx.random.normal((2, length, 6, 32), key=keys[0]).swapaxes(1, 2)
        k = mx.random.normal((2, 2, 60, 32), key=keys[1])[..., :50, :]
        v = mx.random.normal((2, 2, 60, 32), key=keys[2])[..., :50, :]
        sinks = mx.random.normal((6,), key=keys[3]) if with_sinks else None
        wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)
        assert difference(native.attention(q, k, v, 0.3, mask, sinks), wanted) < 1e-5
        assert difference(native.attention(q, k, v, 0.31, mask, sinks), wanted) > 1e-4

    def test_elementwise_functions_are_those_of_mlx() -> None:
        joined = 5 * mx.random.normal((3, 5, 74), key=mx.random.key(1))
        a, b = joined[..., :37], joined[..., 37:]
        silu = a * mx.sigmoid(a) * b
        gelu = 0.5 * a * (1 + mx.tanh(0.7978845608 * (a + 0.044715 * a**3))) * b
        assert difference(native.gated(a, b, "silu"), silu) < 1e-4
        assert difference(native.gated(a, b, "gelu"), gelu) < 1e-4
        assert difference(native.gated(a, b, "gelu"), silu) > 1e-2
        weight = mx.random.normal((37,), key=mx.random.key(2))
        wanted = mx.fast.rms_norm(a, weight, 1e-5)
        assert difference(native.rms_norm(a, weight, 1e-5), wanted) < 1e-4
        assert difference(native.rms_norm(a, weight + 0.1, 1e-5), wanted) > 1e-2

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_rope_is_that_of_mlx(interleaved: bool) -> None:
        x = mx.random.normal((2, 5, 3, 40), key=mx.random.key(1)).swapaxes(1, 2)
        periods = mx.power(100.0, mx.arange(16) / 16)
        options: dict[str, Any] = {"traditional": interleaved, "base": None, "scale": 1.0}
        wanted = mx.fast.rope(x, 32, offset=77, freqs=periods, **options)
        assert difference(native.rope(x, 32, interleaved, 77, periods), wanted) < 1e-4
        assert difference(native.rope(x, 32, interleaved, 78, periods), wanted) > 1e-2

    @pytest.mark.parametrize(("mode", "bits", "group_size"), [("affine", 8, 32), ("dense", 32, 0)])
    def test_gradients_pass_through_the_kernels(mode: str, bits: int, group_size: int) -> None:
        arrays = matrix((32, 64), mode, bits, group_size)
        x = mx.random.normal((3, 64), key=mx.random.key(2))

        def with_kernels(x: mx.array) -> mx.array:
            y = native.matmul(x, arrays, mode, bits, group_size)
            assert y is not None
            return (y**2).sum()

        def with_mlx(x: mx.array) -> mx.array:
            return (mlx_matmul(x, arrays, mode, bits, group_size) ** 2).sum()

        found, wanted = mx.grad(with_kernels)(x), mx.grad(with_mlx)(x)
        assert difference(found, wanted) < 1e-2
        assert difference(found * 1.01, wanted) > 1e-1

else:

    def test_without_the_package_the_reason_says_so() -> None:
        assert "mlxarch-cpu" in REASON or "MLXARCH_CPU_KERNELS" in REASON
