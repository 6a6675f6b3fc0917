"""Vector kernels for mlxarch on CPUs, used by ``mlxarch.cpu_kernels``; import mlx.core first."""
