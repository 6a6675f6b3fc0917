"""Parameters that ``compare`` counts, against the published numbers.

``fixtures/published_configs.json`` has the sizes of published models, as transformers' config
classes have them by default, without keys that change no shape.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxarch.inspection.structure import structure_from_config

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "published_configs.json").read_text()
)
PUBLISHED = {  # of the text model, in billions
    "bailing_hybrid": 124.4,  # Ling 3 flash
    "ernie4_5_moe": 21.8,  # ERNIE 4.5 21B-A3B
    "glm_moe_dsa": 744,  # GLM-5
    "kimi_linear": 49.1,  # Kimi Linear 48B-A3B
    "laguna": 33.2,  # Laguna XS
    "lfm2": 2.7,  # LFM2.5 2.6B
    "mimo_v2_flash": 308.8,  # MiMo V2 Flash
    "minimax_m2": 228.7,  # MiniMax M2
    "mistral4": 119,  # Mistral Small 4
    "phi3": 3.82,  # Phi-3 mini
    "qwen3_5": 9.0,  # Qwen3.5 9B
    "qwen3_5_moe": 34.7,  # Qwen3.5 35B-A3B
    "qwen3_next": 79.7,  # Qwen3-Coder-Next
    "step3p7": 195.3,  # Step 3.7 Flash
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str) -> None:
    counted = structure_from_config(CONFIGS[name]).parameters / 1e9
    assert counted == pytest.approx(PUBLISHED[name], rel=0.01)


def test_a_layer_more_would_show() -> None:
    config = CONFIGS["minimax_m2"]
    more = config | {"num_hidden_layers": config["num_hidden_layers"] + 1}
    counted = structure_from_config(more).parameters / 1e9
    assert counted != pytest.approx(PUBLISHED["minimax_m2"], rel=0.01)
