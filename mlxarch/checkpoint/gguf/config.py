"""Conversion of GGUF metadata to a Hugging Face config.json, and of GGUF tensor names.

It reverses llama.cpp's convert_hf_to_gguf.py.
Source: key and tensor names of the gguf package (gguf/constants.py) and of convert_hf_to_gguf.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from mlxarch.errors import ConfigError, UnsupportedArchitecture
from mlxarch.system.untrusted_files import short_repr

# general.architecture, which is also the model_type -> class of transformers.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Keys below "<architecture>." that are converted; any other could change what the model computes.
KNOWN_KEYS = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
}
# Keys with the values at which they have no effect; other values are refused.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}

# Parameters of rope_freqs.weight, which the file does not store; all published Llama 3 files use
# these.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def huggingface_name(name: str) -> str | None:
    """Convert a GGUF tensor name to Hugging Face's; None if it has no counterpart.

    ``blk.0.attn_q.weight`` becomes ``model.layers.0.self_attn.q_proj.weight``.
    """
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)", stem, re.ASCII)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{kind}"
    return None


def config_from_metadata(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """Build config.json from a file's metadata.

    ``rope_freqs.weight`` is not used here, see ``llama3_rope_scaling``.

    Args:
        metadata: the file's keys and values.
        shapes: GGUF tensor name -> shape.
        where: the file, for messages.

    Raises:
        UnsupportedArchitecture: ``general.architecture`` is none of ARCHITECTURES.
        ConfigError: a key is missing, of a wrong type, out of range, or unsupported.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{where}: general.architecture {short_repr(name)} is not read from GGUF; allowed are "
            f"{', '.join(ARCHITECTURES)}. Take the model's safetensors repository instead"
        )
    is_model = metadata.get("general.type", "model") == "model"
    if not is_model or metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(
            f"{where}: it is a part of a model: general.type "
            f"{short_repr(metadata.get('general.type'))}, split.count "
            f"{short_repr(metadata.get('split.count'))}. Only whole models are read; "
            "llama-gguf-split --merge joins parts"
        )
    keys = _ArchitectureKeys(metadata, name, where)
    keys.refuse_unknown()
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    head_size = keys.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_size) != head_size:
            keys.refuse(key, f"must equal the head size, {head_size}")
    vocabulary = shapes.get("token_embd.weight", (0,))[0]
    if keys.integer("vocab_size", vocabulary) != vocabulary:
        keys.refuse("vocab_size", f"must equal the rows of token_embd.weight, {vocabulary}")
    biased = {name.split(".")[-2] for name in shapes if name.endswith(".bias")}
    scaling = keys.rope_scaling()
    config = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
    }
    if scaling:
        config["rope_scaling"] = scaling
    config["vocab_size"] = vocabulary
    config["tie_word_embeddings"] = "output.weight" not in shapes
    if name != "qwen2":  # its q, k and v always have biases, and its config has no key for them
        config["attention_bias"] = any(bias.startswith("attn") for bias in biased)
    if name == "llama":
        config["mlp_bias"] = any(bias.startswith("ffn") for bias in biased)
    config["torch_dtype"] = "float16"
    return config


def llama3_rope_scaling(
    factors: np.ndarray, config: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Derive ``rope_scaling`` of type llama3 from the frequency divisors in ``rope_freqs.weight``.

    Raises:
        ConfigError: no scaling factor gives these divisors with the bounds that Meta publishes.
    """
    half = config["head_dim"] // 2
    factor = float(factors.max(initial=0))
    if (
        "rope_scaling" not in config
        and factors.shape == (half,)
        and math.isfinite(factor)
        and factor > 0
    ):
        wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
        low = LLAMA3_ROPE["low_freq_factor"]
        high = LLAMA3_ROPE["high_freq_factor"]
        turns = LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths
        kept = np.clip((turns - low) / (high - low), 0, 1)
        if np.allclose(1 / (kept + (1 - kept) / factor), factors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", "factor": _shortest_decimal(factor), **LLAMA3_ROPE}
    raise ConfigError(
        f"{where}: rope_freqs.weight is not Llama 3's scaling with {LLAMA3_ROPE}. Other frequency "
        "tables are not read; "
        "take the model's safetensors repository instead"
    )


@dataclass(frozen=True)
class _ArchitectureKeys:
    """The keys below the architecture's name: typed access, with errors that name file and key."""

    metadata: Mapping[str, Any]
    architecture: str
    where: str

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def refuse(self, key: str, rule: str) -> NoReturn:
        raise ConfigError(
            f"{self.where}: {self.architecture}.{key} {rule}; found {short_repr(self.get(key))}. "
            "Take another file of this model, or its safetensors repository"
        )

    def refuse_unknown(self) -> None:
        """Raise ConfigError for a key that is not converted and not at a value without effect."""
        prefix = f"{self.architecture}."
        for name in self.metadata:
            if not name.startswith(prefix) or (key := name.removeprefix(prefix)) in KNOWN_KEYS:
                continue
            if key not in NEUTRAL_VALUES:
                self.refuse(key, "is not understood, and could change what the model computes")
            if self.get(key) not in NEUTRAL_VALUES[key]:
                self.refuse(key, f"must be {' or '.join(map(repr, NEUTRAL_VALUES[key]))}")

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 to 2^31 - 1."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            self.refuse(key, "must be a whole number from 1 to 2^31 - 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive, finite number, as the shortest decimal with the same float32 value."""
        value = self.get(key)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < _shortest_decimal(value) < math.inf
        ):
            self.refuse(key, "must be a positive number")
        return _shortest_decimal(value)

    def rope_scaling(self) -> dict[str, Any] | None:
        """Return config.json's ``rope_scaling``, if any."""
        kind = self.get("rope.scaling.type")
        if kind in (None, "none"):
            if self.get("rope.scaling.factor") not in (None, 0.0, 1.0):
                self.refuse("rope.scaling.factor", "needs a rope.scaling.type")
            return None
        if kind not in ("linear", "yarn"):
            self.refuse("rope.scaling.type", "must be 'none', 'linear' or 'yarn'")
        scaling: dict[str, Any] = {"rope_type": kind, "factor": self.number("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self.integer(
                "rope.scaling.original_context_length"
            )
        return scaling


def _shortest_decimal(value: float) -> float:
    """Return the shortest decimal with the same float32 value: 1e-05 for 9.99999974e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
