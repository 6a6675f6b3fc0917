"""Optional CPU kernels: operations of the package ``mlxarch-cpu``, or MLX's own where it is missing."""
