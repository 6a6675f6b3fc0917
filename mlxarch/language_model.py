"""A model with its tokenizer: what ``mlxarch.load`` returns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx

from mlxarch import store
from mlxarch.blocks import Cache, CausalLM, Quantization
from mlxarch.blueprints import plan_for
from mlxarch.checkpoint import read_json
from mlxarch.errors import ConfigError, InvalidInput, MlxArchError, TokenizerError
from mlxarch.generation import Session, Timings, check_tokens, decode, decode_batch, room
from mlxarch.inventory import entry_of
from mlxarch.limits import set_limits
from mlxarch.loading import load_model
from mlxarch.machines import parse_size
from mlxarch.memory import Plan, Request
from mlxarch.overflow import Overflow, check_overflow, decode_ends, opening
from mlxarch.progress import Progress, on_terminal
from mlxarch.sampling import Sampling
from mlxarch.slicing import Slice
from mlxarch.stops import StopStrings
from mlxarch.streaming.embeddings import cache_of
from mlxarch.streaming.experts import Streaming
from mlxarch.streaming.rows import RowCache
from mlxarch.thinking import Segment, splitter
from mlxarch.tokenizer import Tokenizer

_PROMPT = "a prompt is a text, a list of messages with role and content, or a list of token ids"
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass
class Piece:
    """A part of an answer.

    Attributes:
        text: to append; may be empty while a character or a stop string is undecided.
        token: that completed it; None where the rest of the text is flushed.
        finish_reason: None until the last piece: "stop" at an end token or a stop string, "length" at the limit.
        timings: so far.
        thinking: whether the text belongs to the model's thinking, and not to the answer.
    """

    text: str
    token: int | None
    finish_reason: str | None
    timings: Timings
    thinking: bool = False


@dataclass
class Result:
    """A whole answer.

    Attributes:
        text: without the thinking, the end token and the stop string that ended it; empty where the limit came before
            the end of the thinking.
        tokens: as sampled, all of them.
        finish_reason: "stop" or "length".
        timings: how long it took.
        thinking: what the model wrote for itself before the answer, without its marks.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    timings: Timings
    thinking: str = ""


def load(
    name_or_path: str | Path,
    *,
    bits: int | str | None = None,
    dtype: str | mx.Dtype | None = None,
    memory: int | str | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
    ple: Literal["auto", "ssd", "memory"] = "auto",
    wire: bool = False,
    slice: str | Slice | None = None,
    progress: Progress | None = None,
) -> "LanguageModel":
    """Load a model: a catalog name, a Hub repository ``org/name[@revision]`` or a folder.

    Args:
        name_or_path: what is not on the disk yet is downloaded, and quantized where no quantized copy exists.
        bits: of the weights, or "original"; None takes the largest of 8 and 4 that fits this machine.
        dtype: to compute in; None takes the checkpoint's, and float32 on MLX's CPU back end.
        memory: that it may use beside models loaded before, in bytes or as "16GB"; None takes what this machine gives.
            What fits only in part is streamed from the disk; what does not fit is refused before it is downloaded.
        context: tokens to plan for: the caches are allocated at once. None grows them, up to what the model and the
            memory allow.
        kv_bits: of keys and values, 8 or 4; None keeps them in the type that is computed in.
        ple: where a table of per-layer embeddings is: in memory or on the disk; "auto" takes the memory if it fits.
        wire: let a Mac not swap out what is planned for.
        slice: of Gemma 3n E4B, the part of it to load: a published name such as "e2b", or widths and layers.
        progress: told of downloads, conversion and loading. None shows a bar on a terminal and else nothing.

    Raises:
        ModelNotFound, OfflineError, DownloadError, GatedModel: it cannot be obtained.
        CheckpointError, ConfigError, TokenizerError: its files are not sound.
        MemoryBudgetError: it does not fit; the message holds the arithmetic.
        InvalidInput: an argument is out of range.
    """
    allowed = parse_size(memory) if isinstance(memory, str) else memory
    request = Request(memory=allowed, context=context, kv_bits=kv_bits, ple=ple)
    with on_terminal(progress) as report:
        path = store.obtain(name_or_path, bits=bits, progress=report, request=request)
        plan = plan_for(path, request, dtype=dtype, slice=slice).require()
        tokenizer = Tokenizer.from_folder(path)  # before the weights: what is wrong with it shows at once
        with set_limits(plan, wire=wire) as claim:
            model, config = load_model(path, dtype=dtype, slice=slice, progress=report, execution=plan.execution)
        claim.belongs_to(model)
    loaded = LanguageModel(path, model, config, tokenizer, context, plan.execution.kv)
    loaded.context_length, loaded.plan = plan.context, plan
    return loaded


class LanguageModel:
    """A loaded model.

    Any thread may generate, whichever loaded the model; a session, and an iterator of ``stream``, may pass from one
    thread to another between two pieces. MLX's unevaluated arrays belong to the thread that made them, so nothing is
    left unevaluated there. Two threads must not use one session at the same time.

    Attributes:
        path: of the folder that it was loaded from.
        model: callable: token ids (B, L), optional caches -> logits (B, L, V).
        config: config.json.
        tokenizer: encode, decode, apply_chat_template.
        context_length: tokens of prompt and answer together.
        kv: how keys and values are packed; None keeps them in the type that is computed in.
        plan: what it takes; None where nobody planned.
    """

    def __init__(
        self,
        path: Path,
        model: CausalLM,
        config: dict[str, Any],
        tokenizer: Tokenizer,
        context: int | None = None,
        kv: Quantization | None = None,
    ) -> None:
        self.path, self.model, self.config, self.tokenizer, self.kv = path, model, config, tokenizer, kv
        self.plan: Plan | None = None
        longest = model.context_length
        if context is not None and (type(context) is not int or not 1 <= context <= longest):
            raise InvalidInput(f"context must lie in 1 … {longest}, what {path.name} was made for; found {context!r}")
        self.context_length, self._capacity = context or longest, context

    def make_caches(self) -> list[Cache | None]:
        """Empty caches, one for each layer."""
        return self.model.make_caches(self._capacity, kv=self.kv)

    def session(self) -> Session:
        """A conversation to be: pass it to every turn, and a turn computes only what differs from the last."""
        return Session(self.make_caches(), renew=self.make_caches)

    @property
    def streaming(self) -> Streaming | None:
        """The experts that are read from the disk as tokens need them, with ``stats``; None where there are none."""
        return self.model.streaming

    @property
    def streamed_rows(self) -> RowCache | None:
        """The per-layer embeddings that are read from the disk, with ``stats``; None where all are in memory."""
        return cache_of(self.model)

    @property
    def recommended_sampling(self) -> Sampling:
        """What the model's makers advise, by generation_config.json or else the catalog; greedy without advice."""
        path = self.path / "generation_config.json"
        try:
            advice = read_json(path) if path.is_file() else {}
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            known = {name: advice[name] for name in names if advice.get(name) is not None}
            if not known and advice.get("do_sample") is None and (entry := entry_of(self.path)):
                return Sampling(**entry.sampling)  # some makers write theirs into the model card alone
            return Sampling(**{"temperature": 1.0, **known}) if advice.get("do_sample") else Sampling()
        except InvalidInput as error:
            raise ConfigError(f"{path}: {error}; correct the file or remove it") from None

    def tokens_of(self, prompt: Prompt, template: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a text (as it stands), of messages (through the chat template) or of ids (checked).

        ``template`` holds variables for the chat template, such as ``enable_thinking`` or ``tools``.

        Raises:
            InvalidInput: an id outside of the vocabulary, or no tokens at all.
            TokenizerError: the text cannot be tokenized, or there is no chat template.
        """
        if template is not None and not isinstance(template, Mapping):
            raise InvalidInput(f"template holds variables by name, such as enable_thinking; found {template!r}")
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        elif isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
            raise InvalidInput(f"{_PROMPT}; found {type(prompt).__name__}")
        elif prompt and isinstance(prompt[0], Mapping):
            rendered = self.tokenizer.apply_chat_template(cast(Sequence[Mapping[str, Any]], prompt), **(template or {}))
            if isinstance(rendered, str):
                raise TokenizerError("the chat template was rendered, not tokenized")
            tokens = rendered
        else:
            tokens = [token for token in prompt if isinstance(token, int) and not isinstance(token, bool)]
            if len(tokens) < len(prompt):
                raise InvalidInput(f"{_PROMPT}; found a {type(prompt).__name__} of other things")
        check_tokens(tokens, self.model.vocab_size)
        return tokens

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        session: Session | None = None,
        template: Mapping[str, Any] | None = None,
        overflow: Overflow = "refuse",
        **settings: Any,
    ) -> Iterator[Piece]:
        """Generate, piece by piece. Closing the iterator stops it.

        Args:
            prompt: a text to continue, messages to answer, or token ids.
            max_tokens: at most; None goes on until an end token or the end of the context.
            stop: strings that end the answer, and are no part of it.
            sampling: how tokens are chosen; greedy unless given.
            session: of the conversation; only what differs from what it holds is computed.
            template: variables for the chat template, such as ``{"enable_thinking": False}``.
            overflow: where the context is too short, "refuse", or "keep-ends" and leave out the middle: what stands
                behind the instructions, as much as must be. ``max_tokens`` is then one context by default.
            **settings: fields of Sampling, which replace those of ``sampling``.

        Raises:
            ContextLengthError: prompt and ``max_tokens`` do not fit into the context.
            InvalidInput: an argument is out of range.
            NonFiniteLogits: the model broke down.
        """
        if session is not None and not isinstance(session, Session):
            raise InvalidInput(f"session must come from session(), found {type(session).__name__}")
        chosen, tokens = _sampling(sampling, settings), self.tokens_of(prompt, template)
        reader = _Reader(self.tokenizer, tokens, stop)
        session = session or Session(self.make_caches(), renew=self.make_caches, rewind=0)  # for this answer alone
        check_overflow(overflow)
        limit = self._limit(tokens, max_tokens, overflow)
        if overflow == "refuse":
            return self._pieces(decode(self.model, session, tokens, chosen, limit), limit, reader)
        first = opening(prompt, tokens, lambda messages: self.tokens_of(messages, template))
        steps = decode_ends(self.model, session, tokens, chosen, limit, self.context_length, first)
        return self._pieces(steps, limit, reader)

    def _limit(self, tokens: Sequence[int], max_tokens: int | None, overflow: Overflow = "refuse") -> int:
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise InvalidInput(f"max_tokens must be a whole number from 1 on, found {max_tokens!r}")
        if overflow == "keep-ends":
            return max_tokens or self.context_length
        return room(len(tokens), max_tokens, self.context_length)

    def _pieces(self, steps: Iterator[tuple[int, Timings]], limit: int, reader: "_Reader") -> Iterator[Piece]:
        for count, (token, timings) in enumerate(steps, 1):
            segments, reason = reader.add(token), None
            if reader.ended or count == limit:
                segments += reader.finish()
                reason = "stop" if reader.ended else "length"
            *before, (text, thinking) = segments or [("", reader.thinking)]
            for part, kind in before:
                yield Piece(part, None, None, timings, kind)
            yield Piece(text, token, reason, timings, thinking)
            if reason:
                return

    def generate(self, prompt: Prompt, **arguments: Any) -> Result:
        """Generate a whole answer. The arguments are those of ``stream``."""
        texts, tokens, last = {False: "", True: ""}, [], None
        for last in self.stream(prompt, **arguments):
            texts[last.thinking] += last.text
            tokens += [] if last.token is None else [last.token]
        assert last is not None and last.finish_reason is not None  # stream() yields at least its last piece
        return Result(texts[False], tokens, last.finish_reason, last.timings, texts[True])

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        template: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        **settings: Any,
    ) -> list[Result]:
        """Generate for several prompts at once: one result each, in their order.

        The weights are read once for a token of every prompt, so a batch costs little more than its longest member.
        ``batch_size`` prompts run together, which bounds the memory of their caches. The other arguments and errors
        are those of ``stream``, the errors naming the prompt by its index; timings are those of the prompt's batch.
        """
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
            raise InvalidInput(f"prompts must be a list of prompts, found {type(prompts).__name__}")
        if type(batch_size) is not int or batch_size < 1:
            raise InvalidInput(f"batch_size must be a whole number from 1 on, found {batch_size!r}")
        chosen, ids = _sampling(sampling, settings), []
        for index, prompt in enumerate(prompts):
            try:
                ids.append(self.tokens_of(prompt, template))
                self._limit(ids[-1], max_tokens)
            except MlxArchError as error:
                raise type(error)(f"prompts[{index}]: {error}") from None
        starts = range(0, len(ids), batch_size)
        return [
            result
            for start in starts
            for result in self._batch(ids[start : start + batch_size], max_tokens, stop, chosen)
        ]

    def _batch(
        self, ids: list[list[int]], max_tokens: int | None, stop: str | Sequence[str], sampling: Sampling
    ) -> list[Result]:
        rows, timings = [_Row(_Reader(self.tokenizer, prompt, stop)) for prompt in ids], Timings(sum(map(len, ids)))
        limit = min(self._limit(tokens, max_tokens) for tokens in ids)
        for step in decode_batch(self.model, ids, sampling, limit, timings, self.kv):
            for row, token in zip(rows, step, strict=True):
                row.add(token)
            if all(row.reader.ended for row in rows):
                break
        return [row.result(timings) for row in rows]


class _Reader:
    """Tokens of an answer to its texts: thinking apart, up to an end token or a stop string of the answer proper."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: str | Sequence[str]) -> None:
        self._ends, self._stops, self._splitter = tokenizer.eos_ids, StopStrings(stop), splitter(tokenizer, prompt)
        self.ended = False

    @property
    def thinking(self) -> bool:
        return self._splitter.thinking

    def add(self, token: int) -> list[Segment]:
        if token in self._ends:
            self.ended = True
            return []
        return self._before_stop(self._splitter.add(token))

    def finish(self) -> list[Segment]:
        segments = [] if self._stops.found else self._before_stop(self._splitter.finish())
        held = self._stops.flush()
        return [*segments, (held, False)] if held else segments

    def _before_stop(self, segments: list[Segment]) -> list[Segment]:
        out = []
        for text, thinking in segments:
            passed = text if thinking else self._stops.feed(text)
            out += [(passed, thinking)] if passed else []
            if self._stops.found:
                self.ended = True
                break
        return out


class _Row:
    """One answer of a batch, while it grows."""

    def __init__(self, reader: _Reader) -> None:
        self.reader, self.tokens, self.texts = reader, [], {False: "", True: ""}

    def add(self, token: int) -> None:
        if not self.reader.ended:
            self.tokens.append(token)
            self._take(self.reader.add(token))

    def result(self, timings: Timings) -> Result:
        self._take(self.reader.finish())
        reason = "stop" if self.reader.ended else "length"
        return Result(self.texts[False], self.tokens, reason, timings, self.texts[True])

    def _take(self, segments: list[Segment]) -> None:
        for text, thinking in segments:
            self.texts[thinking] += text


def _sampling(sampling: Sampling | None, settings: dict[str, Any]) -> Sampling:
    if not isinstance(sampling, Sampling | None):
        raise InvalidInput(f"sampling must be a Sampling, found {type(sampling).__name__}")
    if unknown := sorted(settings.keys() - Sampling.__dataclass_fields__.keys()):
        own = ("max_tokens", "stop", "sampling", "session", "template", "overflow", "batch_size")
        known = ", ".join((*own, *Sampling.__dataclass_fields__))
        raise InvalidInput(f"unknown argument {', '.join(unknown)}; known: {known}")
    return replace(sampling or Sampling(), **settings)
