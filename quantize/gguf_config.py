"""What GGUF metadata says of a model, as Hugging Face's config.json says it; and the names of its tensors.

Source: the key and tensor names are those of the gguf package (gguf/constants.py) and of llama.cpp's
convert_hf_to_gguf.py, whose steps this undoes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from mlxarch.errors import ConfigError, UnsupportedArchitecture
from mlxarch.untrusted import shown

# general.architecture -> transformers' class. The keys are model_types as well.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Keys below "<architecture>." that are read here; one that is not listed could change the mathematics.
READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
}
# Keys that must have one of these values, with which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}

# The ends of rope_freqs.weight are not stored; the published Llama 3 files all have these.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

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
    """``blk.0.attn_q.weight`` -> ``model.layers.0.self_attn.q_proj.weight``; None where there is no counterpart."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)", stem, re.ASCII)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{kind}"
    return None


def model_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """config.json of the file: ``shapes`` are those of its tensors by GGUF name, ``where`` is the file for messages.

    ``rope_freqs.weight`` is not read here, see ``llama3_scaling``.

    Raises:
        UnsupportedArchitecture: ``general.architecture`` is none of ARCHITECTURES.
        ConfigError: a key is missing, of a wrong type, out of range, or not understood.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"{where}: general.architecture {shown(name)} is not read from GGUF; allowed are "
            f"{', '.join(ARCHITECTURES)}. Take the model's safetensors repository instead"
        )
    if metadata.get("general.type", "model") != "model" or metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(
            f"{where}: it is a part of a model: general.type {shown(metadata.get('general.type'))}, split.count "
            f"{shown(metadata.get('split.count'))}. Only whole models are read; llama-gguf-split --merge joins parts"
        )
    keys = _Keys(metadata, name, where)
    keys.refuse_unknown()
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_size = keys.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_size) != head_size:
            keys.refuse(key, f"must equal the head size, {head_size}")
    vocabulary = shapes.get("token_embd.weight", (0,))[0]
    if keys.integer("vocab_size", vocabulary) != vocabulary:
        keys.refuse("vocab_size", f"must equal the rows of token_embd.weight, {vocabulary}")
    biased = {name.split(".")[-2] for name in shapes if name.endswith(".bias")}
    scaling = keys.scaling()
    return {
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
        **({"rope_scaling": scaling} if scaling else {}),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in shapes,
        # qwen2's q, k and v always have biases, and its config has no key for them
        **({} if name == "qwen2" else {"attention_bias": any(bias.startswith("attn") for bias in biased)}),
        **({"mlp_bias": any(bias.startswith("ffn") for bias in biased)} if name == "llama" else {}),
        "torch_dtype": "float16",
    }


def llama3_scaling(factors: np.ndarray, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``rope_scaling`` of type llama3 from the divisors of the frequencies that ``rope_freqs.weight`` holds.

    Raises:
        ConfigError: the divisors are not those of any factor with the bounds that Meta publishes.
    """
    half, factor = config["head_dim"] // 2, float(factors.max(initial=0))
    if "rope_scaling" not in config and factors.shape == (half,) and math.isfinite(factor) and factor > 0:
        wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        kept = np.clip((LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
        if np.allclose(1 / (kept + (1 - kept) / factor), factors, rtol=1e-5, atol=0):
            return {"rope_type": "llama3", "factor": _short(factor), **LLAMA3}
    raise ConfigError(
        f"{where}: rope_freqs.weight is not Llama 3's scaling with {LLAMA3}. Other frequency tables are not read; "
        "take the model's safetensors repository instead"
    )


@dataclass(frozen=True)
class _Keys:
    """The keys below the architecture's name."""

    metadata: Mapping[str, Any]
    architecture: str
    where: str

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def refuse(self, key: str, rule: str) -> NoReturn:
        raise ConfigError(
            f"{self.where}: {self.architecture}.{key} {rule}; found {shown(self.get(key))}. "
            "Take another file of this model, or its safetensors repository"
        )

    def refuse_unknown(self) -> None:
        prefix = f"{self.architecture}."
        for name in self.metadata:
            if not name.startswith(prefix) or (key := name.removeprefix(prefix)) in READ:
                continue
            if key not in NEUTRAL:
                self.refuse(key, "is not understood, and could change what the model computes")
            if self.get(key) not in NEUTRAL[key]:
                self.refuse(key, f"must be {' or '.join(map(repr, NEUTRAL[key]))}")

    def integer(self, key: str, default: int | None = None) -> int:
        """From 1 to 2^31 - 1."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            self.refuse(key, "must be a whole number from 1 to 2^31 - 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Positive and finite, and the shortest decimal that float32 reads as the same: 1e-05, not 9.99999974e-06."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < _short(value) < math.inf:
            self.refuse(key, "must be a positive number")
        return _short(value)

    def scaling(self) -> dict[str, Any] | None:
        kind = self.get("rope.scaling.type")
        if kind in (None, "none"):
            if self.get("rope.scaling.factor") not in (None, 0.0, 1.0):
                self.refuse("rope.scaling.factor", "needs a rope.scaling.type")
            return None
        if kind not in ("linear", "yarn"):
            self.refuse("rope.scaling.type", "must be 'none', 'linear' or 'yarn'")
        scaling: dict[str, Any] = {"rope_type": kind, "factor": self.number("rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self.integer("rope.scaling.original_context_length")
        return scaling


def _short(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
