"""A real model, SmolLM2-135M-Instruct in float32, against transformers (tests/fixtures/make_smollm2_golden.py)."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from house import THOROUGH
from safetensors import safe_open
from safetensors.numpy import load_file

from mlxarch.blocks import CausalLM
from mlxarch.blocks.linear import Matrix
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.hub import catalog
from mlxarch.loading.load import load_model
from mlxarch.quantize import convert
from mlxarch.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.kernels  # they make it five times faster
FOLDER = Path(__file__).parent / "fixtures" / "smollm2"
STORED = json.loads((FOLDER / "texts.json").read_text())
GOLDEN = load_file(FOLDER / "golden.safetensors")
TOLERANCE = 2e-3  # largest absolute difference of a logit; their standard deviation is 6 to 8
CLEAR = 2 * TOLERANCE  # a best logit that leads by more cannot lose its place within the tolerance
EVERY = 3  # positions whose logits are stored, besides the last
FEW = 8  # rows, as of single steps: their products are left to MLX
PROBE = 16  # tokens of the negative controls: a prefix of a text has the same logits


@pytest.fixture(scope="module")
def model(smollm2: Path) -> CausalLM:
    return load_model(smollm2, dtype="float32")[0]


@pytest.fixture(scope="module")
def quick(smollm2: Path) -> CausalLM:
    """The same; on a CPU NumPy computes its products of many rows, which takes a twentieth of MLX's time there."""
    model = load_model(smollm2, dtype="float32")[0]
    if mx.default_device() == mx.cpu and not THOROUGH:
        for module in model.modules():
            if isinstance(module, Matrix):
                module.matmul = by_numpy(module)
    return model


def by_numpy(matrix: Matrix) -> Callable[..., mx.array]:
    """``Matrix.matmul`` of what the packed weights stand for."""
    usual, form, wide = matrix.matmul, matrix.quantization, dict[int, tuple[Any, np.ndarray]]()
    assert form is not None, "SmolLM2 is packed"

    def product(x: mx.array, arrays: Any = None, transpose: bool = True) -> mx.array:
        rows, parts = x.reshape(-1, x.shape[-1]), matrix if arrays is None else arrays
        if len(rows) < FEW or not transpose:
            return usual(x, arrays, transpose)
        packed = parts["weight"]
        if id(packed) not in wide:
            values = form.dequantize(packed, parts["scales"], parts["biases"], mx.float32)
            wide[id(packed)] = packed, np.array(values)
        return mx.array(np.array(rows) @ wide[id(packed)][1].T).reshape(*x.shape[:-1], -1)

    return product


@pytest.fixture(scope="module")
def logits(model: CausalLM, quick: CausalLM) -> dict[str, np.ndarray]:
    """Logits (L, V) of every text, of the first by MLX's products alone."""
    first, *others = STORED["texts"]
    models = {first: model} | dict.fromkeys(others, quick)
    return {
        name: np.array(models[name](mx.array(GOLDEN[f"{name}.ids"])[None])[0])
        for name in STORED["texts"]
    }


def distance(found: np.ndarray, name: str) -> float:
    """Largest difference from the stored logits, as far as the text was run."""
    length = len(GOLDEN[f"{name}.ids"])
    rows = [i for i in sorted({*range(0, length, EVERY), length - 1}) if i < len(found)]
    return float(
        np.abs(found[rows][:, GOLDEN["columns"]] - GOLDEN[f"{name}.logits"][: len(rows)]).max()
    )


def test_the_golden_numbers_are_those_of_the_weights_and_texts_at_hand() -> None:
    with safe_open(FOLDER / "golden.safetensors", "np") as file:
        metadata = file.metadata()
    assert (
        metadata["texts_sha256"] == hashlib.sha256((FOLDER / "texts.json").read_bytes()).hexdigest()
    )
    assert metadata["gguf_sha256"] in {
        getattr(source, "member_sha256", None) for source in sources()
    }
    assert len(STORED["texts"]) == len(STORED["conversations"]) == 5
    assert all(len(GOLDEN[f"{name}.ids"]) >= 200 for name in STORED["texts"])


def sources() -> tuple[Any, ...]:
    entry = catalog.parse("smollm2-135m").entry
    assert entry is not None
    return tuple(entry.sources)


@pytest.mark.parametrize("name", STORED["texts"])
def test_every_logit_of_a_text_is_that_of_transformers(
    name: str, logits: dict[str, np.ndarray]
) -> None:
    found = logits[name]
    assert distance(found, name) <= TOLERANCE
    # over the whole vocabulary and every position: the best token, and the sum of exponentials
    clear = GOLDEN[f"{name}.margin"] > CLEAR
    assert clear.mean() > 0.95
    assert (found.argmax(-1) == GOLDEN[f"{name}.top"])[clear].all()
    sums = np.logaddexp.reduce(found.astype(np.float64), axis=-1)
    assert np.abs(sums - GOLDEN[f"{name}.lse"]).max() <= TOLERANCE


@pytest.mark.parametrize("number", range(5))
def test_64_greedy_tokens_are_those_of_transformers(
    number: int, model: CausalLM, quick: CausalLM
) -> None:
    model = quick if number else model
    wanted = GOLDEN[f"chat.{number}.generated"].tolist()
    prompt = GOLDEN[f"chat.{number}.ids"].tolist()
    steps = decode(model, Session(model.make_caches()), prompt, Sampling(), len(wanted))
    assert [token for token, _ in steps] == wanted


@pytest.mark.parametrize("name", STORED["texts"])
def test_a_text_becomes_the_tokens_of_the_published_tokenizer(name: str, smollm2: Path) -> None:
    text, ids = STORED["texts"][name], GOLDEN[f"{name}.ids"].tolist()
    tokenizer = Tokenizer.from_folder(smollm2)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("number", range(5))
def test_a_conversation_becomes_the_tokens_of_the_published_template(
    number: int, smollm2: Path
) -> None:
    found = Tokenizer.from_folder(smollm2).apply_chat_template(STORED["conversations"][number])
    assert found == GOLDEN[f"chat.{number}.ids"].tolist()


def other_base(folder: Path) -> None:
    """RoPE turns with another base."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 10_000.0}))


def as_llama_cpp_orders_them(folder: Path) -> None:
    """The rows of the key projections stand as in the GGUF file: neighbours are pairs."""
    for path in folder.glob("*.safetensors"):
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict)
        for name in tensors:
            if ".k_proj." in name:
                heads = mx.unflatten(tensors[name], 0, (3, 2, 32))
                tensors[name] = mx.contiguous(heads.swapaxes(1, 2).flatten(0, 2))
        mx.save_safetensors(str(path), tensors, {"format": "mlx"})


@pytest.mark.parametrize("change", [other_base, as_llama_cpp_orders_them])
def test_a_mistake_in_rope_moves_the_logits(
    change: Callable[[Path], None], smollm2: Path, tmp_path: Path
) -> None:
    convert(smollm2, tmp_path / "changed", bits=None)
    assert distance(probe(tmp_path / "changed"), "prose") <= TOLERANCE
    change(tmp_path / "changed")
    assert distance(probe(tmp_path / "changed"), "prose") >= 100 * TOLERANCE


def test_coarser_quantization_moves_the_logits(smollm2: Path, tmp_path: Path) -> None:
    convert(smollm2, tmp_path / "coarse", bits=4, group_size=64, method="round")
    assert distance(probe(tmp_path / "coarse"), "prose") >= 100 * TOLERANCE


def probe(folder: Path) -> np.ndarray:
    """Logits (PROBE, V) of the beginning of a text."""
    model = load_model(folder, dtype="float32")[0]
    return np.array(model(mx.array(GOLDEN["prose.ids"][:PROBE])[None])[0])
