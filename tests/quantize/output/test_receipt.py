"""The receipt of a conversion: true, the same every time, and written even where the result cannot be judged."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_chat import make_chat_model

from faulty_disk import FaultyDisk
from mlxarch.checkpoint.receipt import RECEIPT_FILE, read_receipt
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.errors import CheckpointError
from mlxarch.quantize import Origin, convert, prepare
from mlxarch.quantize.conversion import Limits
from mlxarch.quantize.evaluation.evaluate import EvaluationSettings, evaluate
from mlxarch.quantize.output import receipt
from mlxarch.store.verify import verify
from tiny_llama import contents, make_llama


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own, and few tokens."""
    monkeypatch.setenv("MLXARCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(receipt, "EVALUATION_SETTINGS", EvaluationSettings(tokens=60, context=30))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_chat_model(tmp_path_factory.mktemp("models") / "tiny")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 8
    save_file(weights, folder / "model.safetensors")
    return folder


def receipt_of(folder: Path) -> dict[str, Any]:
    found = read_receipt(folder)
    assert found is not None
    return found


def test_it_says_what_was_done_and_with_what(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", bits=4, method="round")
    found = receipt_of(tmp_path / "out")
    page = (Path(__file__).parents[3] / "docs" / "receipt.md").read_text()
    assert all(f"| `{key}` |" in page for key in found), "every key is documented"
    assert found["format"] == 1 and found["method"].startswith("quantized to 4 bits")
    assert found["source"] == {
        "name": "tiny",
        "revision": None,
        "files": {"model.safetensors": contents(source)["model.safetensors"]},
    }
    assert set(found["versions"]) == {"mlxarch", "mlx"}
    everything = contents(tmp_path / "out")
    assert found["files"] == {
        name: digest for name, digest in everything.items() if name != RECEIPT_FILE
    }
    assert (found["evaluation"], found["not_evaluated"]) == (None, "it was not asked for")


@pytest.mark.parametrize("bits, chunk", [(4, 8 << 20), (4, 3000), (2, 8 << 20)])
def test_the_error_of_each_tensor_is_what_is_lost_in_the_file(
    source: Path, tmp_path: Path, bits: int, chunk: int
) -> None:
    prepare(source, tmp_path / "out", bits=bits, limits=Limits(chunk_bytes=chunk)).run()
    exact, stored = (
        load_file(source / "model.safetensors"),
        open_checkpoint(tmp_path / "out").tensors,
    )
    tensors = receipt_of(tmp_path / "out")["tensors"]
    assert tensors.keys() == {name for name, weight in exact.items() if weight.ndim == 2}
    for name, facts in tensors.items():
        loaded = np.array(stored[name].load().astype(mx.float32)).reshape(exact[name].shape)
        error = np.square(loaded - exact[name]).sum() / np.square(exact[name]).sum()
        assert facts["error"] == pytest.approx(error, rel=1e-4) and facts["error"] > 0
        assert (facts["bits"], facts["group_size"], facts["mode"]) == (bits, 64, "affine")
        assert facts["bits_per_weight"] == bits + 1, "two float32 for 64 weights"


def test_a_copy_has_a_receipt_too_and_lost_nothing(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", bits=None)
    assert receipt_of(tmp_path / "out")["tensors"] == {} and verify(tmp_path / "out") == []


def test_it_ends_with_an_evaluation_that_can_be_repeated(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "tiny-4bit", bits=4, method="round", evaluate=True)
    found = receipt_of(tmp_path / "tiny-4bit")
    assert found["not_evaluated"] is None
    again = evaluate(tmp_path / "tiny-4bit", source, settings=receipt.EVALUATION_SETTINGS)
    for field, figure in found["evaluation"]["all"].items():
        expected = getattr(again.all, field)
        assert figure == expected if isinstance(figure, int) else True
        if isinstance(figure, dict):
            assert figure["value"] == pytest.approx(expected.value, rel=1e-5), field
    assert found["evaluation"]["all"]["kl_mean"]["value"] > 0
    assert (found["evaluation"]["model"], found["evaluation"]["against"]) == ("tiny-4bit", "tiny")
    card = (tmp_path / "tiny-4bit" / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("| KL mean |")]
    assert f"{again.all.kl_mean.value:.4f}" in line if again.all.kl_mean else False
    assert verify(tmp_path / "tiny-4bit") == []


def test_the_same_call_writes_the_same_bytes_whatever_was_read_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "one" / "out", method="round", evaluate=True)
    convert(
        source, tmp_path / "two" / "other", method="round", evaluate=True
    )  # what the original said is known now
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "other")
    assert str(tmp_path) not in (tmp_path / "one" / "out" / RECEIPT_FILE).read_text()
    convert(source, tmp_path / "three", bits=3, method="round", evaluate=True)
    assert (
        contents(tmp_path / "one" / "out")[RECEIPT_FILE]
        != contents(tmp_path / "three")[RECEIPT_FILE]
    )


def test_a_run_that_goes_on_writes_the_receipt_of_an_undisturbed_one(
    source: Path, tmp_path: Path
) -> None:
    limits = Limits(chunk_bytes=16_000, sync_bytes=6_000, shard_bytes=14_000)
    prepare(source, tmp_path / "whole", limits=limits).run(evaluate=True)

    def fault(number: int, name: str) -> None:
        if number == 60:
            raise OSError(5, "Input/output error")

    from mlxarch.errors import OutputError

    with pytest.raises(OutputError):
        prepare(source, tmp_path / "torn", limits=limits, disk=FaultyDisk(fault)).run(evaluate=True)
    done = json.loads((tmp_path / "torn.partial" / "journal").read_text().splitlines()[1])
    assert any(done.values()), "something is taken from the journal"
    prepare(source, tmp_path / "torn", limits=limits).run(evaluate=True)
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def test_what_cannot_be_judged_is_made_all_the_same_and_says_why(tmp_path: Path, caplog) -> None:
    make_llama(tmp_path / "mute")  # its tokenizer files hold nothing
    convert(tmp_path / "mute", tmp_path / "out", method="round", evaluate=True)
    found = receipt_of(tmp_path / "out")
    assert found["evaluation"] is None and "tokenizer.json" in found["not_evaluated"]
    assert str(tmp_path) not in found["not_evaluated"] and "not evaluated" in caplog.text
    assert verify(tmp_path / "out") == []


def test_a_model_of_a_short_context_is_judged_within_it(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "short", context=16)
    convert(tmp_path / "short", tmp_path / "out", method="round", evaluate=True)
    found = receipt_of(tmp_path / "out")
    assert found["not_evaluated"] is None and found["evaluation"]["settings"]["context"] == 16


def test_a_memory_that_is_full_undoes_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(receipt, "evaluate", fails)
    convert(source, tmp_path / "out", method="round", evaluate=True)
    assert receipt_of(tmp_path / "out")["not_evaluated"] == "MemoryError"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(receipt, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "other", method="round", evaluate=True)
    assert not (tmp_path / "other").exists(), "a person who stops it wants it stopped"


def test_hashes_that_the_hub_states_are_taken(source: Path, tmp_path: Path) -> None:
    origin = Origin("org/tiny", "a" * 40, files=(("model.safetensors", "b" * 64),))
    convert(source, tmp_path / "out", method="round", origin=origin)
    assert receipt_of(tmp_path / "out")["source"] == {
        "name": "org/tiny",
        "revision": "a" * 40,
        "files": {"model.safetensors": "b" * 64},
    }


# Afterwards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Path:
    convert(source, tmp_path / "made", method="round")
    assert verify(tmp_path / "made") == []
    return tmp_path / "made"


def test_every_file_that_changed_is_named(made: Path) -> None:
    names = sorted(path.name for path in made.iterdir() if path.name != RECEIPT_FILE)
    for name in names:
        data = (made / name).read_bytes()
        (made / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert verify(made) == [f"{name} has changed"]
        (made / name).unlink()
        assert verify(made) == [f"{name} is missing"]
        (made / name).write_bytes(data)
    assert len(names) >= 4 and verify(made) == []


def test_a_file_that_was_not_there_is_named_and_litter_is_not(made: Path) -> None:
    (made / ".DS_Store").write_text("x")
    assert verify(made) == []
    (made / "modeling.py").write_text("import os")
    (made / "more").mkdir()
    assert verify(made) == ["modeling.py was not there", "more was not there"]
    (made / "config.json").unlink()
    (made / "config.json").mkdir()
    assert "config.json is missing" in verify(made)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {}, "files": {}}']
)
def test_a_damaged_receipt_is_refused(made: Path, text: str) -> None:
    (made / RECEIPT_FILE).write_text(text)
    with pytest.raises(CheckpointError):
        verify(made)
    with pytest.raises(CheckpointError):
        read_receipt(made)


def test_a_folder_without_a_receipt_cannot_be_verified(source: Path, made: Path) -> None:
    assert read_receipt(source) is None
    with pytest.raises(CheckpointError, match=r"has no receipt\.json"):
        verify(source)
    shutil.rmtree(made)
    with pytest.raises(CheckpointError):
        verify(made)
