"""Estimates of how long a conversion takes."""

import pytest

from mlxarch.progress import format_duration
from mlxarch.quantize import duration


def test_the_estimate_grows_with_the_model_and_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "_sample_seconds", lambda: 0.3)
    smollm2 = duration.estimate_seconds(134_515_008)
    assert 100 < smollm2 < 200, "164 s were measured"
    assert duration.estimate_seconds(2 * 134_515_008) == pytest.approx(2 * smollm2)
    assert duration.estimate_seconds(134_515_008, "gptq") > 4 * smollm2
    assert duration.estimate_seconds(134_515_008, "round") < smollm2 / 50


def test_the_sample_is_a_real_conversion() -> None:
    assert duration._sample_seconds() > 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12, "12 seconds"),
        (90, "90 seconds"),
        (600, "10 minutes"),
        (7000, "117 minutes"),
        (27_000, "8 hours"),
        (10**6, "12 days"),
    ],
)
def test_a_duration_is_told_in_the_unit_that_suits(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
