"""Shared state of a server process, and the common way of a request to its answers."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from mlxarch.engine.request import GenerationRequest, TokenMatcher
from mlxarch.errors import MlxArchError
from mlxarch.generation.thinking.switches import switches
from mlxarch.server.answers.answers import Answers, Job, Mailbox
from mlxarch.server.answers.constraint import Constraint, compile_constraint
from mlxarch.server.answers.least_length import LeastLength
from mlxarch.server.answers.options import Options, sampling_for
from mlxarch.server.answers.reader import OutputReader
from mlxarch.server.answers.thinking_budget import ThinkingBudget, end_of_thinking
from mlxarch.server.http.body import read_body
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import invalid
from mlxarch.server.metrics import Metrics
from mlxarch.server.prompt_history import Change, PromptHistory, PromptRecord, compare
from mlxarch.server.response_store import ResponseStore
from mlxarch.server.served_models import ServedModel, ServedModels
from mlxarch.server.settings import Settings
from mlxarch.tool_calls.use import ToolUse, render_calls

T = TypeVar("T")


@dataclass
class Server:
    """Shared state of a server process.

    Attributes:
        settings: settings.
        models: models of the start-up list.
        mailbox: way of outputs from the engines to the event loop.
        started: Unix time of the start.
        metrics: figures for monitoring.
        responses: stored responses.
        prompts: latest prompts, to explain what the prefix cache could not reuse.
        death: failure because of which the process ends.
    """

    settings: Settings
    models: ServedModels
    mailbox: Mailbox
    started: float
    death: MlxArchError | None = None
    metrics: Metrics = field(default_factory=Metrics)
    responses: ResponseStore = field(default_factory=ResponseStore)
    prompts: PromptHistory = field(default_factory=PromptHistory)

    @classmethod
    def of(cls, request: Request) -> "Server":
        """Server that handles a request."""
        return request.app

    def read(self, context: RequestContext, kind: type[T]) -> T:
        """Decode and validate the body of a request."""
        return read_body(context, kind, lenient=self.settings.lenient)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run work on texts outside of the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.models.texts, function, *arguments)

    async def render(
        self,
        served: ServedModel,
        messages: Sequence[Mapping[str, Any]],
        options: Options,
        context: RequestContext,
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template.

        Raises:
            InvalidInput, TokenizerError: the template or the tokenizer refuses the messages.
        """
        model = served.language_model
        thinking = switches(model.tokenizer, options.think, options.effort)
        for warning in thinking.warnings:
            context.warn(f"{served.name} {warning}")
        conversation = _with_flag(messages, thinking.flag)
        variables = {**thinking.variables, **options.variables}
        use = options.tools.use(model.tokenizer)

        def tokens() -> list[int]:
            if use is None:
                return model.tokens_of(render_calls(model.tokenizer, conversation), variables)
            offering, given = use.prompt(model.tokenizer, conversation)
            return model.tokens_of(offering, {**variables, **given})

        return await self.in_thread(tokens)

    def note_prompt(
        self,
        id: str,
        served: ServedModel,
        messages: Sequence[Mapping[str, Any]],
        options: Options,
        tokens: Sequence[int],
    ) -> PromptRecord:
        """Remember the prompt of an answer for comparisons with later ones."""
        tools = options.tools.definitions
        effort = (options.think, options.effort)
        record = PromptRecord.of(served.name, messages, tools, effort, tokens)
        self.prompts.add(id, record)
        return record

    def compare_prompts(
        self, before: PromptRecord, now: PromptRecord, context: RequestContext
    ) -> Change | None:
        """Find what keeps a prompt from reusing an earlier one, and warn of it."""
        change = compare(before, now)
        if change is not None:
            context.warn(f"the prefix cache misses: {change.sentence}")
            context.log["miss"] = change.reason or "template"
        return change

    async def render_open(
        self,
        served: ServedModel,
        messages: Sequence[Mapping[str, Any]],
        options: Options,
        context: RequestContext,
    ) -> list[int]:
        """Token ids of a conversation whose last message, the assistant's, goes on."""
        variables = {**options.variables, "add_generation_prompt": False}
        open_ended = replace(options, variables=variables)
        tokens = await self.render(served, messages, open_ended, context)
        tokenizer = served.language_model.tokenizer
        ends = tokenizer.control_ids | tokenizer.eos_ids
        while tokens and (tokens[-1] in ends or not tokenizer.decode(tokens[-1:]).strip()):
            tokens.pop()  # the end of the turn, and the blanks around it
        return tokens

    async def answer(
        self,
        served: ServedModel,
        prompts: Sequence[Sequence[int]],
        options: Options,
        context: RequestContext,
    ) -> Answers:
        """Submit prompts to the model's engine, ``options.count`` answers to each.

        Raises:
            MlxArchError: the request cannot be answered.
        """
        model = served.language_model
        use = options.tools.use(model.tokenizer)
        compiling = partial(compile_constraint, model, options.form, use, context.warn)
        constraint = await self.in_thread(compiling)
        jobs = [
            self._job(served, tuple(prompt), options, index, context, constraint, use)
            for prompt in prompts
            for index in range(options.count)
        ]
        answers = Answers(served.running_engine, self.mailbox, jobs, options.count)
        started = time.monotonic()
        context.cleanup.callback(self._note_usage, answers, context, started)
        context.log["in"] = sum(map(len, prompts))
        return answers

    def _job(
        self,
        served: ServedModel,
        prompt: tuple[int, ...],
        options: Options,
        index: int,
        context: RequestContext,
        constraint: Constraint,
        use: ToolUse | None,
    ) -> Job:
        model = served.language_model
        request = GenerationRequest(
            prompt=prompt,
            max_tokens=self._limit(len(prompt), model.context_length, options, context),
            sampling=sampling_for(options, served.sampling, index),
            end_tokens=model.tokenizer.eos_ids,
            top_logprobs=options.top_logprobs,
            prompt_logprobs=options.prompt_logprobs,
            matcher=self._matcher(served, prompt, options, constraint, context),
            conversation=options.conversation or context.conversation,
        )
        check = partial(_check, constraint, context) if constraint.answer is not None else None
        reader = OutputReader(
            model.tokenizer,
            prompt,
            options.stop,
            check,
            use.parser() if use is not None else None,
            context.warn,
            continues=options.continues,
            inline_thinking=options.inline_thinking,
        )
        return Job(request, reader)

    @staticmethod
    def _matcher(
        served: ServedModel,
        prompt: tuple[int, ...],
        options: Options,
        constraint: Constraint,
        context: RequestContext,
    ) -> TokenMatcher | None:
        """Constraint on the tokens of an answer; None if every token may follow."""
        matcher: TokenMatcher | None = constraint.matcher(prompt)
        tokenizer = served.language_model.tokenizer
        size = served.running_engine.vocab_size
        if options.min_tokens != 0:
            matcher = LeastLength(tokenizer.eos_ids, options.min_tokens, size, matcher)
        budget = options.thinking_budget
        if budget is None:
            return matcher
        end = end_of_thinking(tokenizer)
        if end is None:
            context.warn("the budget of thinking is not held: no token of this model ends it")
            return matcher
        return ThinkingBudget(tokenizer, prompt, end, budget, size, matcher)

    def _limit(
        self, prompt: int, context_length: int, options: Options, context: RequestContext
    ) -> int:
        """Maximum number of tokens of an answer.

        Raises:
            ApiError: prompt and answer do not fit; the message has both numbers.
        """
        room = context_length - prompt
        asked = options.max_tokens
        if asked is None:
            asked = min(room, self.settings.max_tokens or room)
        if options.clamp and asked > room > 0:
            context.warn(f"the answer is limited to {room} tokens, what the context leaves")
            asked = room
        if asked > room or room < 0 or (room == 0 and asked):
            raise invalid(
                f"the prompt has {prompt} tokens and the answer may have {max(asked, 0)}; the "
                f"context of this model holds {context_length}. Shorten the prompt or the answer",
                options.prompt_param,
                "context_length_exceeded",
            )
        if asked < 1 and not options.prompt_logprobs:
            raise invalid(
                f"the prompt has {prompt} tokens; the context of this model holds "
                f"{context_length}, so there is no room for an answer",
                options.prompt_param,
                "context_length_exceeded",
            )
        return asked

    def _note_usage(self, answers: Answers, context: RequestContext, started: float) -> None:
        """Cancel what still runs, and note the figures of a request for log and metrics."""
        answers.cancel()
        usage = answers.usage
        context.log |= {"cached": usage.cached, "out": usage.answer}
        if answers.first_difference is not None:
            context.log["differs_at"] = answers.first_difference
        seconds = time.monotonic() - started
        context.log["rate"] = f"{usage.answer / max(seconds, 1e-9):.1f}/s"
        self.metrics.add(usage, answers.endings, seconds)


def _check(constraint: Constraint, context: RequestContext, text: str) -> None:
    """Warn of what an answer breaks, of what its grammar could not hold."""
    for violation in constraint.violations(text):
        context.warn(violation)


def _with_flag(messages: Sequence[Mapping[str, Any]], flag: str) -> Sequence[Mapping[str, Any]]:
    """Append a flag such as /no_think to the system message."""
    if not flag:
        return messages
    first = messages[0]
    if first.get("role") != "system" or not isinstance(first.get("content"), str):
        return [{"role": "system", "content": flag}, *messages]
    return [{**first, "content": f"{first['content']}\n{flag}"}, *messages[1:]]
