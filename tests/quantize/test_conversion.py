"""Folders in, folders out: values, settings, files beside the weights, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import (
    CheckpointError,
    InvalidInput,
    MlxArchError,
    OutputError,
    QuantizationError,
)
from mlxarch.loading.load import load_model
from mlxarch.quantize import Origin, convert, prepare
from mlxarch.quantize.conversion import Limits
from mlxarch.quantize.output.workspace import Workspace
from mlxarch.system.durable_files import Disk
from tiny_llama import INDEX, TOKENIZER, contents, make_llama, save_weights

GATE = "model.layers.0.mlp.gate_proj"
NORM = "model.layers.1.input_layernorm.weight"
rounded = partial(convert, method="round")  # where it does not matter how codes are chosen


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_llama(tmp_path / "source")
    return tmp_path / "source"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def values(folder: Path) -> dict[str, np.ndarray]:
    """Every parameter as floats, the way this package reads it."""
    tensors = open_checkpoint(folder).tensors
    return {
        name: np.array(tensor.load().astype(mx.float32)).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    "bits, group, mode",
    [(8, 64, "affine"), (4, 32, "affine"), (3, 64, "affine"), (4, None, "mxfp4")],
)
def test_what_mlx_reads_from_the_output_is_what_was_packed(
    source: Path, tmp_path: Path, bits: int, group: int | None, mode: str
) -> None:
    summary = convert(
        source, tmp_path / "out", bits=bits, group_size=group, mode=mode, method="round"
    )
    exact, arrays = (
        load_file(source / "model.safetensors"),
        mx.load(str(tmp_path / "out" / "model.safetensors")),
    )
    assert isinstance(arrays, dict)
    settings = config_of(tmp_path / "out")["quantization"]
    assert config_of(tmp_path / "out")["quantization_config"] == settings
    found, matrices = values(tmp_path / "out"), 0
    for name, weight in exact.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in arrays:
            assert np.array_equal(np.array(arrays[name]), weight), name
            continue
        matrices += 1
        packed: Any = [arrays.get(f"{path}.{part}") for part in ("weight", "scales", "biases")]
        by_mlx = mx.dequantize(*packed, **settings, dtype=mx.float32)
        assert np.array_equal(np.array(by_mlx), found[name]), name
        expected = mx.quantize(mx.array(weight), **settings)
        assert np.array_equal(
            np.array(mx.dequantize(*expected, **settings, dtype=mx.float32)), found[name]
        ), name
        assert not np.array_equal(found[name], weight), name
    assert matrices == summary.quantized == 2 + 2 * 7
    assert summary.tensors == len(exact) and summary.notes == []
    assert summary.source_bytes == 4 * sum(weight.size for weight in exact.values())
    assert summary.bits_per_weight == 8 * summary.output_bytes / sum(
        weight.size for weight in exact.values()
    )
    load_model(tmp_path / "out")


def test_chunks_and_files_of_any_size_hold_the_same_weights(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", bits=4)
    small = Limits(chunk_bytes=3000, sync_bytes=5000, shard_bytes=15_000)
    prepare(source, tmp_path / "pieces", bits=4, limits=small).run()
    index = json.loads((tmp_path / "pieces" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    pieces = {
        name: array
        for file in files
        for name, array in load_file(tmp_path / "pieces" / file).items()
    }
    assert whole.keys() == pieces.keys() == index["weight_map"].keys()
    assert all(np.array_equal(whole[name], pieces[name]) for name in whole)
    load_model(tmp_path / "pieces")


def test_two_runs_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "one" / "out")
    os.utime(source / "config.json", (1, 1))
    convert(source, tmp_path / "two" / "anything")
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "anything")
    convert(source, tmp_path / "three" / "out", bits=8)
    assert contents(tmp_path / "one" / "out") != contents(tmp_path / "three" / "out")


def test_many_source_files_make_the_same_weights_as_one(source: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "parts", shards=3)
    convert(source, tmp_path / "a")
    convert(tmp_path / "parts", tmp_path / "b")
    assert (
        contents(tmp_path / "a")["model.safetensors"]
        == contents(tmp_path / "b")["model.safetensors"]
    )


@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_dtype_is_that_of_norms_scales_and_config(
    tmp_path: Path, stored: type, dtype: str | None
) -> None:
    make_llama(tmp_path / "source", dtype=stored)
    convert(
        tmp_path / "source",
        tmp_path / "out",
        dtype=dtype,
        method=None if stored is np.float32 else "round",
    )
    arrays = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(arrays, dict)
    wanted = dtype or np.dtype(stored).name
    assert {str(arrays[name].dtype) for name in (NORM, f"{GATE}.scales", f"{GATE}.biases")} == {
        f"mlx.core.{wanted}"
    }
    assert config_of(tmp_path / "out")["torch_dtype"] == wanted
    assert "dtype" not in config_of(tmp_path / "out")


def test_without_bits_the_copy_is_exact(source: Path, tmp_path: Path) -> None:
    summary = rounded(source, tmp_path / "copy", bits=None)
    assert summary.quantized == 0 and summary.bits_per_weight == 32
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "copy" / "model.safetensors"),
    )
    assert before.keys() == after.keys() and all(
        np.array_equal(before[name], after[name]) for name in before
    )
    assert "quantization" not in config_of(tmp_path / "copy")


def test_packed_parts_are_copied_where_no_bits_or_the_same_are_asked_for(
    source: Path, tmp_path: Path
) -> None:
    rounded(source, tmp_path / "first", bits=3, group_size=32)
    for name, arguments in {"none": {"bits": None}, "same": {"bits": 3, "group_size": 32}}.items():
        rounded(tmp_path / "first", tmp_path / name, **arguments)
        assert (
            contents(tmp_path / name)["model.safetensors"]
            == contents(tmp_path / "first")["model.safetensors"]
        )
        assert config_of(tmp_path / name) == config_of(tmp_path / "first")


def test_a_quantized_source_is_unpacked_and_packed_again(source: Path, tmp_path: Path) -> None:
    rounded(source, tmp_path / "eight", bits=8)
    summary = convert(tmp_path / "eight", tmp_path / "four", bits=4, method="round")
    assert any("16 matrices of the source were quantized already" in note for note in summary.notes)
    eight, four = values(tmp_path / "eight"), values(tmp_path / "four")
    name = f"{GATE}.weight"
    expected = mx.dequantize(
        *mx.quantize(mx.array(eight[name]), group_size=64, bits=4), group_size=64, bits=4
    )
    assert np.array_equal(four[name], np.array(expected))
    assert not np.array_equal(four[name], eight[name])


def test_rows_that_no_group_divides_stay_and_the_output_loads(tmp_path: Path) -> None:
    make_llama(tmp_path / "source", hidden=48, inner=96)
    summary = rounded(tmp_path / "source", tmp_path / "out", bits=4)
    assert summary.quantized == 2  # the down projections, whose rows have 96 elements
    assert len(summary.notes) == 2
    section = config_of(tmp_path / "out")["quantization"]
    assert section["lm_head"] is False and section["group_size"] == 32
    model, _ = load_model(tmp_path / "out")
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 96)


def test_a_head_of_its_own_beside_a_tied_config_stays(tmp_path: Path) -> None:
    make_llama(tmp_path / "source", tied=False)
    config = config_of(tmp_path / "source") | {"tie_word_embeddings": True}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    rounded(tmp_path / "source", tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False


def test_tokenizer_and_licence_are_carried_along_and_code_is_not(
    source: Path, tmp_path: Path
) -> None:
    for name in ("modeling.py", "pytorch_model.bin", "weights.pkl", "tokenizer.py"):
        (source / name).write_text("import os")
    (source / "LICENSE.txt").write_text("Do what you like")
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\npipeline_tag: chat\nx: $(y)\n---\n# Hello\n"
    )
    rounded(source, tmp_path / "out")
    expected = {
        *TOKENIZER,
        "LICENSE.txt",
        "README.md",
        "config.json",
        "model.safetensors",
        "receipt.json",
    }
    assert contents(tmp_path / "out").keys() == expected
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: mlx\nlicense: apache-2.0\npipeline_tag: chat\ntags:\n- mlx\n---\n"
    )
    assert (
        "# source-4bit" in card
        and "quantized to 4 bits, groups of 64, affine" in card
        and "Hello" not in card
    )
    assert str(tmp_path) not in card


def test_the_card_names_repository_and_revision_of_a_hub_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--maker--Tiny-1B" / "snapshots" / ("0a" * 20)
    make_llama(snapshot)
    rounded(snapshot, tmp_path / "out", dtype="bfloat16")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "base_model: maker/Tiny-1B\n" in card and f"maker/Tiny-1B at revision {'0a' * 20}" in card
    )
    assert "the rest in bfloat16" in card


def test_a_source_that_is_no_folder_can_be_converted(source: Path, tmp_path: Path) -> None:
    convert(
        open_checkpoint(source),
        tmp_path / "out",
        origin=Origin("maker/thing", fields=(("license", "mit"),)),
    )
    convert(source, tmp_path / "other")
    assert (
        contents(tmp_path / "out")["model.safetensors"]
        == contents(tmp_path / "other")["model.safetensors"]
    )
    assert "license: mit\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_output_has_a_name_by_default(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        prepare("source", bits=bits, mode=mode, dtype=dtype).output
        for bits, mode, dtype in (
            (4, "affine", None),
            (4, "mxfp4", None),
            (None, "", None),
            (None, "", "float16"),
        )
    ]
    assert names == [
        tmp_path / f"source-{suffix}" for suffix in ("4bit", "mxfp4", "copy", "float16")
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [f"{GATE}.weight", NORM])
@pytest.mark.parametrize("bits", [4, None])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, bad: float, name: str, bits: int | None
) -> None:
    weights = make_llama(tmp_path / "source")
    weights[name].flat[-7] = bad
    save_weights(tmp_path / "source", weights)
    with pytest.raises(QuantizationError, match=f"tensor {name} holds NaN or infinity"):
        prepare(
            tmp_path / "source", tmp_path / "out", bits=bits, limits=Limits(chunk_bytes=8192)
        ).run()  # a fourth of it
    assert [path.name for path in tmp_path.iterdir()] == ["source"], (
        "nothing is there that could be gone on with"
    )


@pytest.mark.parametrize("name", [f"{GATE}.weight", NORM])
def test_a_weight_too_large_for_the_dtype_is_refused_by_name(tmp_path: Path, name: str) -> None:
    weights = make_llama(tmp_path / "source")
    weights[name].flat[3] = 1e6
    save_weights(tmp_path / "source", weights)
    with pytest.raises(
        QuantizationError,
        match=f"tensor {name.removesuffix('weight')}.* too large .* choose bfloat16",
    ):
        convert(tmp_path / "source", tmp_path / "out", dtype="float16")
    rounded(tmp_path / "source", tmp_path / "out", dtype="bfloat16")


def test_unknown_dtypes_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="dtype 'int8' is none of float32, float16, bfloat16"):
        rounded(source, tmp_path / "out", dtype="int8")


def test_an_existing_output_is_refused_and_replaced_by_force(source: Path, tmp_path: Path) -> None:
    rounded(source, tmp_path / "out", bits=8)
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError, match=r"out exists already; .* --force"):
        rounded(source, tmp_path / "out", bits=4)
    assert contents(tmp_path / "out") == before
    rounded(source, tmp_path / "out", bits=4, force=True)
    rounded(source, tmp_path / "fresh", bits=4)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out", "source"]


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_force_replaces_nothing_but_models(
    source: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match="holds no model"):
        rounded(source, tmp_path / "out", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert "mine" in {
        p.read_text() for p in (tmp_path / "out", tmp_path / "out" / "thesis.txt") if p.is_file()
    }


def test_force_replaces_a_link_and_not_what_it_leads_to(source: Path, tmp_path: Path) -> None:
    rounded(source, tmp_path / "elsewhere", bits=8)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="exists already"):
        rounded(source, tmp_path / "out")
    rounded(source, tmp_path / "out", force=True)
    assert contents(tmp_path / "elsewhere") == before and not (tmp_path / "out").is_symlink()


def test_the_source_is_never_its_own_output(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    (tmp_path / "alias").symlink_to(source)
    for output in (source, tmp_path, tmp_path / "alias"):
        with pytest.raises(OutputError, match="holds the source"):
            rounded(source, output, force=True)
    assert contents(source) == before


def test_a_source_that_changes_meanwhile_is_noticed(source: Path, tmp_path: Path) -> None:
    def touch(label: str, done: int, total: int) -> None:
        os.utime(source / "model.safetensors", (done, done))

    with pytest.raises(CheckpointError, match="was changed, replaced or removed"):
        convert(source, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_only_looks_like_unfinished_work_is_left_alone(
    source: Path, tmp_path: Path
) -> None:
    make_folder(tmp_path / "out.partial")
    (tmp_path / "out.partial" / "model").mkdir()
    with pytest.raises(OutputError, match=r"out.partial is in the way"):
        rounded(source, tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_a_tokenizer_file_that_leads_elsewhere_is_not_copied(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        rounded(source, tmp_path / "out")


def test_of_two_on_one_output_the_second_is_refused(source: Path, tmp_path: Path) -> None:
    with (
        Workspace(tmp_path / "out", Disk()),
        pytest.raises(OutputError, match="another process is writing .*out; wait for it"),
    ):
        rounded(source, tmp_path / "out")
    rounded(source, tmp_path / "out")


def test_an_output_below_a_file_is_an_output_error(source: Path, tmp_path: Path) -> None:
    make_file(tmp_path / "file")
    with pytest.raises(MlxArchError, match="could not be written"):
        rounded(source, tmp_path / "file" / "out")


def test_progress_counts_source_bytes_up_to_all_of_them(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    summary = prepare(source, tmp_path / "out", limits=Limits(chunk_bytes=1000)).run(
        progress=lambda label, done, total: seen.append((label, done, total))
    )
    done = [count for label, count, _ in seen if label == "quantizing"]
    assert done == sorted(done) and done[0] == 0 and done[-1] == summary.source_bytes
    labels = {
        (label, total) for label, _, total in seen if label not in ("measuring", "writing passages")
    }
    assert labels == {
        (name, summary.source_bytes) for name in ("quantizing", "gathering statistics")
    }
    assert len(seen) > 50


def test_mlx_may_keep_as_much_freed_memory_afterwards_as_before(
    source: Path, tmp_path: Path
) -> None:
    before = mx.set_cache_limit(77 << 20)
    try:
        rounded(source, tmp_path / "out")
        assert mx.set_cache_limit(77 << 20) == 77 << 20
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(KeyboardInterrupt):
            rounded(source, tmp_path / "out", progress=interrupt)
        assert mx.set_cache_limit(77 << 20) == 77 << 20
    finally:
        mx.set_cache_limit(before)


def interrupt(label: str, done: int, total: int) -> None:
    raise KeyboardInterrupt
