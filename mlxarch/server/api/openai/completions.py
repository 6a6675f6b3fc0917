"""OpenAI's text completions, with log-probabilities of prompts for evaluation harnesses."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from mlxarch.errors import MlxArchError
from mlxarch.generation.logprobs import TokenLogprobs
from mlxarch.language_model import LanguageModel
from mlxarch.server.answers.answers import Answers
from mlxarch.server.answers.collected import Collected, collect
from mlxarch.server.answers.events import Delta, End, PromptRead, Waiting
from mlxarch.server.answers.options import Options, logit_bias, stop_strings
from mlxarch.server.api.fields import (
    AnswerCount,
    Count,
    KeepAlive,
    LogitSampling,
    TopLogprobs,
    keep_seconds,
)
from mlxarch.server.api.fill_in_middle import fill_in_prompt
from mlxarch.server.api.openai.chat import fingerprint, usage_object
from mlxarch.server.api.openai.chat_request import StreamOptions
from mlxarch.server.http.context import RequestContext
from mlxarch.server.http.errors import invalid, openai_error, to_api_error
from mlxarch.server.http.responses import SSE_COMMENT, SSE_DONE, Stream, json_response, sse
from mlxarch.server.served_models import ServedModel
from mlxarch.server.server import Server

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_DEFAULT_TOKENS = 16


class CompletionRequest(LogitSampling):
    """Body of POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]] | None = None
    model: str | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    n: AnswerCount | None = None
    best_of: Count | None = None
    stop: str | list[str] | None = None
    echo: bool | None = None
    logprobs: bool | TopLogprobs | None = None
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    keep_alive: KeepAlive = None
    cache_prompt: bool | None = None


async def completions(request: Request) -> Response:
    """Answer POST /v1/completions."""
    server = Server.of(request)
    context = RequestContext.of(request.scope)
    body = server.read(context, CompletionRequest)
    prompts = prompts_of(body)
    served = await server.models.acquire(body.model, context)
    served.keep_seconds = keep_seconds(body.keep_alive, served.keep_seconds)
    options = _options(body, served)
    limit = server.settings.parallel + server.settings.max_waiting
    if len(prompts) * options.count > limit:
        raise invalid(
            f"{len(prompts)} prompts with {options.count} answers each are asked for; at most "
            f"{limit} answers are made for a request",
            "prompt",
        )
    model = served.language_model
    tokens = [await server.in_thread(_tokens, model, prompt, body.suffix) for prompt in prompts]
    answers = await server.answer(served, tokens, options, context)
    decode = model.tokenizer.decode
    texts = [
        prompt if isinstance(prompt, str) else decode(ids, skip_special_tokens=False)
        for prompt, ids in zip(prompts, tokens, strict=True)
    ]
    form = _Form(served, context, options, tokens, texts, bool(body.echo))
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return Stream(form.stream(answers, usage))
    return json_response(await form.whole(answers))


def _tokens(model: LanguageModel, prompt: str | list[int], suffix: str | None) -> list[int]:
    """Token ids of a prompt; with a suffix, of one that asks for what stands between."""
    if not suffix:
        return model.tokens_of(prompt)
    if not isinstance(prompt, str):
        raise invalid("suffix needs a prompt that is text", "suffix")
    return fill_in_prompt(model.tokenizer, prompt, suffix)


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """Prompts of a request: texts, or lists of token ids.

    Raises:
        ApiError: there are none, or the list mixes kinds.
    """
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt is missing: a text, a list of texts or token ids", "prompt")
    if all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    if any(isinstance(item, int) for item in prompt):
        raise invalid("prompt mixes token ids and prompts", "prompt")
    return [item for item in prompt if not isinstance(item, int)]


def _options(body: CompletionRequest, served: ServedModel) -> Options:
    count = body.n or 1
    if body.suffix and body.echo:
        raise invalid("echo and suffix exclude each other", "echo")
    if body.best_of is not None and body.best_of > count:
        raise invalid("best_of larger than n is not supported", "best_of", "unsupported_value")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options needs stream: true", "stream_options")
    limit = _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if limit == 0 and not body.echo:
        raise invalid("max_tokens is 0, which needs echo: true", "max_tokens")
    sampling = body.sampling()
    if body.logit_bias:
        sampling["logit_bias"] = logit_bias(body.logit_bias, served.running_engine.vocab_size)
    top = int(body.logprobs) if body.logprobs is not None and body.logprobs is not False else None
    return Options(
        max_tokens=limit,
        min_tokens=body.shortest,
        stop=stop_strings(body.stop),
        sampling=sampling,
        top_logprobs=top,
        prompt_logprobs=limit == 0 or (bool(body.echo) and top is not None),
        count=count,
        conversation=body.user,
        continues=True,
        prompt_param="prompt",
    )


@dataclass
class _Form:
    """Answers in the form of text completions."""

    served: ServedModel
    context: RequestContext
    options: Options
    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]  # of the prompts
    echo: bool

    def __post_init__(self) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.served.name,
            "system_fingerprint": fingerprint(self.served),
        }

    def _prompt_text(self, index: int) -> str:
        return self.texts[index // self.options.count] if self.echo else ""

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """Response without a stream."""
        choices = [
            self._choice(index, answer) for index, answer in enumerate(await collect(answers))
        ]
        response = {**self._head, "choices": choices, "usage": usage_object(answers.usage)}
        if self.context.warnings:
            response["warnings"] = self.context.warnings
        return response

    def _choice(self, index: int, answer: Collected) -> dict[str, Any]:
        entries: list[TokenLogprobs | None] = []
        if self.echo and answer.prompt is not None:
            entries += answer.prompt.logprobs
        entries += answer.logprobs
        text = self._prompt_text(index) + answer.thinking + answer.text
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(entries, 0, index),
            "finish_reason": answer.end.reason,
        }

    async def stream(self, answers: Answers, usage: bool) -> AsyncIterator[bytes]:
        """Chunks of a streamed response."""
        lengths = [len(self._prompt_text(index)) for index in range(answers.count)]
        try:
            async with aclosing(answers.events()) as events:
                async for index, event in events:
                    if isinstance(event, Waiting):
                        yield SSE_COMMENT
                    elif isinstance(event, PromptRead) and self.echo:
                        entries = self._logprobs(event.report.logprobs, 0, index)
                        yield self._chunk(index, self._prompt_text(index), entries, None, usage)
                    elif isinstance(event, Delta):
                        entries = self._logprobs(event.logprobs, lengths[index], index)
                        lengths[index] += len(event.text)
                        yield self._chunk(index, event.text, entries, None, usage)
                    elif isinstance(event, End):
                        yield self._chunk(index, "", None, event.reason, usage)
        except MlxArchError as error:
            self.context.log["error"] = type(error).__name__
            yield sse({"error": openai_error(to_api_error(error))})
            return
        if usage:
            yield sse({**self._head, "choices": [], "usage": usage_object(answers.usage)})
        yield SSE_DONE

    def _chunk(self, index: int, text: str, entries: Any, reason: str | None, usage: bool) -> bytes:
        choice = {"index": index, "text": text, "logprobs": entries, "finish_reason": reason}
        chunk = {**self._head, "choices": [choice]}
        if usage:
            chunk["usage"] = None
        if reason is not None and self.context.warnings:
            chunk["warnings"] = self.context.warnings
        return sse(chunk)

    def _logprobs(
        self, entries: Sequence[TokenLogprobs | None], offset: int, index: int
    ) -> dict[str, Any] | None:
        """Log-probabilities in the form of text completions.

        Args:
            entries: one for each token; None for the first token of the prompt, which has none.
            offset: characters before the first entry.
            index: number of the answer.
        """
        if self.options.top_logprobs is None:
            return None
        result: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        first = self.prompts[index // self.options.count][0]
        before = b""
        for entry in entries:
            token = first if entry is None else entry.token
            result["tokens"].append(self._text(token))
            result["token_logprobs"].append(None if entry is None else entry.logprob)
            result["top_logprobs"].append(None if entry is None else self._top(entry))
            result["text_offset"].append(offset + len(before.decode(errors="ignore")))
            before += self.served.language_model.tokenizer.bytes_of(token)
        return result

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Most likely tokens and, as the last one if it is none of them, the chosen token."""
        pairs = dict([*entry.top, (entry.token, entry.logprob)])
        return {self._text(token): value for token, value in pairs.items()}

    def _text(self, token: int) -> str:
        """Text of a token; ``bytes:\\xe6`` for a part of a character, as OpenAI's API has it."""
        data = self.served.language_model.tokenizer.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
