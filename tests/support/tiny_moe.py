"""Small mixtures of experts with random weights, packed in any of MLX's modes."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxarch.blocks.linear import ExpertLinear
from mlxarch.loading.registry import architecture
from mlxarch.quantization.scheme import Quantization

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 64, "num_experts": 12, "num_experts_per_tok": 3,
        "norm_topk_prob": True, "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "intermediate_size": 64, "num_local_experts": 12, "num_experts_per_tok": 3, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip


def make_moe(
    folder: Path,
    kind: str = "qwen3_moe",
    *,
    packed: Quantization | None = None,
    dtype: mx.Dtype = mx.float32,
    single: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a checkpoint; its experts are packed where ``packed`` is given, and one tensor each where ``single``."""
    settings = {"model_type": kind} | COMMON | KINDS[kind] | config
    found = architecture(settings)
    model, draw = found.build(), np.random.default_rng(seed)
    stacks = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, ExpertLinear)
    }
    arrays: dict[str, mx.array] = {}
    for path, empty in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
        values = mx.array(draw.normal(size=empty.shape) * 0.1).astype(mx.float32)
        parts = {"": (1 + values if "norm" in path else values).astype(dtype)}
        if path in stacks and packed is not None:
            q = mx.quantize(values.astype(dtype), packed.group_size, packed.bits, mode=packed.mode)
            parts = dict(zip(("", "scales", "biases"), q, strict=False))
        for part, array in parts.items():
            name = path if not part else path.removesuffix("weight") + part
            if single and path in stacks:
                before, _, after = name.partition(".switch_mlp.")
                arrays |= {f"{before}.experts.{n}.{after}": array[n] for n in range(array.shape[0])}
            else:
                arrays[name] = array
    if packed is not None:
        settings["quantization"] = {
            "bits": packed.bits,
            "group_size": packed.group_size,
            "mode": packed.mode,
        }
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
