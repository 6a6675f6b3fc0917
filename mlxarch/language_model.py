"""Public Python API: ``load`` a model by name, and generate text with the ``LanguageModel`` it returns.

Length: the docstrings of the public API are complete, so that ``help()`` is enough.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, cast

import mlx.core as mx
import msgspec
from mlx.utils import tree_flatten

from mlxarch.blocks import Cache, CausalLM
from mlxarch.engine import Engine, GenerationRequest, RowOutput, run_batch
from mlxarch.errors import ConfigError, InvalidInput, MlxArchError
from mlxarch.generation.answer import AnswerCollector, AnswerReader, BatchRow, Piece, Result
from mlxarch.generation.answer_form import AnswerForm, constrain
from mlxarch.generation.context_shift import (
    Overflow,
    check_overflow,
    decode_with_shift,
    protected_tokens,
)
from mlxarch.generation.decode import check_tokens, decode, remaining_tokens
from mlxarch.generation.logprobs import LogprobRecorder, TokenLogprobs, check_top_logprobs
from mlxarch.generation.prefill import Report
from mlxarch.generation.sampling import Sampling, SamplingArguments
from mlxarch.generation.session import Session
from mlxarch.generation.stopping import LoopGuard
from mlxarch.generation.thinking.splitter import Segment
from mlxarch.generation.timings import Timings
from mlxarch.loading.load import load_weights, open_resolved
from mlxarch.loading.matformer import Slice
from mlxarch.planner.mlx_limits import set_limits
from mlxarch.planner.plan import Plan, Request
from mlxarch.progress import Progress, format_size, terminal_progress
from mlxarch.quantization.scheme import Quantization
from mlxarch.ssd_streaming.embeddings import cache_of
from mlxarch.ssd_streaming.experts import ExpertStreaming, streaming_of
from mlxarch.ssd_streaming.row_cache import RowCache
from mlxarch.store.installed import default_model, find_catalog_entry
from mlxarch.store.lookup import plan_checkpoint
from mlxarch.store.obtain import obtain
from mlxarch.structured_output.compiler import GrammarCompiler
from mlxarch.structured_output.matcher import Grammar, Matcher
from mlxarch.structured_output.python_types import answer_type
from mlxarch.system import paths
from mlxarch.system.machines import parse_size, parse_tokens
from mlxarch.system.untrusted_files import read_json
from mlxarch.tokenizer.chat_template import join_text_parts
from mlxarch.tokenizer.tokenizer import Tokenizer
from mlxarch.tool_calls.parser import CallParser
from mlxarch.tool_calls.tool import ToolChoice
from mlxarch.tool_calls.use import ToolUse, framed_answer, render_calls

_PROMPT = "a prompt is a text, a list of messages with role and content, or a list of token ids"
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


def load(
    name_or_path: str | Path | None = None,
    *,
    bits: int | str | None = None,
    dtype: str | mx.Dtype | None = None,
    memory: int | str | None = None,
    context: int | str | None = None,
    kv_bits: int | None = None,
    ple: Literal["auto", "ssd", "memory"] = "auto",
    wire: bool = False,
    slice: str | Slice | None = None,
    progress: Progress | None = None,
) -> "LanguageModel":
    """Load a model by catalog name, Hub repository ``org/name[@revision]`` or folder.

    A model that is not on this machine is downloaded first, and quantized if no quantized copy
    exists.

    Args:
        name_or_path: catalog name, repository, folder or GGUF file; None takes MLXARCH_MODEL or,
            without it, the newest model on this machine.
        bits: weight bits, or "original" for weights as published; None takes the largest of 8 and 4
            that fits.
        dtype: dtype to compute in; None takes the checkpoint's, and float32 on MLX's CPU back end.
        memory: memory budget beside models loaded before, in bytes or as "16GB"; None takes the
            available memory. Experts and per-layer embeddings that exceed it are read from the SSD;
            a model that cannot fit is refused before it is downloaded.
        context: context length in tokens, 4096 or "4k"; KV caches of that size are allocated at
            once. None lets
            them grow, up to the limits of the model and the memory.
        kv_bits: bits of keys and values in the KV cache, 8 or 4; None keeps them in the compute
            dtype.
        ple: place of per-layer embeddings, "memory" or "ssd"; "auto" keeps them in memory if they
            fit.
        wire: keep the planned memory from being swapped out, on a Mac.
        slice: MatFormer slice of Gemma 3n E4B to load: a published name such as "e2b", or widths
            and layers.
        progress: callback for downloads, conversion and loading; None shows a bar on a terminal and
            nothing elsewhere.

    Raises:
        ModelNotFound, OfflineError, DownloadError, GatedModel: the model cannot be obtained.
        CheckpointError, ConfigError, TokenizerError: a file of the model is not sound.
        MemoryBudgetError: the model does not fit; the message shows the arithmetic.
        InvalidInput: an argument is out of range.
    """
    allowed = parse_size(memory) if isinstance(memory, str) else memory
    length = parse_tokens(context) if isinstance(context, str) else context
    request = Request(memory=allowed, context=length, kv_bits=kv_bits, ple=ple)
    with terminal_progress(progress) as report:
        path = obtain(name_or_path or default_model(), bits=bits, progress=report, request=request)
        return load_folder(path, request, dtype=dtype, wire=wire, slice=slice, progress=report)


def load_folder(
    path: Path,
    request: Request,
    *,
    dtype: str | mx.Dtype | None = None,
    wire: bool = False,
    slice: str | Slice | None = None,
    progress: Progress | None = None,
) -> "LanguageModel":
    """Load a model from its folder; arguments and errors as for ``load``.

    The checkpoint is opened and its network built once, for the plan and for the weights.
    """
    with terminal_progress(progress) as report, open_resolved(path, slice) as checkpoint:
        plan = plan_checkpoint(path, checkpoint, request, dtype).require()
        tokenizer = Tokenizer.from_folder(path)  # before the weights: its errors show at once
        with set_limits(plan, wire=wire) as reservation:
            execution = plan.execution
            model = load_weights(checkpoint, dtype=dtype, progress=report, execution=execution)
        reservation.release_with(model)
        config = checkpoint.source.config
    capacity = None if plan.grows else plan.context
    loaded = LanguageModel(path, model, config, tokenizer, capacity, plan.execution.kv)
    loaded.context_length = plan.context
    loaded.plan = plan
    return loaded


class AnswerArguments(SamplingArguments, total=False):
    """Arguments of ``LanguageModel.stream`` and ``generate``, for type checkers."""

    max_tokens: int | None
    stop: str | Sequence[str]
    sampling: Sampling | None
    session: Session | None
    template: Mapping[str, Any] | None
    overflow: Overflow
    schema: Any
    grammar: Grammar | None
    tools: Sequence[Any] | None
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    top_logprobs: int | None
    loop_guard: bool
    on_prompt: Report | None
    parse_special: bool | None


Function = TypeVar("Function", bound=Callable[..., Any])


def _spelt_out(model: Callable[..., Any] | None = None) -> Callable[[Function], Function]:
    """Make a decorator with which ``help()`` lists each argument that ``**`` stands for.

    Args:
        model: function whose arguments the decorated one has; None if it takes the fields of
            ``Sampling``.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(model or function)
        fields = inspect.signature(Sampling).parameters.values()
        own = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
        listed = own if model else [*own, *fields]
        result = inspect.signature(function).return_annotation
        vars(function)["__signature__"] = inspect.Signature(listed, return_annotation=result)
        return function

    return decorate


class LanguageModel:
    """Loaded model with its tokenizer.

    Any thread may generate, whichever loaded the model. A session, or an iterator of ``stream``,
    may pass from one thread to another between two pieces: no array of MLX is left unevaluated
    then, since unevaluated arrays belong to the thread that made them. Two threads must not use
    one session at the same time.

    Attributes:
        path: folder of the model.
        model: the network, a callable: token ids (B, L) and optional caches -> logits (B, L, V).
        config: contents of config.json.
        tokenizer: tokenizer with ``encode``, ``decode`` and ``apply_chat_template``.
        context_length: maximum number of tokens of prompt and answer together.
        kv: quantization of the KV cache; None keeps keys and values in the compute dtype.
        plan: memory plan; None for a model that was loaded without one.
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
        self.path = path
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.kv = kv
        self.plan: Plan | None = None
        longest = model.context_length
        if context is not None and (type(context) is not int or not 1 <= context <= longest):
            raise InvalidInput(
                f"context must lie in 1 … {longest}, what {path.name} was made for; found {context!r}"
            )
        self.context_length = context or longest
        self._capacity = context

    def make_caches(self) -> list[Cache | None]:
        """Empty KV caches, one for each layer."""
        return self.model.make_caches(self._capacity, kv=self.kv)

    def session(self) -> Session:
        """New session: passed to every turn of a conversation, it lets a turn prefill only what differs."""
        return self._session()

    def _session(self, **options: Any) -> Session:
        chunk = self.plan.execution.chunk if self.plan else None
        return Session(self.make_caches(), renew=self.make_caches, prefill_chunk=chunk, **options)

    def engine(self, **options: Any) -> Engine:
        """Start an engine that runs many requests at once; close it after use, or use ``with``.

        Args:
            **options: arguments of ``Engine`` that replace those of the memory plan. With
                ``prefix_cache_dir``, cached prompts outlive the process.
        """
        settings: dict[str, Any] = {
            "context_length": self.context_length,
            "kv": self.kv,
            "spill_dir": paths.cache() / "rows",
            "prefix_key": self._weights_key(),
        }
        if self.plan is not None:
            settings |= {"chunk": self.plan.execution.chunk, "room_bytes": self.plan.kv_room}
            settings["prefix_cache_bytes"] = self.plan.kv_room
        return Engine(self.model, **(settings | options))

    def _weights_key(self) -> str:
        """Text that changes with the weights: config, and name, size and time of each weight file."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        stats = [(file.name, file.stat()) for file in files]
        weights = [(name, status.st_size, status.st_mtime_ns) for name, status in stats]
        return repr((str(self.path.resolve()), weights, sorted(map(repr, self.config.items()))))

    def __repr__(self) -> str:
        arrays = cast(list[tuple[str, mx.array]], tree_flatten(self.model.parameters()))
        size = sum(array.nbytes for _, array in arrays)
        return (
            f"<LanguageModel {self.path.name}: {self.config.get('model_type')}, "
            f"{len(self.model.layers)} layers, {format_size(size)} of weights, "
            f"{self.context_length} tokens of context>"
        )

    @property
    def streaming(self) -> ExpertStreaming | None:
        """Experts that are read from the SSD when needed, with ``stats``; None if all are in memory."""
        return streaming_of(self.model)

    @property
    def streamed_rows(self) -> RowCache | None:
        """Per-layer embeddings that are read from the SSD, with ``stats``; None if all are in memory."""
        return cache_of(self.model)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiler of schemas, regular expressions and grammars for ``stream`` and ``generate``."""
        return GrammarCompiler(self.tokenizer, self.model.vocab_size)

    @property
    def recommended_sampling(self) -> Sampling:
        """Sampling that the model's makers recommend in generation_config.json or, failing that, the catalog.

        Greedy if they recommend nothing.

        Raises:
            ConfigError: generation_config.json holds a value out of range.
        """
        path = self.path / "generation_config.json"
        try:
            advice = read_json(path) if path.is_file() else {}
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            known = {name: advice[name] for name in names if advice.get(name) is not None}
            if known.get("top_k") == -1:  # all tokens, as vLLM writes it
                known["top_k"] = 0
            if (
                not known
                and advice.get("do_sample") is None
                and (entry := find_catalog_entry(self.path))
            ):
                return Sampling(
                    **entry.sampling
                )  # some makers write theirs into the model card alone
            return (
                Sampling(**{"temperature": 1.0, **known}) if advice.get("do_sample") else Sampling()
            )
        except InvalidInput as error:
            raise ConfigError(f"{path}: {error}; correct the file or remove it") from None

    def tokens_of(
        self,
        prompt: Prompt,
        template: Mapping[str, Any] | None = None,
        *,
        parse_special: bool | None = None,
    ) -> list[int]:
        """Convert a prompt to token ids.

        Args:
            prompt: text, tokenized as it is; messages, rendered by the chat template; or token ids,
                which are checked.
            template: variables for the chat template, such as ``enable_thinking`` or ``tools``.
            parse_special: whether control tokens that the prompt spells, such as "<|im_end|>",
                become tokens. None: in a text, which the caller has formatted, and not in messages.

        Raises:
            InvalidInput: an id outside of the vocabulary, or no tokens at all.
            TokenizerError: the text cannot be tokenized, or there is no chat template.
        """
        if template is not None and not isinstance(template, Mapping):
            raise InvalidInput(
                f"template holds variables by name, such as enable_thinking; found {template!r}"
            )
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, parse_special=parse_special is not False)
        elif isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
            raise InvalidInput(f"{_PROMPT}; found {type(prompt).__name__}")
        elif _is_chat(prompt):
            variables = dict(template or {})
            if reserved := variables.keys() & {"parse_special", "tokenize"}:
                raise InvalidInput(f"template holds no variable named {min(reserved)}")
            tokens = self.tokenizer.apply_chat_template(
                join_text_parts(cast(Sequence[Mapping[str, Any]], prompt)),
                parse_special=bool(parse_special),
                **variables,
            )
        else:
            tokens = [
                token for token in prompt if isinstance(token, int) and not isinstance(token, bool)
            ]
            if len(tokens) < len(prompt):
                raise InvalidInput(f"{_PROMPT}; found a {type(prompt).__name__} of other things")
        check_tokens(tokens, self.model.vocab_size)
        return tokens

    @_spelt_out()
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
        schema: Any = None,
        grammar: Grammar | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        top_logprobs: int | None = None,
        loop_guard: bool = False,
        on_prompt: Report | None = None,
        parse_special: bool | None = None,
        **settings: Unpack[SamplingArguments],
    ) -> Iterator[Piece]:
        """Generate an answer piece by piece. Closing the iterator stops the generation.

        Args:
            prompt: a text to continue, messages to answer, or token ids.
            max_tokens: maximum number of tokens; None continues to an end token or the end of the
                context.
            stop: strings that end the answer; they are not part of it.
            sampling: sampling parameters; None samples greedily.
            session: session of the conversation; only tokens that it does not hold are computed.
            template: variables for the chat template, such as ``{"enable_thinking": False}``.
            overflow: policy for a context that is too short: "refuse", or "keep-ends", which drops
                as many tokens as needed behind the instructions. ``max_tokens`` is then one context
                by default.
            schema: form of the answer: a JSON schema (a dict), a ``msgspec.Struct`` or a dataclass.
                Only tokens that keep it are chosen.
            grammar: a compiled grammar of ``grammars`` in place of a schema: a regular expression,
                a Lark grammar, or a JSON schema that is not held strictly.
            tools: functions that the model may call: Python functions with annotations and a
                docstring, definitions as in the OpenAI API, or ``Tool`` objects. Calls follow the
                schemas of their functions. Nothing is executed.
            tool_choice: "auto", "none", "required", or the name of the function to call.
            parallel_tool_calls: whether an answer may hold several calls.
            top_logprobs: number of most likely tokens, up to 20, whose log-probabilities are given
                beside each token's own; None gives none. They are the model's, before sampling.
            loop_guard: whether to end an answer that repeats a block of tokens without end; its
                ``finish_reason`` is then "loop".
            on_prompt: called while the prompt is read, with the tokens read so far and their
                number, several times a second.
            parse_special: see ``tokens_of``.
            **settings: fields of ``Sampling``, which replace those of ``sampling``.

        Raises:
            UnsupportedSchema: a keyword of the schema cannot be enforced; named with its path.
            ConstraintError: the grammar exceeds its limits, or no token can continue it.
            ContextLengthError: prompt and ``max_tokens`` do not fit into the context.
            InvalidInput: an argument is out of range.
            NonFiniteLogits: the model computed NaN or infinity.
        """
        if session is not None and not isinstance(session, Session):
            raise InvalidInput(f"session must come from session(), found {type(session).__name__}")
        chosen = _sampling(sampling, settings, LanguageModel.stream)
        use = ToolUse.of(self.tokenizer, tools, tool_choice, parallel_tool_calls)
        tokens = self._prompt_tokens(prompt, template, use, parse_special)
        calls = use.parser() if use else None
        form = self._answer_form(schema, grammar)
        reader = self._reader(tokens, prompt, stop, calls, constrained=form is not None)
        matcher = self._matcher(tokens, form and form.grammar, use, reader.warnings)
        session = session or self._session(rewind=0)  # for this answer alone
        check_overflow(overflow)
        limit = self._limit(tokens, max_tokens, overflow)
        guard = LoopGuard() if loop_guard else None
        check_top_logprobs(top_logprobs)
        recorder = None if top_logprobs is None else LogprobRecorder(top_logprobs)
        if overflow == "refuse":
            steps = decode(self.model, session, tokens, chosen, limit, matcher, on_prompt, recorder)
            return self._pieces(steps, limit, reader, matcher, guard, recorder)
        protected = protected_tokens(
            prompt,
            tokens,
            lambda messages: self._prompt_tokens(messages, template, use, parse_special),
        )
        steps = decode_with_shift(
            self.model,
            session,
            tokens,
            chosen,
            limit,
            self.context_length,
            protected,
            matcher,
            on_prompt,
            recorder,
        )
        return self._pieces(steps, limit, reader, matcher, guard, recorder)

    def _reader(
        self,
        tokens: Sequence[int],
        prompt: Prompt,
        stop: str | Sequence[str],
        calls: CallParser | None = None,
        *,
        constrained: bool = False,
    ) -> AnswerReader:
        """Build the reader of the answer to a prompt; arguments as for ``AnswerReader``."""
        continues = not _is_chat(prompt)
        return AnswerReader(
            self.tokenizer, tokens, stop, calls, continues=continues, constrained=constrained
        )

    def _prompt_tokens(
        self,
        prompt: Prompt,
        template: Mapping[str, Any] | None,
        use: ToolUse | None,
        parse_special: bool | None,
    ) -> list[int]:
        """Token ids of a prompt that may offer tools."""
        has_messages = (
            isinstance(prompt, Sequence)
            and bool(prompt)
            and all(isinstance(each, Mapping) for each in prompt)
        )
        variables: dict[str, Any] = {}
        if has_messages:
            messages = cast(Sequence[Mapping[str, Any]], prompt)
            if use is None:
                prompt = render_calls(self.tokenizer, messages)
            else:
                prompt, variables = use.prompt(self.tokenizer, messages)
        elif use is not None:
            raise InvalidInput(
                "tools need a prompt of messages: they are put into the chat template"
            )
        if variables:
            template = {**(template or {}), **variables}
        return self.tokens_of(prompt, template, parse_special=parse_special)

    def _matcher(
        self,
        tokens: Sequence[int],
        grammar: Grammar | None,
        use: ToolUse | None,
        warnings: list[str],
    ) -> Matcher | None:
        """Constraint on the answer to a prompt, None for none; what is not held is warned of."""
        triggers: frozenset[int] = frozenset()
        if use is not None and use.choice != "none":
            compiled = use.compile(self.grammars, grammar)
            grammar, triggers = compiled.grammar, compiled.triggers
            warnings += compiled.warnings
        elif grammar is not None:
            grammar = framed_answer(self.tokenizer, self.grammars, tokens, grammar)
        return grammar and constrain(self.tokenizer, tokens, grammar, triggers)

    def _limit(
        self, tokens: Sequence[int], max_tokens: int | None, overflow: Overflow = "refuse"
    ) -> int:
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise InvalidInput(f"max_tokens must be a whole number from 1 on, found {max_tokens!r}")
        if overflow == "keep-ends":
            return max_tokens or self.context_length
        return remaining_tokens(len(tokens), max_tokens, self.context_length)

    def _pieces(
        self,
        steps: Iterator[tuple[int, Timings]],
        limit: int,
        reader: AnswerReader,
        matcher: Matcher | None,
        guard: LoopGuard | None,
        recorder: LogprobRecorder | None,
    ) -> Iterator[Piece]:
        for count, (token, timings) in enumerate(steps, 1):
            events = reader.add(token)
            reason = None
            ended = reader.ended or (matcher is not None and matcher.stopped)
            looping = guard is not None and guard.add(token)
            if ended or looping or count == limit:
                events += reader.finish()
                reason = "loop" if looping else "length"
                if ended or reader.ended:
                    reason = "stop"
            *before, last = events or [Segment("", reader.thinking)]
            for event in before:
                yield Piece.of(event, None, None, timings)
            warnings = reader.warnings if reason else ()
            logprobs = recorder.latest if recorder else None
            yield Piece.of(last, token, reason, timings, warnings, logprobs)
            if reason:
                return

    @_spelt_out(stream)
    def generate(self, prompt: Prompt, **arguments: Unpack[AnswerArguments]) -> Result:
        """Generate a complete answer; arguments as for ``stream``.

        With a schema, ``Result.parsed`` is the answer as a value: an instance of the type that was
        given, or dicts and lists. It is None for an answer that ``max_tokens`` cut off. With tools,
        ``Result.calls`` are the functions to call, and ``Result.message`` and ``ToolCall.result``
        are the messages for the next turn.
        """
        answer = AnswerCollector(self.tokenizer)
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        last: Piece | None = None
        for last in self.stream(prompt, **arguments):
            answer.add(last.event)
            tokens += [] if last.token is None else [last.token]
            logprobs += [] if last.logprobs is None else [last.logprobs]
        assert (
            last is not None and last.finish_reason is not None
        )  # stream() yields at least its last piece
        result = answer.result(tokens, last.finish_reason, last.timings, last.warnings)
        result.logprobs = logprobs
        form = self._answer_form(arguments.get("schema"), arguments.get("grammar"))
        return form.read(result) if form and not result.calls else result

    def _answer_form(self, schema: Any, grammar: Grammar | None) -> "AnswerForm | None":
        """Compiled form of the answer; None for free text."""
        if schema is not None and grammar is not None:
            raise InvalidInput("a schema and a grammar are given; one of them is the answer's form")
        if schema is not None:
            kind = answer_type(schema)
            return AnswerForm(self.grammars.json_schema(kind.schema, strict=True), kind.parse)
        if grammar is None:
            return None
        return AnswerForm(grammar, msgspec.json.decode if grammar.is_json else None)

    @_spelt_out()
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        template: Mapping[str, Any] | None = None,
        schema: Any = None,
        grammar: Grammar | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        top_logprobs: int | None = None,
        batch_size: int = 32,
        parse_special: bool | None = None,
        **settings: Unpack[SamplingArguments],
    ) -> list[Result]:
        """Generate answers to several prompts, many at a time.

        Each weight is read once for a token of every running prompt, so a batch costs little more
        than its longest member. When an answer ends, the next prompt begins.

        Args:
            batch_size: largest number of prompts that run together.

        The other arguments and the errors are those of ``stream``; an error names the prompt by its
        index. ``Result.parsed`` and ``Result.calls`` are as for ``generate``.

        Returns:
            One result for each prompt, in their order.
        """
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
            raise InvalidInput(f"prompts must be a list of prompts, found {type(prompts).__name__}")
        if type(batch_size) is not int or batch_size < 1:
            raise InvalidInput(f"batch_size must be a whole number from 1 on, found {batch_size!r}")
        chosen = _sampling(sampling, settings, LanguageModel.generate_batch)
        check_top_logprobs(top_logprobs)
        use = ToolUse.of(self.tokenizer, tools, tool_choice, parallel_tool_calls)
        form = self._answer_form(schema, grammar)
        ids: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            try:
                ids.append(self._prompt_tokens(prompt, template, use, parse_special))
                self._limit(ids[-1], max_tokens)
            except MlxArchError as error:
                raise type(error)(f"prompts[{index}]: {error}") from None
        timings = [Timings(len(tokens)) for tokens in ids]
        rows: list[BatchRow] = []
        requests: list[GenerationRequest] = []
        for prompt, tokens in zip(prompts, ids, strict=True):
            calls = use.parser() if use else None
            reader = self._reader(tokens, prompt, stop, calls, constrained=form is not None)
            rows.append(BatchRow(reader))
            matcher = self._matcher(tokens, form and form.grammar, use, reader.warnings)
            limit = self._limit(tokens, max_tokens)
            requests.append(self._request(tokens, limit, chosen, matcher, top_logprobs))

        def on_output(index: int, output: RowOutput) -> bool:
            entries = output.logprobs or (None,) * len(output.tokens)
            for token, entry in zip(output.tokens, entries, strict=True):
                rows[index].add(token, entry)
            rows[index].is_complete = output.finish_reason == "stop"
            _record(timings[index], output)
            return not rows[index].reader.ended

        if rows:
            with self.engine(max_rows=batch_size, max_waiting=len(ids), probe=False) as engine:
                run_batch(engine, requests, on_output)
        results = [row.result(own) for row, own in zip(rows, timings, strict=True)]
        return [form.read(each) if form and not each.calls else each for each in results]

    def _request(
        self,
        tokens: Sequence[int],
        limit: int,
        sampling: Sampling,
        matcher: Matcher | None,
        top_logprobs: int | None,
    ) -> GenerationRequest:
        """Build the engine's request for an answer of at most ``limit`` tokens."""
        return GenerationRequest(
            prompt=tuple(tokens),
            max_tokens=limit,
            sampling=sampling,
            end_tokens=frozenset(self.tokenizer.eos_ids),
            top_logprobs=top_logprobs,
            matcher=matcher,
        )


def _record(timings: Timings, output: RowOutput) -> None:
    """Note in the timings of an answer what the engine tells."""
    timings.generated_tokens += len(output.tokens)
    if output.prompt is not None:
        timings.reused_tokens = output.prompt.cached_tokens
    if output.timings is not None:
        timings.prefill_seconds = output.timings.queue_seconds + output.timings.prefill_seconds
        timings.decode_seconds = output.timings.decode_seconds


def _is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages."""
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def _sampling(
    sampling: Sampling | None, settings: Mapping[str, Any], function: Callable[..., Any]
) -> Sampling:
    """Sampling with some fields replaced.

    Args:
        function: the public function that was called, whose arguments an error lists.
    """
    if not isinstance(sampling, Sampling | None):
        raise InvalidInput(f"sampling must be a Sampling, found {type(sampling).__name__}")
    if unknown := sorted(settings.keys() - Sampling.__dataclass_fields__.keys()):
        known = ", ".join(list(inspect.signature(function).parameters)[2:])
        raise InvalidInput(f"unknown argument {', '.join(unknown)}; known: {known}")
    return replace(sampling or Sampling(), **settings)
