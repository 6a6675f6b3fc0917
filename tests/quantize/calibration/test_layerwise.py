"""A layer-wise forward pass computes what the model does and observes the inputs of matrices."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxarch.blocks import ForwardContext
from mlxarch.checkpoint.source import open_checkpoint
from mlxarch.loading.load import load_model
from mlxarch.loading.resolve import Resolved, resolve
from mlxarch.quantize.calibration import layerwise
from mlxarch.quantize.calibration.layerwise import LayerwiseModel
from parity import GOLDEN

NAMES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "config.json").is_file())
LENGTH = 24


def opened(name: str) -> Resolved:
    return resolve(open_checkpoint(GOLDEN / name))


def some_tokens(vocabulary: int, batches: int = 2) -> list[mx.array]:
    random = np.random.default_rng(0)
    return [mx.array(random.integers(0, vocabulary, (2, LENGTH))) for _ in range(batches)]


def difference(found: Sequence[mx.array], wanted: Sequence[mx.array]) -> float:
    """The largest, as a share of the largest value."""
    pairs = [(np.array(x), np.array(y)) for x, y in zip(found, wanted, strict=True)]
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def differences(name: str, skip: int | None = None) -> list[float]:
    """Hidden states after each layer, and the logits; ``skip`` leaves a layer out."""
    model, _ = load_model(GOLDEN / name)
    tokens = some_tokens(model.vocab_size)
    contexts = [ForwardContext(LENGTH) for _ in tokens]
    layerwise_model = LayerwiseModel(opened(name), tokens)
    states, own = (
        layerwise_model.embed(),
        [model.embed(batch, context) for batch, context in zip(tokens, contexts, strict=True)],
    )
    found = [difference(states, own)]
    for index, layer in enumerate(model.layers):
        states = states if index == skip else layerwise_model.run_layer(index, states)
        own = [layer(state, context, None) for state, context in zip(own, contexts, strict=True)]
        found.append(difference(states, own))
    return [
        *found,
        difference(layerwise_model.run_head(states), [model.head(state) for state in own]),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_states_behind_every_layer_are_the_models_own(name: str) -> None:
    assert max(differences(name)) < 1e-4


def test_a_layer_that_is_left_out_is_noticed() -> None:
    assert differences("qwen3", skip=1)[2] > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_input_of_every_matrix_is_observed(name: str) -> None:
    resolved, seen = opened(name), dict[str, tuple]()

    def observe(path: str, x: mx.array, chosen: mx.array | None) -> None:
        assert x.shape[-1] == resolved.parameters[path].shape[-1]
        assert chosen is None or chosen.shape == x.shape[:-2]
        seen[path] = x.shape

    layerwise_model = LayerwiseModel(
        resolved, some_tokens(LayerwiseModel(resolved, []).model.vocab_size, 1), observe
    )
    states = layerwise_model.embed()
    for index in range(len(layerwise_model.model.layers)):
        states = layerwise_model.run_layer(index, states)
    layerwise_model.run_head(states, logits=False)
    looked_up = (
        "embed_tokens.weight",
        "embed_tokens_per_layer.weight",
        "ple.table.weight",
        "wpe.weight",
    )  # and not multiplied
    unobserved = {path for path in resolved.matrices - seen.keys() if not path.endswith(looked_up)}
    assert all(path.endswith("embed_q.weight") for path in unobserved), (
        "of this one, the rows are multiplied"
    )


def test_the_inputs_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, path = opened("qwen3"), "model.layers.1.mlp.down_proj"
    inputs: dict[str, np.ndarray] = {}
    tokens = some_tokens(32, 1)
    layerwise_model = LayerwiseModel(
        resolved, tokens, lambda path, x, chosen: inputs.update({path: np.array(x)})
    )
    layerwise_model.run_layer(1, layerwise_model.run_layer(0, layerwise_model.embed()))
    model, _ = load_model(GOLDEN / "qwen3")
    down, own = dict(model.named_modules())[path], []
    usual = down.matmul
    down.matmul = lambda x, arrays: own.append(np.array(x)) or usual(x, arrays)
    model.hidden_state(tokens[0])
    assert np.allclose(inputs[f"{path}.weight"], own[0], rtol=1e-3, atol=1e-4)


def test_rows_of_experts_are_those_that_reach_them() -> None:
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def observe(path: str, x: mx.array, chosen: mx.array | None) -> None:
        if chosen is not None:
            seen[path.split(".")[-2]] = (np.array(x[..., 0, :]), np.array(chosen))

    resolved = opened("qwen3_moe")
    layerwise_model = LayerwiseModel(resolved, some_tokens(32, 1), observe)
    layerwise_model.run_layer(0, layerwise_model.embed())
    experts = open_checkpoint(GOLDEN / "qwen3_moe").config["num_experts_per_tok"]
    gate, chosen = seen["gate_proj"]
    assert len(gate) == 2 * LENGTH * experts == len(chosen)
    assert np.array_equal(chosen, seen["down_proj"][1])
    assert len(np.unique(gate.round(6), axis=0)) == 2 * LENGTH, "each token goes to several experts"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_few_rows_at_a_time_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "CHUNK_BYTES", 1000)
    assert max(differences(name)) < 1e-4


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt2"])
def test_a_layer_can_be_differentiated(name: str) -> None:
    model, _ = load_model(GOLDEN / name)
    tokens = some_tokens(model.vocab_size, 1)
    layerwise_model = LayerwiseModel(opened(name), tokens)
    states = layerwise_model.embed()
    push = mx.random.normal(states[0].shape, key=mx.random.key(1))
    with layerwise_model.loaded_parameters(0):
        _, found = mx.vjp(
            lambda x: layerwise_model.model.layers[0](x, layerwise_model.contexts[0], None),
            states,
            [push],
        )
    _, wanted = mx.vjp(lambda x: model.layers[0](x, ForwardContext(LENGTH), None), states, [push])
    assert difference(found, wanted) < 1e-4
    assert difference(found, [push]) > 1e-2


def test_no_weight_stays_behind() -> None:
    layerwise_model = LayerwiseModel(opened("qwen3"), some_tokens(32, 1))
    before = dict(tree_flatten(layerwise_model.model.parameters()))
    with layerwise_model.loaded_parameters(1):
        inside = {
            name
            for name, value in tree_flatten(layerwise_model.model.parameters())
            if value is not before[name]
        }
    assert inside == {
        path for path in layerwise_model.parameter_paths(1) if path.endswith("norm.weight")
    }
    layerwise_model.run_layer(1, layerwise_model.embed())
    assert all(
        value is before[name] for name, value in tree_flatten(layerwise_model.model.parameters())
    )
