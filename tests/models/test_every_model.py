"""Properties of every architecture: left-padded batches, and quantized copies of every reference checkpoint."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from house import THOROUGH

import parity
from mlxarch.blocks import CausalLM
from mlxarch.blocks.linear import Embedding, Matrix
from mlxarch.loading.load import load_model
from mlxarch.quantize import convert

NAMES = sorted(
    folder.name for folder in parity.GOLDEN.iterdir() if (folder / "reference.safetensors").exists()
)
GROUP = 32
TYPES = {
    json.loads((parity.GOLDEN / n / "config.json").read_text())["model_type"]: n
    for n in reversed(NAMES)
}
SEARCHED = set(
    NAMES if THOROUGH else TYPES.values()
)  # the first of each type; the codes of the others are rounded


def tokens(name: str) -> list[int]:
    return parity.reference(name)["input_ids"][0].tolist()


def distance(difference: mx.array) -> float:
    return float(np.abs(np.array(difference)).max())


def batch(model: CausalLM, ids: mx.array, padding: list[int] | None, more: list[int]) -> mx.array:
    """Logits of a batch: two chunks of the prompts, then one token after the other."""
    caches = model.make_caches(padding=padding)
    steps = [ids[:, :17], ids[:, 17:], *(mx.array([[token]] * len(ids)) for token in more)]
    return mx.concatenate([model(step, caches) for step in steps], axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch_gives_each_row_its_own_logits(name: str, tmp_path: Path) -> None:
    model, _ = load_model(parity.copy(name, "config.json", tmp_path), dtype="float32")
    ids, more = tokens(name), parity.reference(name)["generated"][0, :12].tolist()
    rows = [ids[:20], ids[5:], ids[:3], ids[2:31]]
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    padded = mx.array([[0] * pad + row for pad, row in zip(padding, rows, strict=True)])
    together = batch(model, padded, padding, more)
    for index, row in enumerate(rows):
        alone = model(mx.array([row + more]))[0]
        assert distance(together[index, padding[index] :] - alone) <= 1e-4
    # negative control: with the padding taken for text, the short rows change
    wrong = batch(model, padded, None, more)
    assert distance(wrong[2, padding[2] :] - together[2, padding[2] :]) > 1e-2


def twin_of(model: CausalLM) -> None:
    """Put the values that a packed matrix stands for in its place."""
    for _, module in model.named_modules():
        if isinstance(module, Matrix) and module.quantization is not None:
            dtype = module.dtype if isinstance(module, Embedding) else mx.float32
            module.weight = module.quantization.dequantize(
                module["weight"], module["scales"], module.get("biases"), dtype
            )
            module.quantization = None
            for part in ("scales", "biases"):
                module.pop(part, None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_quantized_copy_computes_what_its_weights_stand_for(
    name: str, bits: int, tmp_path: Path
) -> None:
    source = parity.copy(name, "config.json", tmp_path)
    target = tmp_path / "quantized"
    method = None if bits == 4 and name in SEARCHED else "round"
    summary = convert(source, target, bits=bits, group_size=GROUP, method=method)
    assert summary.quantized > 0
    ids = mx.array([tokens(name)])
    model, config = load_model(target, dtype="float32")
    assert config["quantization"]["bits"] == bits
    packed = model(ids)
    caches = model.make_caches()
    model(ids[:, :30], caches)
    assert distance(model(ids[:, 30:], caches) - packed[:, 30:]) <= 1e-4
    twin, _ = load_model(target, dtype="float32")
    twin_of(twin)
    assert distance(twin(ids) - packed) <= 2e-4
    # negative control: quantizing is not for nothing, the original's logits are others
    assert distance(packed - mx.array(parity.reference(name)["logits"])) > 1e-3
