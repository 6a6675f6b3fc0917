"""How good a model is, by itself or against the one it was made from; see ``evaluate``."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxarch.errors import InvalidInput, NonFiniteLogits
from mlxarch.progress import Progress, silent
from mlxarch.quantize import references
from mlxarch.quantize.corpus import Passage, Text, bundled, passages, surroundings
from mlxarch.quantize.distributions import Comparison, Kept, bound, compare, joined, keep
from mlxarch.quantize.figures import Table, beside, by_itself
from mlxarch.quantize.scoring import Scores, scores
from mlxarch.quantize.subject import Size, Subject
from mlxarch.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PRECISION = 0.01  # of the mean divergence: how far what is not kept of the original may put it off
NOTHING = 1e-6  # nats: less than two roundings of one model differ, so that it need not be known any better
MOST = 1 << 30  # bytes of what is kept
WORST = 10  # tokens that are shown


@dataclass(frozen=True)
class Settings:
    """What the figures depend on besides models and texts.

    Attributes:
        tokens: at most, of each text.
        context: tokens that are read together.
        seed: of the draws.
        kept, draws: of each of the original's distributions: the likeliest tokens, and draws from the others;
            ``kept`` grows until the result is precise.
    """

    tokens: int = 512
    context: int = 256
    seed: int = 0
    kept: int = 2048
    draws: int = 64


@dataclass(frozen=True)
class Place:
    """One token: the text, its position there in tokens, what stands around it, and what each model expected."""

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
        all: over all texts; ``domains`` has each of them.
        worst: the tokens with the largest divergence, if there was an original.
        texts: name -> SHA-256.
    """

    model: str
    against: str | None
    all: Table
    domains: dict[str, Table]
    worst: list[Place]
    size: Size
    original_size: Size | None
    texts: dict[str, str]
    settings: Settings
    versions: dict[str, str]


def evaluate(
    model: str | Path | Subject,
    against: str | Path | Subject | None = None,
    *,
    texts: Sequence[Text] | None = None,
    settings: Settings | None = None,
    batch: int = 8,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity and, against an original, the divergence KL(original || model) in nats per token.

    A layer of one model is in memory at a time, so that neither has to fit. The original is read first, and the
    essential part of its distributions kept (and stored: it need not be read for the next variant). Against itself it
    gives exactly 0. All is computed in float32.

    Args:
        model, against: folders that ``load_model`` takes.
        texts: by default those that come with the package.
        batch: windows that are computed at once; it changes nothing but the speed and the memory.
        progress: told the bytes of weights that have been read.

    Raises:
        InvalidInput: a setting out of range, texts that are too short, or vocabularies that differ.
        CheckpointError, ConfigError, TokenizerError: a folder is not sound.
        NonFiniteLogits: a model's output is NaN or infinite.
    """
    settings, texts = settings or Settings(), bundled() if texts is None else texts
    _check(settings, batch)
    subject, original = _opened(model), None if against is None else _opened(against)
    if original is not None:
        _check_vocabularies(subject, original)
    read = passages(texts, subject.tokenizer, settings.tokens, settings.context)
    reader = _Reader(read, settings, batch, progress)
    worst: list[Place] = []
    if original is None:
        surprise = np.concatenate([_surprise(part) for part in reader.scores(subject, "reading")])
        tables = [by_itself(surprise[rows]) for rows in (slice(None), *_rows(read))]
    else:
        kept, found = reader.compared(subject, original)
        tables = [_table(found, kept, rows) for rows in (slice(None), *_rows(read))]
        worst = _worst(found, kept, read, subject.tokenizer)
    return Evaluation(
        model=subject.name,
        against=original.name if original else None,
        all=tables[0],
        domains={passage.text.name: table for passage, table in zip(read, tables[1:], strict=True)},
        worst=worst,
        size=subject.size,
        original_size=original.size if original else None,
        texts={text.name: text.sha256 for text in texts},
        settings=reader.settings,
        versions={package: version(package) for package in ("mlxarch", "mlx", "numpy")},
    )


class _Reader:
    """Lets models read the passages. ``settings.kept`` is as it had to be."""

    def __init__(self, read: list[Passage], settings: Settings, batch: int, progress: Progress) -> None:
        self.read, self.settings, self.batch, self.progress = read, settings, batch, progress

    def scores(self, subject: Subject, label: str) -> Iterator[Scores]:
        """Of a model, a layer of which is in memory at a time."""
        try:
            with subject.opened() as resolved:
                yield from scores(resolved, self.read, self.batch, self.progress, label)
        except NonFiniteLogits as error:
            raise NonFiniteLogits(f"{subject.name}: {error}") from error

    def compared(self, subject: Subject, original: Subject) -> tuple[Kept, Comparison]:
        """Both models' distributions side by side, precisely enough."""
        while True:
            kept = self._reference(original)
            parts = []
            for part in self.scores(subject, "reading"):
                rows = kept.rows(part.first, part.first + len(part.targets))
                parts.append(compare(rows, part.logits, part.targets))
            found = joined(parts)
            assert isinstance(found, Comparison)
            if kept.whole or bound(found) <= max(PRECISION * found.divergence.mean(), NOTHING):
                return kept, found
            more = 8 * self.settings.kept
            if 8 * len(kept.top) * min(more, subject.vocabulary) > MOST:
                logger.warning("the mean divergence is known to %.1g nats only: take fewer tokens", bound(found))
                return kept, found
            self.settings = replace(self.settings, kept=more)
            logger.info("the estimate is not precise enough: %d tokens are kept now", more)

    def _reference(self, original: Subject) -> Kept:
        name = references.key(
            {
                "model": original.identity(),
                "windows": [passage.windows for passage in self.read],
                "device": str(mx.default_device()),
                "mlx": version("mlx"),
                **{field: getattr(self.settings, field) for field in ("kept", "draws", "seed")},
            }
        )
        if (stored := references.load(name)) is not None:
            return stored
        s, parts = self.settings, []
        for part in self.scores(original, "reading the original"):
            parts.append(keep(part.logits, part.targets, s.kept, s.draws, s.seed, part.first))
        made = joined(parts)
        assert isinstance(made, Kept)
        references.store(name, made)
        return made


def _opened(model: str | Path | Subject) -> Subject:
    return model if isinstance(model, Subject) else Subject.from_folder(model)


def _surprise(part: Scores) -> np.ndarray:
    logits = part.logits.astype(np.float64)
    highest = logits.max(-1)
    total = np.log(np.exp(logits - highest[:, None]).sum(-1)) + highest
    return total - logits[np.arange(len(logits)), part.targets]


def _table(found: Comparison, kept: Kept, rows: slice) -> Table:
    part = Comparison(*(getattr(found, name)[rows] for name in found.__dataclass_fields__))
    return beside(part, kept.surprise[rows], kept.top[rows])


def _rows(read: list[Passage]) -> list[slice]:
    ends = np.cumsum([len(passage.positions) for passage in read]).tolist()
    return [slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]


def _worst(found: Comparison, kept: Kept, read: list[Passage], tokenizer: Tokenizer) -> list[Place]:
    places = [(passage, position) for passage in read for position in passage.positions]
    order = np.argsort(-found.divergence, kind="stable")[:WORST]
    chosen = []
    for row in order.tolist():
        passage, position = places[row]
        before, token, after = surroundings(tokenizer, passage, position)
        expected, others = (
            tokenizer.decode([int(top[row])], skip_special_tokens=False) for top in (found.top, kept.top)
        )
        kl = float(found.divergence[row])
        chosen.append(Place(passage.text.name, position, before, token, after, kl, expected, others))
    return chosen


def _check(settings: Settings, batch: int) -> None:
    least = {"tokens": 2, "context": 2, "kept": 1, "draws": 2, "seed": 0}
    given = {name: getattr(settings, name) for name in least} | {"batch": batch}
    for name, value in given.items():
        low = least.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise InvalidInput(f"{name} must be a whole number of at least {low}, found {value!r}")


def _check_vocabularies(subject: Subject, original: Subject) -> None:
    if subject.vocabulary != original.vocabulary:
        raise InvalidInput(
            f"{subject.name} has {subject.vocabulary} tokens and {original.name} {original.vocabulary}, so that their "
            "distributions cannot be compared. Compare a model with its own original"
        )
    one, other = subject.tokenizer.vocabulary, original.tokenizer.vocabulary
    if one != other:
        unlike = sorted(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
        raise InvalidInput(
            f"{subject.name} and {original.name} have different vocabularies, so that their distributions cannot be "
            f"compared: {len(unlike)} tokens have another id or none, the first is {unlike[0]!r} "
            f"({one.get(unlike[0], 'none')} and {other.get(unlike[0], 'none')}). Compare a model with its own original"
        )
