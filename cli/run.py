"""``mlxarch run``: one prompt, one answer."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxarch.cli import options
from mlxarch.cli.answer import STOPPED, Answer, left_out, receive
from mlxarch.cli.output import answer_json, is_terminal, say
from mlxarch.cli.render import Silence, thoughts, writer
from mlxarch.cli.stats import memory_line, memory_stats, stats, stats_line, streaming_line, streaming_stats
from mlxarch.errors import InvalidInput, ModelNotFound

if TYPE_CHECKING:
    from mlxarch.language_model import LanguageModel


@click.command("run")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]...")
@options.model_option
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt, if not an argument.")
@click.option("-f", "--file", metavar="FILE", help="A text file that goes before the prompt; - is standard input.")
@options.answer_options
@options.thinking_options
@options.sampling_options
@options.loading_options
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, when the answer is complete.")
def run_command(
    words: tuple[str, ...], named: str | None, prompt: str | None, file: str | None, as_json: bool, **given: Any
) -> None:
    """Answer one prompt.

    The prompt is an argument, or comes from -p, from a file or through a pipe; a text from a file or a pipe goes before
    the others, with an empty line between:

    \b
      mlxarch run smollm2-135m "Why is the sky blue?"
      git diff | mlxarch run qwen3-8b "Write a commit message for this."

    The answer goes to standard output. Sampling is as the model's makers recommend, unless an option says otherwise.
    """
    name, words = _named(named, words, prompt is not None)
    text = _prompt(words, prompt, file)
    if given["system"] is not None and given["raw"]:
        raise click.UsageError("a system prompt needs the chat template, which --raw leaves out")
    if (given["think"] is not None or given["effort"]) and given["raw"]:
        raise click.UsageError("--think, --no-think and --effort need the chat template, which --raw leaves out")
    from mlxarch.backend import require_backend

    require_backend()
    sampling = options.chosen_sampling(given)
    model = options.open_model(name, **given)
    from mlxarch.thinking import switches

    switched = switches(model.tokenizer, given["think"], given["effort"])
    for warning in switched.warnings:
        say(f"mlxarch: {name} {warning}")
    pieces = model.stream(
        _messages(model, text, switched.system(given["system"]), given["raw"]),
        template=switched.variables,
        max_tokens=given["max_tokens"],
        stop=given["stop"],
        overflow=given["overflow"],
        sampling=replace(model.recommended_sampling, **sampling),
    )
    out = Silence() if as_json else writer(given["plain"])
    answer = receive(pieces, out, thoughts(as_json or given["hide_thinking"]))
    if as_json:
        streamed = streaming_stats(model)
        told = {"model": name, **_outcome(answer), "memory": memory_stats(model)}
        answer_json(told | ({"streaming": streamed} if streamed else {}))
    if given["stats"]:
        say(stats_line(answer.timings, long=True), dim=True)
        say(memory_line(model), dim=True)
        if streamed := streaming_line(model):
            say(streamed, dim=True)
    if note := left_out(answer.timings):
        say(f"mlxarch: {note}", dim=True)
    if answer.finish_reason == "length":
        limit = "--max-tokens" if given["max_tokens"] else f"the context of {model.context_length} tokens"
        what = "thinking" if answer.thinking and not answer.text else "answer"
        say(f"mlxarch: the {what} is cut off: {limit} is reached", dim=True)
    if answer.finish_reason == STOPPED:
        raise KeyboardInterrupt


def _named(named: str | None, words: tuple[str, ...], has_prompt: bool) -> tuple[str, tuple[str, ...]]:
    """The model, and the words of the prompt.

    With -m all words are the prompt. With MLXARCH_MODEL they are too, if no model goes by the first of them.
    """
    if named or not words:
        return options.the_model(named, None), words
    default = os.environ.get("MLXARCH_MODEL")
    if default and not has_prompt and not _is_model(words[0]):
        return default, words
    return words[0], words[1:]


def _is_model(word: str) -> bool:
    from mlxarch import catalog

    try:
        catalog.parse(word)
    except ModelNotFound:
        return False
    return True


def _prompt(words: tuple[str, ...], prompt: str | None, file: str | None) -> str:
    """All that was given, in the order file, standard input, argument."""
    if words and prompt is not None:
        raise click.UsageError("the prompt is given twice, as an argument and with -p")
    typed = prompt if prompt is not None else " ".join(words)
    wants_stdin = typed == "-" or file == "-"
    parts = [] if file in (None, "-") else [_decoded(Path(file).read_bytes(), file)]
    if sys.stdin is not None and (wants_stdin or not is_terminal(sys.stdin)):
        parts.append(_decoded(sys.stdin.buffer.read(), "standard input"))
    if typed != "-":
        parts.append(_decoded(os.fsencode(typed), "the prompt", end=""))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise click.UsageError("there is no prompt: give it as an argument, with -p, with -f or through a pipe")
    return text


def _decoded(data: bytes, name: str, end: str = "\n") -> str:
    try:
        return data.decode("utf-8-sig").rstrip(end)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is no text in UTF-8: byte {error.start} is {data[error.start]:#04x}") from error


def _messages(model: "LanguageModel", text: str, system: str | None, raw: bool) -> str | list[dict[str, str]]:
    if raw or not model.tokenizer.has_chat_template:
        if system is not None:
            raise InvalidInput(f"{model.path.name} has no chat template, so there is no place for a system prompt")
        return text
    beginning = [] if system is None else [{"role": "system", "content": system}]
    return [*beginning, {"role": "user", "content": text}]


def _outcome(answer: Answer) -> dict[str, Any]:
    said = {"text": answer.text, "thinking": answer.thinking}
    return {**said, "finish_reason": answer.finish_reason, "timings": stats(answer.timings)}
