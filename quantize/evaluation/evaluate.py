"""Evaluation of a model: perplexity, and KL divergence from the original it was made from."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxarch.errors import InvalidInput, NonFiniteLogits
from mlxarch.progress import Progress, silent
from mlxarch.quantize.calibration.texts import (
    Passage,
    Text,
    bundled_texts,
    decode_with_context,
    tokenize_passages,
)
from mlxarch.quantize.evaluation import reference_cache
from mlxarch.quantize.evaluation.eval_model import EvalModel, ModelSize
from mlxarch.quantize.evaluation.kl_divergence import (
    Comparison,
    ReferenceDistributions,
    compare_with_reference,
    concatenate,
    kl_error_bound,
    summarize_reference,
)
from mlxarch.quantize.evaluation.logits import LogitsBlock, passage_logits
from mlxarch.quantize.evaluation.statistics import (
    Metrics,
    comparison_metrics,
    perplexity_metrics,
)
from mlxarch.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# the mean KL counts as precise once its error bound is below the larger of the two
RELATIVE_KL_ERROR = 0.01  # of the mean KL
NEGLIGIBLE_KL = 1e-6  # nats per token: less than the KL between two roundings of one model
MAX_REFERENCE_BYTES = 1 << 30  # of the most likely tokens kept of the original's distributions
WORST_TOKENS = 10  # reported


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings that the metrics depend on, besides the models and the texts.

    Attributes:
        tokens: maximum number of tokens read of each text.
        context: tokens per window; windows are read independently.
        seed: random seed of the tokens sampled from the original's distributions.
        kept: number of most likely tokens kept of each of the original's distributions; an
            evaluation increases it until the mean KL is precise enough.
        draws: number of tokens sampled from the rest of each distribution.
    """

    tokens: int = 512
    context: int = 256
    seed: int = 0
    kept: int = 2048
    draws: int = 64


@dataclass(frozen=True)
class WorstToken:
    """A token at which the model diverges most from its original.

    Attributes:
        text: name of the text.
        position: number of tokens before it in the text.
        before, token, after: the token and the text around it.
        kl: KL(original || model) of the distributions that predict it, in nats.
        expected, original_expected: the most likely token of the model and of the original.
    """

    text: str
    position: int
    before: str
    token: str
    after: str
    kl: float
    expected: str
    original_expected: str


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate``; docs/evaluation.md describes it as JSON.

    Attributes:
        model, against: names of the model and of its original, if there is one.
        all: metrics over the tokens of all texts.
        domains: the same metrics for each text by name.
        worst: the tokens with the largest KL divergence, largest first; empty without an original.
        size, original_size: sizes of the weights of both.
        texts: SHA-256 of each text by name.
        settings: settings as used; ``kept`` may be larger than requested.
        versions: versions of the packages that computed the metrics.
    """

    model: str
    against: str | None
    all: Metrics
    domains: dict[str, Metrics]
    worst: list[WorstToken]
    size: ModelSize
    original_size: ModelSize | None
    texts: dict[str, str]
    settings: EvaluationSettings
    versions: dict[str, str]


def evaluate(
    model: str | Path | EvalModel,
    against: str | Path | EvalModel | None = None,
    *,
    texts: Sequence[Text] | None = None,
    settings: EvaluationSettings | None = None,
    batch: int = 8,
    progress: Progress = silent,
) -> Evaluation:
    """Measure perplexity and, given the original, KL(original || model) in nats per token.

    One layer of one model is in memory at a time, so neither model has to fit. The original is read
    first; a summary of its next-token distributions is kept on disk and reused for other variants
    of it. Everything is computed in float32. A model compared with itself has a KL of exactly 0.

    Args:
        model: folder that ``load_model`` accepts.
        against: folder of the original; None measures perplexity only.
        texts: evaluation texts; None takes those of this package.
        settings: numbers of tokens and precision; None takes the defaults.
        batch: windows computed at once; affects speed and memory, not the result.
        progress: called with the bytes of weights read so far.

    Raises:
        InvalidInput: a setting is out of range, a text is too short, or the vocabularies differ.
        CheckpointError, ConfigError, TokenizerError: a folder is not a sound checkpoint.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    settings = settings or EvaluationSettings()
    texts = bundled_texts() if texts is None else texts
    _check_settings(settings, batch)
    subject = _as_eval_model(model)
    original = None if against is None else _as_eval_model(against)
    if original is not None:
        _check_vocabularies(subject, original)
    read = tokenize_passages(texts, subject.tokenizer, settings.tokens, settings.context)
    run = _EvaluationRun(read, settings, batch, progress)
    row_ranges = [slice(None), *_passage_rows(read)]
    worst: list[WorstToken] = []
    if original is None:
        nll = np.concatenate(
            [_negative_log_likelihood(block) for block in run.logits(subject, "reading")]
        )
        metrics = [perplexity_metrics(nll[rows]) for rows in row_ranges]
    else:
        reference, comparison = run.compare(subject, original)
        metrics = [_metrics_of_rows(comparison, reference, rows) for rows in row_ranges]
        worst = _worst_tokens(comparison, reference, read, subject.tokenizer)
    return Evaluation(
        model=subject.name,
        against=original.name if original else None,
        all=metrics[0],
        domains=dict(zip([each.text.name for each in read], metrics[1:], strict=True)),
        worst=worst,
        size=subject.size,
        original_size=original.size if original else None,
        texts={text.name: text.sha256 for text in texts},
        settings=run.settings,
        versions={package: version(package) for package in ("mlxarch", "mlx", "numpy")},
    )


class _EvaluationRun:
    """Runs models over the passages; increases ``settings.kept`` until the KL is precise."""

    def __init__(
        self,
        read: list[Passage],
        settings: EvaluationSettings,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self.read = read
        self.settings = settings
        self.batch_size = batch_size
        self.progress = progress

    def logits(self, model: EvalModel, label: str) -> Iterator[LogitsBlock]:
        """Logits of a model for all passages, in blocks."""
        try:
            with model.open_weights() as resolved:
                yield from passage_logits(
                    resolved, self.read, self.batch_size, self.progress, label
                )
        except NonFiniteLogits as error:
            raise NonFiniteLogits(f"{model.name}: {error}") from error

    def compare(
        self, model: EvalModel, original: EvalModel
    ) -> tuple[ReferenceDistributions, Comparison]:
        """Compare a model with its original until the mean KL is precise enough."""
        while True:
            reference = self._reference_distributions(original)
            parts = []
            for block in self.logits(model, "reading"):
                last_row = block.first_row + len(block.targets)
                rows = reference.rows(block.first_row, last_row)
                parts.append(compare_with_reference(rows, block.logits, block.targets))
            comparison = concatenate(parts)
            tolerance = max(RELATIVE_KL_ERROR * comparison.kl.mean(), NEGLIGIBLE_KL)
            if reference.complete or kl_error_bound(comparison) <= tolerance:
                return reference, comparison
            more = 8 * self.settings.kept
            if 8 * len(reference.top_token) * min(more, model.vocab_size) > MAX_REFERENCE_BYTES:
                logger.warning(
                    "the mean divergence is known to %.1g nats only: take fewer tokens",
                    kl_error_bound(comparison),
                )
                return reference, comparison
            self.settings = replace(self.settings, kept=more)
            logger.info(
                "the mean divergence is not precise enough; keeping %d tokens of each distribution",
                more,
            )

    def _reference_distributions(self, original: EvalModel) -> ReferenceDistributions:
        """Load the original's distributions from the cache, or compute and cache them."""
        settings = self.settings
        key = reference_cache.cache_key(
            {
                "model": original.content_hash(),
                "windows": [passage.windows for passage in self.read],
                "device": str(mx.default_device()),
                "mlx": version("mlx"),
                "kept": settings.kept,
                "draws": settings.draws,
                "seed": settings.seed,
            }
        )
        cached = reference_cache.load(key)
        if cached is not None:
            return cached
        parts = [
            summarize_reference(
                block.logits,
                block.targets,
                settings.kept,
                settings.draws,
                settings.seed,
                block.first_row,
            )
            for block in self.logits(original, "reading the original")
        ]
        reference = concatenate(parts)
        reference_cache.store(key, reference)
        return reference


def _as_eval_model(model: str | Path | EvalModel) -> EvalModel:
    return model if isinstance(model, EvalModel) else EvalModel.from_folder(model)


def _negative_log_likelihood(block: LogitsBlock) -> np.ndarray:
    """-log q of the tokens that follow, (R,), in float64."""
    logits = block.logits.astype(np.float64)
    largest = logits.max(-1)
    logsumexp = np.log(np.exp(logits - largest[:, None]).sum(-1)) + largest
    return logsumexp - logits[np.arange(len(logits)), block.targets]


def _metrics_of_rows(
    comparison: Comparison, reference: ReferenceDistributions, rows: slice
) -> Metrics:
    names = comparison.__dataclass_fields__
    selected = Comparison(*(getattr(comparison, name)[rows] for name in names))
    return comparison_metrics(selected, reference.nll[rows], reference.top_token[rows])


def _passage_rows(read: list[Passage]) -> list[slice]:
    """The range of predicted tokens of each passage among those of all passages."""
    ends = np.cumsum([len(passage.positions) for passage in read]).tolist()
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def _worst_tokens(
    comparison: Comparison,
    reference: ReferenceDistributions,
    read: list[Passage],
    tokenizer: Tokenizer,
) -> list[WorstToken]:
    """Describe the tokens with the largest KL divergence, largest first."""
    places = [(passage, position) for passage in read for position in passage.positions]
    order = np.argsort(-comparison.kl, kind="stable")[:WORST_TOKENS]

    def decode(token: np.ndarray) -> str:
        return tokenizer.decode([int(token)], skip_special_tokens=False)

    found = []
    for row in order.tolist():
        passage, position = places[row]
        before, token, after = decode_with_context(tokenizer, passage, position)
        found.append(
            WorstToken(
                text=passage.text.name,
                position=position,
                before=before,
                token=token,
                after=after,
                kl=float(comparison.kl[row]),
                expected=decode(comparison.top_token[row]),
                original_expected=decode(reference.top_token[row]),
            )
        )
    return found


def _check_settings(settings: EvaluationSettings, batch: int) -> None:
    smallest = {"tokens": 2, "context": 2, "kept": 1, "draws": 2, "seed": 0, "batch": 1}
    for name, least in smallest.items():
        value = batch if name == "batch" else getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InvalidInput(
                f"{name} must be a whole number of at least {least}, found {value!r}"
            )


def _check_vocabularies(model: EvalModel, original: EvalModel) -> None:
    if model.vocab_size != original.vocab_size:
        raise InvalidInput(
            f"{model.name} has {model.vocab_size} tokens and {original.name} "
            f"{original.vocab_size}, so that their distributions cannot be compared. Compare a "
            "model with its own original"
        )
    ids = model.tokenizer.vocabulary
    original_ids = original.tokenizer.vocabulary
    if ids != original_ids:
        unlike = sorted(
            token
            for token in ids.keys() | original_ids.keys()
            if ids.get(token) != original_ids.get(token)
        )
        first = unlike[0]
        raise InvalidInput(
            f"{model.name} and {original.name} have different vocabularies, so that their "
            f"distributions cannot be compared: {len(unlike)} tokens have another id or none, the "
            f"first is {first!r} ({ids.get(first, 'none')} and {original_ids.get(first, 'none')}). "
            "Compare a model with its own original"
        )
