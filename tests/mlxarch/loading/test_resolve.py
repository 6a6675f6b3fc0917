"""Tensors of a checkpoint against its config: what does not fit is refused by name, before MLX sees it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import parity
from mlxarch.checkpoint.quantized_tensor import QuantizedTensor
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import resolve
from mlxarch.quantization.config_section import quantization_from_config
from mlxarch.quantize import convert
from tiny_llama import make_llama

pytestmark = pytest.mark.without_kernels  # what reaches MLX's own product is watched

Arrays = dict[str, np.ndarray]
Config = dict[str, Any]
Change = Callable[[Config, Arrays], object]

GATE = "model.layers.0.mlp.gate_proj"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    make_llama(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(
        dense, tmp_path_factory.mktemp("packed") / "model", bits=4, group_size=32, method="round"
    ).output


def read(folder: Path) -> tuple[Config, Arrays]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder: Path, config: Config, arrays: Arrays) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / "model.safetensors",
    )
    return folder


def changed(source: Path, folder: Path, change: Change) -> Path:
    config, arrays = read(source)
    change(config, arrays)
    return write(folder / "changed", config, arrays)


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the MLX functions that got hold of weights."""
    calls: list[str] = []
    for name in ("load", "quantized_matmul", "dequantize"):
        function = getattr(mx, name)

        def recorded(
            *arguments: Any, name: str = name, function: Any = function, **settings: Any
        ) -> Any:
            calls.append(name)
            return function(*arguments, **settings)

        monkeypatch.setattr(mx, name, recorded)
    return calls


# Quantized matrices


def resized(array: np.ndarray, axis: int, by: int) -> np.ndarray:
    if by < 0:
        return array[:by] if axis == 0 else array[:, :by]
    return np.concatenate([array, array[:by] if axis == 0 else array[:, :by]], axis=axis)


def bad_triple(draw: np.random.Generator, config: Config, arrays: Arrays) -> tuple[str, str]:
    """Damage one matrix, or what the config says of it; gives its path and what was done."""
    paths = sorted(name.removesuffix(".scales") for name in arrays if name.endswith(".scales"))
    path = paths[int(draw.integers(len(paths)))]
    part = str(draw.choice(["weight", "scales", "biases"]))
    name, by = f"{path}.{part}", int(draw.choice([-3, -2, -1, 1, 2]))
    own = dict(config["quantization"])
    kind = str(
        draw.choice(["rows", "groups", "dtype", "missing", "bits", "group size", "mode", "axes"])
    )
    if kind == "rows":
        arrays[name] = resized(arrays[name], 0, by)
    elif kind == "groups":
        arrays[name] = resized(arrays[name], 1, 1 if arrays[name].shape[1] < 4 and by < 0 else by)
    elif kind == "dtype":
        wrong = (
            ["int32", "float32", "uint8"]
            if part == "weight"
            else ["float16", "int8", "uint32", "bool"]
        )
        arrays[name] = arrays[name].astype(str(draw.choice(wrong)))
    elif kind == "missing":
        del arrays[name]
    elif kind == "axes":
        arrays[name] = arrays[name].reshape(
            [(-1,), (1, *arrays[name].shape)][int(draw.integers(2))]
        )
    else:
        wrong = {
            "bits": [2, 3, 5, 6, 8, 1, 7, 0, -4, 32, 4.0, "4", None, True, [4]],
            "group size": [64, 128, 16, 0, -32, 31, 32.0, "32", None],
            "mode": ["mxfp4", "nvfp4", "mxfp8", "AFFINE", "", None, 4, ["affine"]],
        }[kind]
        own[kind.replace(" ", "_")] = wrong[int(draw.integers(len(wrong)))]
        # for all matrices, the first to be looked at is named
        config["quantization"] = (
            own if draw.random() < 0.5 else config["quantization"] | {path: own}
        )
        path = path if path in config["quantization"] else ""
    return path, f"{kind} of {name}"


def test_no_bad_weight_scales_biases_reach_mlx(
    packed: Path, tmp_path: Path, reached: list[str]
) -> None:
    draw, kinds = np.random.default_rng(0), set()
    for number in range(200):
        config, arrays = read(packed)
        path, what = bad_triple(draw, config, arrays)
        kinds.add(what.split(" of ")[0])
        folder = write(tmp_path / "bad", config, arrays)
        with pytest.raises((CheckpointError, ConfigError)) as error:
            load_model(folder)
        assert (path or "model.") in str(error.value) or (
            not path and "lm_head" in str(error.value)
        ), (number, what)
    assert len(kinds) == 8
    assert not reached
    model, _ = load_model(packed)  # as it was it loads, and the record would have shown it
    mx.eval(model(mx.array([[1]])))
    assert set(reached) == {"load", "quantized_matmul", "dequantize"}


def test_superfluous_biases_are_refused(dense: Path, packed: Path, tmp_path: Path) -> None:
    config, arrays = read(
        convert(dense, tmp_path / "mxfp4", bits=4, group_size=32, mode="mxfp4").output
    )
    arrays[f"{GATE}.biases"] = np.zeros(arrays[f"{GATE}.scales"].shape, np.float32)
    with pytest.raises(CheckpointError, match=f"{GATE}.weight.*biases are not of this mode"):
        open_checkpoint(write(tmp_path / "changed", config, arrays))


def test_a_packed_norm_is_no_matrix(dense: Path, tmp_path: Path) -> None:
    def pack_norm(config: Config, arrays: Arrays) -> None:
        config["quantization"] = {"bits": 8, "group_size": 32}
        arrays[NORM] = np.zeros(16, np.uint32)
        for part in ("scales", "biases"):
            arrays[NORM.replace("weight", part)] = np.zeros(2, np.float32)

    with pytest.raises(CheckpointError, match=f"{NORM} is quantized, and no matrix"):
        resolve(open_checkpoint(changed(dense, tmp_path, pack_norm)))


def test_a_scalar_for_a_packed_weight_is_refused(packed: Path, tmp_path: Path) -> None:
    def scalar(config: Config, arrays: Arrays) -> None:
        arrays[f"{GATE}.weight"] = np.array(7, np.uint32)

    with pytest.raises(CheckpointError, match=GATE):
        open_checkpoint(changed(packed, tmp_path, scalar))


@pytest.mark.parametrize("quantization", [None, {}, [], 4, "mlx", False])
def test_packed_weights_need_settings(quantization: Any, packed: Path, tmp_path: Path) -> None:
    def change(config: Config, arrays: Arrays) -> None:
        config.pop("quantization_config", None)
        config["quantization"] = quantization

    with pytest.raises(ConfigError, match="`quantization` gives no bits|group_size"):
        resolve(open_checkpoint(changed(packed, tmp_path, change)))


def test_settings_of_a_matrix_come_before_the_common_ones() -> None:
    config = {
        "quantization": {
            "bits": 4,
            "group_size": 64,
            "a": {"bits": 8, "group_size": 32},
            "b": False,
        }
    }
    assert (
        quantization_from_config(config, "a").bits,
        quantization_from_config(config, "a").group_size,
    ) == (8, 32)
    assert (
        quantization_from_config(config, "c").bits,
        quantization_from_config(config, "c").group_size,
    ) == (4, 64)
    assert (
        quantization_from_config({"quantization_config": {"bits": 3, "group_size": 128}}, "c").bits
        == 3
    )


@pytest.mark.parametrize("method", ["quark", "aqlm", "bitsandbytes", "compressed-tensors", "hqq"])
@pytest.mark.parametrize("scales", [False, True])
def test_weights_packed_by_others_are_refused_by_name(
    method: str, scales: bool, dense: Path, tmp_path: Path
) -> None:
    def change(config: Config, arrays: Arrays) -> None:
        config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
        del arrays[f"{GATE}.weight"]
        arrays[f"{GATE}.qweight"] = np.zeros((8, 128), np.int32)
        if scales:  # a name that MLX uses too
            arrays[f"{GATE}.scales"] = np.zeros((1, 128), np.float16)

    with pytest.raises(ConfigError, match=f"packed by '{method}'"):
        open_checkpoint(changed(dense, tmp_path, change))


@pytest.mark.parametrize("block", [5, "128", [128], [128, 0], [128, True], {}, [64, 64], None])
def test_blocks_of_float8_are_two_numbers_or_none(block: Any, dense: Path, tmp_path: Path) -> None:
    def change(config: Config, arrays: Arrays) -> None:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}

    folder = changed(dense, tmp_path, change)
    if block in ([64, 64], None):
        open_checkpoint(folder)
        return
    with pytest.raises(ConfigError, match="weight_block_size of float8 must be two"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_rows_of_a_packed_matrix_are_exact_whatever_its_scales(
    dtype: type, bits: int, tmp_path: Path
) -> None:
    make_llama(tmp_path / "dense", dtype=dtype)
    folder = convert(
        tmp_path / "dense", tmp_path / "packed", bits=bits, group_size=32, method="round"
    ).output
    tensor = open_checkpoint(folder).tensors[f"{GATE}.weight"]
    assert isinstance(tensor, QuantizedTensor)
    rows = tensor.read_rows(5, 20)
    assert rows.dtype == tensor.dtype == mx.float32
    weight, scales, biases = (
        np.array(tensor.components[part].read_rows(5, 20))
        for part in ("weight", "scales", "biases")
    )
    stream = np.unpackbits(weight.view(np.uint8), axis=-1, bitorder="little").reshape(15, -1, bits)
    codes = (stream * 2 ** np.arange(bits)).sum(-1)
    wide = [np.repeat(a.astype(np.float64), 32, axis=-1) for a in (scales, biases)]
    wanted = codes * wide[0] + wide[1]
    assert np.abs(np.array(rows) - wanted).max() <= 1e-7
    stored = [tensor.components[part].read_rows(5, 20) for part in ("weight", "scales", "biases")]
    half = tensor.quantization.dequantize(stored[0], stored[1], stored[2], mx.float32)
    assert (np.abs(np.array(half) - wanted).max() > 1e-6) == (dtype == np.float16)


# Names, shapes, types


def drop(*names: str) -> Change:
    return lambda config, arrays: [arrays.pop(name) for name in names]


def put(name: str, array: np.ndarray) -> Change:
    return lambda config, arrays: arrays.update({name: array})


def grow(**settings: int) -> Change:
    return lambda config, arrays: config.update(settings)


def integers(config: Config, arrays: Arrays) -> None:
    arrays[NORM] = arrays[NORM].astype(np.int32)


WRONG: dict[str, tuple[Change, str]] = {
    "missing": (drop(NORM), rf"missing: {NORM}"),
    "several missing": (drop(NORM, f"{GATE}.weight"), rf"missing: {GATE}.weight, {NORM}"),
    "unexpected": (
        put("model.extra.weight", np.zeros(3, np.float32)),
        r"unexpected: model\.extra\.weight",
    ),
    "unexpected bias": (
        put(f"{GATE}.bias", np.eye(1, 128, 127, dtype=np.float32)[0]),
        rf"unexpected: {GATE}\.bias",
    ),
    "shape": (
        put(NORM, np.zeros(63, np.float32)),
        rf"{NORM} has shape \(63,\), but config.json makes it \(64,\)",
    ),
    "axes": (put(NORM, np.zeros((1, 64), np.float32)), rf"{NORM} has shape \(1, 64\)"),
    "transposed": (
        put(f"{GATE}.weight", np.zeros((64, 128), np.float32)),
        rf"{GATE}.weight has shape \(64, 128\)",
    ),
    "integers": (integers, rf"{NORM} is .*int32; float32, float16 and bfloat16"),
    "truths": (put(NORM, np.zeros(64, np.bool_)), rf"{NORM} is .*bool"),
    "float64": (
        put(NORM, np.zeros(64, np.float64)),
        rf"{NORM}': dtype 'F64' is not supported.* F32",
    ),
    "config of a larger model": (
        lambda config, arrays: config.update(num_hidden_layers=3),
        r"missing: model\.layers\.2",
    ),
    "config of a wider model": (grow(hidden_size=128), r"has shape .* makes it"),
}


@pytest.mark.parametrize("what", WRONG)
def test_tensors_that_are_not_those_of_the_config_are_named(
    what: str, dense: Path, tmp_path: Path, reached: list[str]
) -> None:
    change, named = WRONG[what]
    with pytest.raises(CheckpointError, match=named):
        load_model(changed(dense, tmp_path, change))
    assert not reached
    load_model(changed(dense, tmp_path, lambda config, arrays: None))
    assert reached


def test_many_missing_tensors_are_counted(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: .* and \d+ more"):
        load_model(changed(dense, tmp_path, grow(num_hidden_layers=6)))


USELESS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.cos_cached",
    "model.layers.1.self_attn.k_scale",
    "model.layers.1.self_attn.v_proj.output_scale",
    "model.layers.1.self_attn.kv_scale",
    "score.weight",
    "v_head.summary.bias",
    f"{GATE}.bias",
]


@pytest.mark.parametrize("name", USELESS)
def test_what_says_nothing_of_the_numbers_is_left_out_and_named(
    name: str, dense: Path, tmp_path: Path, reached: list[str]
) -> None:
    folder = changed(dense, tmp_path, put(name, np.zeros(8, np.float32)))
    resolved = resolve(open_checkpoint(folder))
    assert list(resolved.ignored) == [name] and name not in resolved.parameters
    assert not reached
    [note] = convert(folder, tmp_path / "out", bits=None).notes
    assert name in note and resolved.ignored[name] in note
    assert name not in open_checkpoint(tmp_path / "out").tensors


# Names of other savers


def renamed(pattern: str, to: str) -> Change:
    def change(config: Config, arrays: Arrays) -> None:
        for name in list(arrays):
            arrays[re.sub(pattern, to, name)] = arrays.pop(name)

    return change


@pytest.mark.parametrize(
    ("pattern", "to"),
    [
        ("^model\\.", ""),  # saved without a head
        ("^(?=model|lm_head)", "language_model."),
        ("^model\\.", "model.language_model."),
        ("^model\\.", "language_model."),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_prefixes_of_other_savers_are_understood(
    pattern: str, to: str, tied: bool, tmp_path: Path
) -> None:
    make_llama(tmp_path / "model", tied=tied)
    wanted = values(tmp_path / "model")
    folder = changed(tmp_path / "model", tmp_path, renamed(pattern, to))
    assert sorted(open_checkpoint(folder).tensors) != sorted(wanted)
    found = values(folder)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def values(folder: Path) -> Arrays:
    parameters = resolve(open_checkpoint(folder)).parameters
    return {name: np.array(tensor.load()) for name, tensor in parameters.items()}


@pytest.mark.parametrize("bits", [None, 4])
def test_a_tied_matrix_may_have_either_name(bits: int | None, tmp_path: Path) -> None:
    make_llama(tmp_path / "model", tied=True)
    source = tmp_path / "model"
    if bits:
        source = convert(source, tmp_path / "packed", bits=bits, method="round").output
    folder = changed(source, tmp_path, renamed("^model.embed_tokens", "lm_head"))
    ids = mx.array([[3, 1, 4, 1, 5]])
    assert np.array_equal(load_model(folder)[0](ids), load_model(source)[0](ids))
    assert resolve(open_checkpoint(folder)).architecture.config.tie_word_embeddings


def test_a_tied_matrix_of_gpt_2_may_be_its_head(tmp_path: Path) -> None:
    def change(found: Config, weights: Arrays) -> None:
        [name] = [name for name in weights if name.endswith("wte.weight")]
        weights["lm_head.weight"] = weights.pop(name)

    assert parity.effect("gpt2", "config.json", change, tmp_path) <= parity.TOLERANCE


def test_a_head_in_the_file_counts_and_a_missing_one_is_the_embedding(
    dense: Path, tmp_path: Path
) -> None:
    def tie(config: Config, arrays: Arrays) -> None:
        config["tie_word_embeddings"] = True

    def tie_and_drop(config: Config, arrays: Arrays) -> None:
        tie(config, arrays)
        del arrays["lm_head.weight"]

    tokens = mx.array([[1, 2, 3]])
    untied = load_model(dense)[0](tokens)
    own, _ = load_model(changed(dense, tmp_path, tie))
    assert mx.array_equal(own(tokens), untied)
    tied, _ = load_model(changed(dense, tmp_path, tie_and_drop))
    assert "lm_head" not in tied
    state = tied.model.norm(tied.hidden_state(tokens))
    assert mx.allclose(tied(tokens), state @ tied.model.embed_tokens.weight.T, atol=1e-5)
    assert not mx.allclose(tied(tokens), untied, atol=1e-2)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_model(changed(dense, tmp_path, drop("lm_head.weight")))


def test_a_head_of_another_vocabulary_is_refused(dense: Path, tmp_path: Path) -> None:
    def change(config: Config, arrays: Arrays) -> None:
        config["tie_word_embeddings"] = True
        arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]

    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(95, 64\)"):
        load_model(changed(dense, tmp_path, change))


def test_a_config_cannot_ask_for_tables_without_end(dense: Path, tmp_path: Path) -> None:
    for settings in (
        {"head_dim": 2**30},
        {"hidden_size": 2**30, "num_attention_heads": 1, "num_key_value_heads": 1},
    ):
        with pytest.raises(ConfigError, match="features; at most"):
            load_model(changed(dense, tmp_path, grow(**settings)))
