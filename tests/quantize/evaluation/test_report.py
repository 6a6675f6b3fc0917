"""Text forms of an evaluation."""

from types import SimpleNamespace
from typing import cast

from mlxarch.quantize.evaluation.evaluate import Evaluation
from mlxarch.quantize.evaluation.report import ranking_table
from mlxarch.quantize.evaluation.statistics import Estimate


def test_models_are_ranked_by_divergence_or_by_perplexity() -> None:
    def evaluated(name: str, perplexity: float, kl: float | None) -> Evaluation:
        figures = SimpleNamespace(
            perplexity=Estimate(perplexity, None),
            kl_mean=None if kl is None else Estimate(kl, 0.0005),
        )
        size = SimpleNamespace(bytes=10**8)
        return cast(Evaluation, SimpleNamespace(model=name, all=figures, size=size))

    with_original = [
        evaluated("a", 5.0, 0.2),
        evaluated("b", 9.0, 0.001),
        evaluated("c", 7.0, 0.02),
    ]
    header, *rows = ranking_table(with_original)
    assert header[3:] == ["KL mean", "in practice"]
    assert [row[:2] for row in rows] == [["1.", "b"], ["2.", "c"], ["3.", "a"]]
    assert "no difference" in rows[0][-1] and "clearly worse" in rows[2][-1]
    header, *rows = ranking_table([evaluated("a", 9.0, None), evaluated("b", 5.0, None)])
    assert header[3:] == ["perplexity"] and [row[1] for row in rows] == ["b", "a"]
