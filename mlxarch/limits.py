"""The limits of MLX's memory, as a plan has them. They are the process's: the model that was loaded last sets them."""

import mlx.core as mx

from mlxarch.memory import Plan


def set_limits(plan: Plan, *, wire: bool = False) -> None:
    """Let MLX take what the plan leaves it, beside what it holds already.

    Beyond its limit MLX waits for arrays to be let go of before it begins with more; it fails only where the memory
    does. What it keeps for later arrays is bounded as well.

    Args:
        wire: keep the weights and caches of the plan from being swapped out, on a Mac; else nothing is.
    """
    held = mx.get_active_memory()
    mx.set_memory_limit(held + max(plan.memory - plan.process - plan.free, plan.mlx))
    mx.set_cache_limit(plan.free)
    if wire and mx.metal.is_available():
        most = int(mx.device_info()["max_recommended_working_set_size"])
        mx.set_wired_limit(min(held + plan.mlx - plan.activations, most))
