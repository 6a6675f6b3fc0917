"""Build of the extension: kernels.cpp once for each instruction set, and the operations for MLX."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx
import nanobind
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MLX = Path(next(iter(mlx.__path__)))
NANOBIND = Path(nanobind.include_dir()).parent
X86 = platform.machine() in ("x86_64", "AMD64")
SETS = {"baseline": []}
if X86:
    SETS["avx2"] = ["-mavx2", "-mfma"]
    SETS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-g0"]
# Contraction to fused multiply-adds is wanted; no option that changes NaN or infinity is
KERNELS = [*COMMON, "-O3", "-ffp-contract=fast", "-fno-trapping-math", "-fno-math-errno"]
# Without it gcc joins broadcast scales in memory, and every block waits for the write
KERNELS += ["-fno-tree-slp-vectorize"]


class BuildKernels(build_ext):
    """Compile kernels.cpp with the flags of each instruction set, then link everything."""

    def build_extension(self, ext: Extension) -> None:
        """Compile all sources side by side, and let the base class link the objects."""
        own = {"include_dirs": ext.include_dirs, "macros": ext.define_macros}
        jobs = [
            ("src/kernels.cpp", name, {"macros": [("ISA", name)]}, [*KERNELS, "-Wno-psabi", *flags])
            for name, flags in SETS.items()
        ]
        jobs += [(source, "graph", own, ext.extra_compile_args) for source in ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = sum(pool.map(self._compile, *zip(*jobs, strict=True)), [])
        ext.sources = []
        super().build_extension(ext)

    def _compile(self, source: str, folder: str, options: dict, flags: list[str]) -> list[str]:
        target = str(Path(self.build_temp, folder))
        return self.compiler.compile([source], target, extra_postargs=flags, **options)


setup(
    ext_modules=[
        Extension(
            "mlxarch_cpu._kernels",
            [
                f"src/{name}.cpp"
                for name in (
                    "decode_ops",
                    "dispatch",
                    "layer_ops",
                    "matmul_ops",
                    "module",
                    "nanobind",
                    "pool",
                )
            ],
            include_dirs=[
                str(MLX / "include"),
                nanobind.include_dir(),
                str(NANOBIND / "src"),
                str(NANOBIND / "ext" / "robin_map" / "include"),
            ],
            define_macros=[("NB_DOMAIN", "mlx"), ("NDEBUG", None)],
            library_dirs=[str(MLX / "lib")],
            libraries=["mlx"],
            extra_compile_args=[*COMMON, "-O2", "-fno-strict-aliasing"],
            extra_link_args=["-pthread", "-Wl,-rpath,$ORIGIN/../mlx/lib"],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
