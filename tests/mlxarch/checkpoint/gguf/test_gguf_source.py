"""Small GGUF files, written here by the gguf package, against what the package itself reads from them."""

import json
import sys
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_gguf import (
    HEAD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    WIDE,
    K,
    by_package,
    permuted,
    q6_k,
    weights,
    write,
)

from mlxarch.checkpoint.gguf.config import config_from_metadata, huggingface_name
from mlxarch.checkpoint.gguf.source import open_gguf
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.errors import BackendMissing, CheckpointError, ConfigError, UnsupportedArchitecture
from mlxarch.loading.resolve import resolve

MIXED = {
    "token_embd.weight": K.Q8_0,
    "blk.0.attn_q.weight": K.Q4_1,
    "blk.0.attn_k.weight": K.Q8_0,
    "blk.0.attn_v.weight": K.Q6_K,
    "blk.0.attn_output.weight": K.Q4_0,
    "blk.0.ffn_gate.weight": K.F16,
    "blk.0.ffn_up.weight": K.BF16,
    "blk.0.ffn_down.weight": K.Q5_0,
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    tensors = weights()
    tensors["blk.0.attn_v.weight"] = q6_k(KV_HEADS * HEAD, HIDDEN)
    return write(tmp_path / "mixed.gguf", tensors, MIXED)


def test_every_tensor_has_the_values_that_the_gguf_package_gives(mixed: Path):
    source, expected = open_gguf(mixed), by_package(mixed)
    assert len(source.tensors) == len(expected) == 11
    for name, values in expected.items():
        ours = np.array(source.tensors[huggingface_name(name) or name].load().astype(mx.float32))
        heads = HEADS if "attn_q" in name else KV_HEADS if "attn_k" in name else 0
        assert np.array_equal(permuted(ours, heads) if heads else ours, values), name
        assert not heads or not np.array_equal(ours, values), f"{name} was not put back in order"


@pytest.mark.parametrize(("kind", "bits"), [(K.Q4_0, 4), (K.Q4_1, 4), (K.Q8_0, 8)])
def test_repacked_arrays_are_what_mlx_dequantizes_to_the_same_values(
    tmp_path: Path, kind: K, bits: int
):
    path = write(tmp_path / "m.gguf", weights(), {"blk.0.ffn_down.weight": kind})
    tensor = open_gguf(path).tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(tensor, QuantizedTensor) and (
        tensor.quantization.bits,
        tensor.quantization.group_size,
    ) == (bits, 32)
    parts = {name: part.load() for name, part in tensor.components.items()}
    assert [str(parts[name].dtype) for name in ("weight", "scales", "biases")] == [
        "mlx.core.uint32",
        "mlx.core.float16",
        "mlx.core.float16",
    ]
    floats = [parts[name].astype(mx.float32) for name in ("scales", "biases")]
    values = np.array(mx.dequantize(parts["weight"], *floats, group_size=32, bits=bits))
    assert np.array_equal(values, by_package(path)["blk.0.ffn_down.weight"])


@pytest.mark.parametrize(
    "name", ["token_embd", "blk.0.attn_q", "blk.0.attn_v", "blk.0.ffn_up", "blk.0.ffn_down"]
)
def test_rows_read_in_pieces_are_those_of_the_whole(mixed: Path, name: str):
    tensor = open_gguf(mixed).tensors[huggingface_name(f"{name}.weight") or name]
    whole, borders = np.array(tensor.load().astype(mx.float32)), [0, 1, 5, 40, 64]
    pieces = [
        tensor.read_rows(a, b).astype(mx.float32)
        for a, b in zip(borders, borders[1:], strict=False)
    ]
    assert np.array_equal(np.concatenate([np.array(p) for p in pieces]), whole[:64])


def test_a_flipped_nibble_changes_one_value(mixed: Path):
    name = "model.layers.0.self_attn.o_proj.weight"
    before = np.array(open_gguf(mixed).tensors[name].load())
    start = next(
        t.data_offset
        for t in gguf.GGUFReader(mixed).tensors
        if t.name == "blk.0.attn_output.weight"
    )
    data = bytearray(mixed.read_bytes())
    data[start + 2 + 3] ^= 0x10  # behind the scale, the high half of byte 3: value 3 + 16
    mixed.write_bytes(data)
    changed = np.argwhere(np.array(open_gguf(mixed).tensors[name].load()) != before)
    assert changed.tolist() == [[0, 19]]


def test_scales_that_float16_cannot_multiply_stay_in_float32(tmp_path: Path):
    tensors = weights()
    tensors["blk.0.ffn_up.weight"][3, :32] = np.linspace(
        -60_000, 60_000, 32
    )  # a scale of 472, then one of 520
    tensors["blk.0.ffn_gate.weight"][3, :32] = np.linspace(-66_000, 66_000, 32)
    path = write(
        tmp_path / "m.gguf",
        tensors,
        {f"blk.0.ffn_{name}.weight": K.Q8_0 for name in ("up", "gate")},
    )
    source, expected = open_gguf(path), by_package(path)
    for name, dtype in (("up", mx.float16), ("gate", mx.float32)):
        tensor = source.tensors[f"model.layers.0.mlp.{name}_proj.weight"]
        assert isinstance(tensor, QuantizedTensor)
        assert tensor.components["scales"].dtype == tensor.components["biases"].dtype == dtype
        assert np.array_equal(np.array(tensor.load()), expected[f"blk.0.ffn_{name}.weight"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_no_number_is_refused_by_tensor_name(tmp_path: Path, bad: float):
    tensors = weights()
    blocks = gguf.quantize(tensors["blk.0.ffn_up.weight"], K.Q4_1)
    blocks[-1, -20:-18] = np.array([bad], np.float16).view(np.uint8)
    tensors["blk.0.ffn_up.weight"] = blocks
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' has a scale of"):
        open_gguf(write(tmp_path / "m.gguf", tensors, {"blk.0.ffn_up.weight": K.Q4_1}))


def logits(source) -> np.ndarray:
    resolved = resolve(source)
    model = resolved.model
    model.load_weights([(path, tensor.load()) for path, tensor in resolved.parameters.items()])
    assert {path for path, _ in tree_flatten(model.parameters())} == set(resolved.parameters)
    return np.array(model(mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])))


def test_logits_are_those_of_the_original_checkpoint_and_not_those_of_permuted_rows(tmp_path: Path):
    original = weights()
    stored = dict(original)
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        stored[f"blk.0.attn_{name}.weight"] = permuted(original[f"blk.0.attn_{name}.weight"], heads)
    ours = logits(open_gguf(write(tmp_path / "llama.gguf", stored)))
    # the same numbers as a qwen2 file would hold them: unpermuted. Its config is then read as Llama's
    unpermuted = open_gguf(write(tmp_path / "plain.gguf", original, architecture="qwen2"))
    config = unpermuted.config | {"model_type": "llama", "attention_bias": False}
    reference = type(unpermuted)(config, unpermuted.tensors)
    assert np.array_equal(ours, logits(reference))
    wrong = type(unpermuted)(
        config, open_gguf(write(tmp_path / "bad.gguf", stored, architecture="qwen2")).tensors
    )
    assert np.abs(ours - logits(wrong)).max() > 1e-3


def test_biases_of_llama_are_permuted_too_and_those_of_qwen2_are_not(tmp_path: Path):
    bias = np.arange(HEADS * HEAD, dtype=np.float32)
    small = np.arange(KV_HEADS * HEAD, dtype=np.float32)
    tensors = weights() | {
        "blk.0.attn_q.bias": bias,
        "blk.0.attn_k.bias": small,
        "blk.0.attn_v.bias": small,
    }
    for architecture in ("llama", "qwen2"):
        source = open_gguf(
            write(tmp_path / f"{architecture}.gguf", tensors, architecture=architecture)
        )
        ours = np.array(source.tensors["model.layers.0.self_attn.q_proj.bias"].load())
        assert ours.shape == bias.shape
        assert np.array_equal(permuted(ours, HEADS) if architecture == "llama" else ours, bias)
        assert source.config.get("attention_bias") is (True if architecture == "llama" else None)


def test_the_config_is_that_of_a_hugging_face_checkpoint(mixed: Path):
    config = open_gguf(mixed).config
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "vocab_size": 64,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
        "bos_token_id": 61,
        "eos_token_id": 62,
    }


def test_an_output_matrix_unties_the_embeddings(tmp_path: Path):
    tensors = weights()
    head = tensors["token_embd.weight"][::-1].copy()
    source = open_gguf(
        write(tmp_path / "m.gguf", tensors | {"output.weight": head}, {"output.weight": K.Q8_0})
    )
    assert source.config["tie_word_embeddings"] is False
    assert resolve(source).parameters["lm_head.weight"].shape == head.shape


def test_qwen3_keeps_its_rows_and_has_norms_on_queries_and_keys(tmp_path: Path):
    tensors = weights() | {
        f"blk.0.attn_{name}_norm.weight": np.ones(32, np.float32) for name in "qk"
    }
    tensors |= {
        f"blk.0.attn_{name}.weight": tensors[f"blk.0.attn_{name}.weight"][: n * 32]
        for name, n in (("q", 4), ("k", 2), ("v", 2))
    }
    tensors["blk.0.attn_output.weight"] = np.ascontiguousarray(
        tensors["blk.0.attn_output.weight"][:, : 4 * 32]
    )
    lengths = {"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32}
    source = open_gguf(write(tmp_path / "m.gguf", tensors, architecture="qwen3", keys=lengths))
    assert source.config["head_dim"] == 32
    parameters = resolve(source).parameters
    queries = np.array(parameters["model.layers.0.self_attn.q_proj.weight"].load())
    assert np.array_equal(queries, tensors["blk.0.attn_q.weight"])


def frequencies(factor: float) -> np.ndarray:
    """The divisors that llama.cpp's converter writes for Llama 3's scaling, computed its way: by wavelength."""
    factors = []
    for n in range(0, HEAD, 2):
        wavelength = 2 * np.pi * 10_000.0 ** (n / HEAD)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequency_table_of_llama_3_becomes_its_rope_scaling(tmp_path: Path, factor: float):
    path = write(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": frequencies(factor)})
    scaling = open_gguf(path).config["rope_scaling"]
    assert scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    "change", [lambda f: f * 1.001, lambda f: f[:-1], lambda f: np.full_like(f, np.nan)]
)
def test_another_frequency_table_is_refused(tmp_path: Path, change):
    path = write(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": change(frequencies(8.0))})
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        open_gguf(path)


def test_linear_and_yarn_scaling_are_carried_over(tmp_path: Path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.5,
        "llama.rope.scaling.original_context_length": 4096,
    }
    for keys, expected in (
        (linear, {"rope_type": "linear", "factor": 4.0}),
        (yarn, {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 4096}),
    ):
        assert (
            open_gguf(write(tmp_path / "m.gguf", weights(), keys=keys)).config["rope_scaling"]
            == expected
        )


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"general.type": "adapter"}, ConfigError, "part of a model"),
        ({"split.count": 3}, ConfigError, "part of a model"),
        ({"split.count": "3"}, ConfigError, "part of a model"),
        (
            {"llama.block_count": None},
            ConfigError,
            r"block_count must be a whole number .* found None",
        ),
        ({"llama.block_count": "many"}, ConfigError, r"block_count must be a whole number"),
        ({"llama.attention.head_count": 0}, ConfigError, r"head_count must be a whole number"),
        ({"llama.attention.head_count": [4, 4]}, ConfigError, r"head_count must be a whole number"),
        (
            {"llama.attention.head_count": 3},
            CheckpointError,
            r"attn_q\.weight' has 256 rows, which 3 heads",
        ),
        (
            {"llama.attention.layer_norm_rms_epsilon": float("nan")},
            ConfigError,
            r"epsilon must be a positive number",
        ),
        (
            {"llama.rope.freq_base": float("inf")},
            ConfigError,
            r"freq_base must be a positive number",
        ),
        (
            {"llama.rope.dimension_count": 32},
            ConfigError,
            r"dimension_count must equal the head size, 64",
        ),
        (
            {"llama.attention.value_length": 32},
            ConfigError,
            r"value_length must equal the head size, 64",
        ),
        (
            {"llama.vocab_size": 63},
            ConfigError,
            r"vocab_size must equal the rows of token_embd\.weight, 64",
        ),
        ({"llama.expert_count": 8}, ConfigError, r"expert_count must be 0; found 8"),
        ({"llama.logit_scale": 2.0}, ConfigError, r"logit_scale is not understood"),
        (
            {"llama.rope.scaling.type": "longrope"},
            ConfigError,
            r"must be 'none', 'linear' or 'yarn'",
        ),
        ({"llama.rope.scaling.factor": 2.0}, ConfigError, r"factor needs a rope\.scaling\.type"),
    ],
)
def test_metadata_that_is_missing_malformed_or_not_understood_is_refused(
    tmp_path: Path, keys, error, message
):
    with pytest.raises(error, match=message):
        open_gguf(write(tmp_path / "m.gguf", weights(), keys=keys))


def test_an_architecture_that_is_not_read_is_refused_with_the_list_of_those_that_are(
    tmp_path: Path,
):
    with pytest.raises(
        UnsupportedArchitecture,
        match=r"'gemma3' is not read from GGUF; allowed are llama, qwen2, qwen3",
    ):
        open_gguf(write(tmp_path / "m.gguf", weights(), architecture="gemma3"))


@pytest.mark.parametrize("name", [None, 7, ["llama"], "x" * 10_000])
def test_an_architecture_that_is_no_name_is_refused_in_a_short_message(name):
    with pytest.raises(UnsupportedArchitecture) as caught:
        config_from_metadata({"general.architecture": name}, {}, "file.gguf")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("base", [1e300, 1e-300, -1.0, True, "10000"])
def test_a_rope_base_outside_float32_is_refused(base):
    names = (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
    )
    keys = {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": base,
    }
    keys |= {f"llama.{name}": 1 for name in names}
    with pytest.raises(ConfigError, match=r"rope\.freq_base must be a positive number"):
        config_from_metadata(keys, {"token_embd.weight": (4, 1)}, "file.gguf")
    assert (
        config_from_metadata(
            keys | {"llama.rope.freq_base": 5e5}, {"token_embd.weight": (4, 1)}, ""
        )["rope_theta"]
        == 500_000
    )


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_inp.weight", "rope_factors_long.weight", "blk.00.attn_q.weight", "x"]
)
def test_a_tensor_without_a_place_in_the_model_is_refused_by_name(tmp_path: Path, name: str):
    with pytest.raises(CheckpointError, match=f"tensor '{name}' has no place in a llama model"):
        open_gguf(write(tmp_path / "m.gguf", weights() | {name: np.ones((2, 32), np.float32)}))


def test_a_file_that_is_cut_off_or_changed_after_opening_is_noticed(mixed: Path):
    source = open_gguf(mixed)
    with mixed.open("r+b") as file:
        file.truncate(mixed.stat().st_size // 2)
    with pytest.raises(CheckpointError):
        for tensor in source.tensors.values():
            tensor.load()
    with pytest.raises(CheckpointError, match="changed"):
        source.shards[0].check_unchanged()


def test_generation_config_has_all_ends(tmp_path: Path):
    source = open_gguf(
        write(tmp_path / "m.gguf", weights(), keys={"tokenizer.ggml.eot_token_id": 63})
    )
    sidecar = source.sidecars["generation_config.json"]
    assert isinstance(sidecar, bytes)
    assert json.loads(sidecar) == {"bos_token_id": 61, "eos_token_id": [62, 63]}
    assert source.config["eos_token_id"] == [62, 63]


def test_without_the_gguf_package_the_error_says_how_to_install_it(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "mlxarch.checkpoint.gguf.reader", raising=False)
    with pytest.raises(BackendMissing, match=r"pip install 'mlxarch\[gguf\]'"):
        open_gguf(mixed)
