"""``mlxarch run``: answer one prompt."""

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxarch.cli import options
from mlxarch.cli.chat.receive import LOOP_NOTE, STOPPED, Answer, dropped_tokens_note, receive_answer
from mlxarch.cli.output import is_terminal, print_json, print_stderr
from mlxarch.cli.prompt_progress import PromptProgress
from mlxarch.cli.render import NullWriter, make_answer_writer, make_thinking_writer
from mlxarch.cli.stats import (
    kernels_line,
    memory_line,
    memory_stats,
    streaming_line,
    streaming_stats,
    timings_line,
    timings_stats,
)
from mlxarch.errors import InvalidInput
from mlxarch.generation.thinking.switches import switches

if TYPE_CHECKING:
    from mlxarch.language_model import LanguageModel
    from mlxarch.structured_output.matcher import Grammar


@click.command("run")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]...")
@options.model_option
@click.option("-p", "--prompt", metavar="TEXT", help="Prompt (default: the arguments)")
@click.option(
    "-f",
    "--file",
    metavar="FILE",
    help="Text file to put before the prompt; - for standard input (default: none)",
)
@options.answer_options
@options.thinking_options
@options.sampling_options
@options.loading_options
@click.option(
    "--schema",
    metavar="FILE|JSON",
    help="JSON schema of the answer, as a file or as text that begins with { (default: none)",
)
@click.option("--raw", is_flag=True, help="Continue the prompt without the chat template.")
@click.option(
    "--parse-special/--no-parse-special",
    default=None,
    help="Take control tokens that the prompt spells as tokens, or as text (default: as tokens "
    "without the chat template, as text with it).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the complete answer as JSON.")
def run_command(
    words: tuple[str, ...],
    model_flag: str | None,
    prompt: str | None,
    file: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer one prompt.

    The prompt is an argument, or comes from -p, a file or a pipe. Text from a file or a pipe is put
    before the others, separated by an empty line:

    \b
      mlxarch run smollm2-135m "Why is the sky blue?"
      git diff | mlxarch run qwen3-8b "Write a commit message for this."
      mlxarch run qwen3-4b "Name a planet." --schema '{"properties": {"name": {"type": "string"}}}'

    The answer goes to standard output. Sampling options that are not given follow the
    recommendation of the model's makers.
    """
    name, words = _split_model_and_prompt(model_flag, words, prompt is not None)
    text = _read_prompt(words, prompt, file)
    if given["system"] is not None and given["raw"]:
        raise click.UsageError("a system prompt needs the chat template, which --raw leaves out")
    if (given["think"] is not None or given["effort"]) and given["raw"]:
        raise click.UsageError(
            "--think, --no-think and --effort need the chat template, which --raw leaves out"
        )
    from mlxarch.system.backend import require_backend

    require_backend()
    sampling = options.given_sampling(given)
    schema = None if given["schema"] is None else _read_schema(given["schema"])
    model = options.load_model(name, **given)
    grammar = None if schema is None else model.grammars.json_schema(schema)
    answer = _generate_answer(model, name, text, sampling, as_json, given, grammar)
    if as_json:
        _print_answer_json(model, name, answer)
    if grammar is not None:
        _print_schema_notes(grammar, answer)
    _print_notes(model, answer, given)
    if answer.finish_reason == STOPPED:
        raise KeyboardInterrupt


def _split_model_and_prompt(
    model_flag: str | None, words: tuple[str, ...], has_prompt: bool
) -> tuple[str, tuple[str, ...]]:
    """Split the arguments into the model's name and the words of the prompt.

    With -m, all words are the prompt; so they are with MLXARCH_MODEL, unless the first is a model.

    Raises:
        click.UsageError: no model is named.
    """
    if model_flag or not words:
        return options.resolve_model_name(model_flag, None), words
    from mlxarch.store.names import is_name

    default = os.environ.get("MLXARCH_MODEL")
    if default and not has_prompt and not is_name(words[0]):
        return default, words
    if " " in words[0].strip() and not is_name(words[0]):
        raise click.UsageError(
            f"no model is named: write `mlxarch run MODEL {shlex.quote(words[0])}`, or set "
            "MLXARCH_MODEL; `mlxarch list` shows which models there are"
        )
    return words[0], words[1:]


def _read_prompt(words: tuple[str, ...], prompt: str | None, file: str | None) -> str:
    """Join the file, standard input, and the argument or -p, in this order.

    Raises:
        click.UsageError: there is no prompt, or it is given twice.
        InvalidInput: one of them is not UTF-8.
    """
    if words and prompt is not None:
        raise click.UsageError("the prompt is given twice, as an argument and with -p")
    typed = prompt if prompt is not None else " ".join(words)
    wants_stdin = typed == "-" or file == "-"
    parts = [] if file in (None, "-") else [options.decode_utf8(Path(file).read_bytes(), file)]
    if sys.stdin is not None and (wants_stdin or not is_terminal(sys.stdin)):
        parts.append(options.decode_utf8(sys.stdin.buffer.read(), "standard input"))
    if typed != "-":
        parts.append(options.decode_utf8(os.fsencode(typed), "the prompt", end=""))
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise click.UsageError(
            "there is no prompt: give it as an argument, with -p, with -f or through a pipe"
        )
    return text


def _read_schema(given: str) -> Any:
    """Read the schema from a file, or from the option itself if it is JSON.

    Raises:
        InvalidInput: it is not JSON.
    """
    text = (
        given
        if given.lstrip().startswith("{")
        else options.decode_utf8(Path(given).read_bytes(), given)
    )
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"--schema is not JSON: {error}") from None


def _print_schema_notes(grammar: "Grammar", answer: Answer) -> None:
    """Print what of the schema was not held while the model wrote, and what the answer breaks."""
    for warning in grammar.warnings:
        print_stderr(f"mlxarch: --schema: {warning}")
    if answer.finish_reason != "stop":
        return
    try:
        broken = grammar.violations(json.loads(answer.text))
    except ValueError as error:
        broken = [f"it is not JSON, as it was cut off ({error})"]
    for each in broken:
        print_stderr(f"mlxarch: the answer does not match the schema: {each}")


def _generate_answer(
    model: "LanguageModel",
    name: str,
    text: str,
    sampling: dict[str, Any],
    as_json: bool,
    given: dict[str, Any],
    grammar: "Grammar | None",
) -> Answer:
    """Generate the answer and write it, unless it is printed as JSON later."""
    thinking = switches(model.tokenizer, given["think"], given["effort"])
    for warning in thinking.warnings:
        print_stderr(f"mlxarch: {name} {warning}")
    progress = PromptProgress()
    pieces = model.stream(
        _build_messages(model, text, thinking.system(given["system"]), given["raw"]),
        template=thinking.variables,
        max_tokens=given["max_tokens"],
        stop=given["stop"],
        overflow=given["overflow"],
        grammar=grammar,
        sampling=replace(model.recommended_sampling, **sampling),
        loop_guard=given["loop_guard"],
        parse_special=given["parse_special"],
        on_prompt=progress,
    )
    writer = NullWriter() if as_json else make_answer_writer(given["plain"])
    thinking_writer = make_thinking_writer(as_json or given["hide_thinking"])
    return receive_answer(pieces, writer, thinking_writer, progress)


def _build_messages(
    model: "LanguageModel", text: str, system: str | None, raw: bool
) -> str | list[dict[str, str]]:
    """Build the messages for the chat template; without one, return the text itself."""
    if raw or not model.tokenizer.has_chat_template:
        if system is not None:
            raise InvalidInput(
                f"{model.path.name} has no chat template, so there is no place for a system prompt"
            )
        return text
    system_message = [] if system is None else [{"role": "system", "content": system}]
    return [*system_message, {"role": "user", "content": text}]


def _print_answer_json(model: "LanguageModel", name: str, answer: Answer) -> None:
    report = {
        "model": name,
        "text": answer.text,
        "thinking": answer.thinking,
        "finish_reason": answer.finish_reason,
        "timings": timings_stats(answer.timings),
        "memory": memory_stats(model),
    }
    if streaming := streaming_stats(model):
        report["streaming"] = streaming
    print_json(report)


def _print_notes(model: "LanguageModel", answer: Answer, given: dict[str, Any]) -> None:
    """Print the statistics if asked for, and why the answer or the prompt is incomplete."""
    if given["stats"]:
        print_stderr(timings_line(answer.timings, long=True), dim=True)
        print_stderr(memory_line(model), dim=True)
        if kernels := kernels_line():
            print_stderr(kernels, dim=True)
        if streaming := streaming_line(model):
            print_stderr(streaming, dim=True)
    if note := dropped_tokens_note(answer.timings):
        print_stderr(f"mlxarch: {note}", dim=True)
    if answer.finish_reason == "loop":
        print_stderr(f"mlxarch: {LOOP_NOTE}", dim=True)
    if answer.finish_reason == "length":
        limit = "--max-tokens"
        if not given["max_tokens"]:
            limit = f"the context of {model.context_length} tokens"
        part = "thinking" if answer.thinking and not answer.text else "answer"
        print_stderr(f"mlxarch: the {part} is cut off: {limit} is reached", dim=True)
