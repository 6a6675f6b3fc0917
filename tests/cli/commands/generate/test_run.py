"""mlxarch run: prompts from everywhere, one answer, and what a program reads of it."""

import json

import pytest
from tiny_chat import script

import mlxarch


def answer_to(prompt: object, model: str, **settings: object) -> str:
    return mlxarch.load(model).generate(prompt, **settings).text  # type: ignore[arg-type]


def chat(text: str, system: str | None = None) -> list[dict[str, str]]:
    beginning = [{"role": "system", "content": system}] if system is not None else []
    return [*beginning, {"role": "user", "content": text}]


def test_the_answer_is_the_librarys_and_alone_on_standard_output(invoke, tiny):
    result = invoke("run", tiny, "What", "is it?", "-n", "12")
    assert result.exit_code == 0
    expected = answer_to(chat("What is it?"), tiny, max_tokens=12)
    assert result.stdout.rstrip("\n") == expected.replace("\x1b", "␛").rstrip("\n")
    assert "--max-tokens is reached" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "piped", "prompt"),
    [
        (["-p", "Hello"], None, "Hello"),
        ([], "from a pipe\n", "from a pipe"),
        (["sum up"], "a text\n", "a text\n\nsum up"),
        (["-"], "only the pipe", "only the pipe"),
        (["-f", "FILE", "sum up"], None, "of the file\n\nsum up"),
        (["-f", "FILE", "-p", "sum up"], "a pipe", "of the file\n\na pipe\n\nsum up"),
        (["-f", "-"], "\ufeffwith a mark", "with a mark"),
    ],
    ids=["-p", "pipe", "pipe and argument", "-", "-f", "all", "byte order mark"],
)
def test_prompts_come_from_everywhere(invoke, tiny, tmp_path, arguments, piped, prompt):
    (tmp_path / "file.txt").write_text("of the file\n")
    arguments = [str(tmp_path / "file.txt") if part == "FILE" else part for part in arguments]
    result = invoke("run", tiny, *arguments, "-n", "8", "--json", input=piped)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["text"] == answer_to(chat(prompt), tiny, max_tokens=8)


def test_another_prompt_gives_another_answer(tiny):
    prompts = (
        "Hello",
        "from a pipe",
        "a text\n\nsum up",
        "sum up\n\na text",
        "of the file\n\nsum up",
    )
    assert len({answer_to(chat(prompt), tiny, max_tokens=8) for prompt in prompts}) == len(prompts)


def test_the_system_prompt_and_raw_text_reach_the_model(invoke, tiny):
    system = json.loads(invoke("run", tiny, "Hi", "-s", "Be brief", "-n", "8", "--json").stdout)[
        "text"
    ]
    raw = json.loads(invoke("run", tiny, "Hi", "--raw", "-n", "8", "--json").stdout)["text"]
    assert system == answer_to(chat("Hi", "Be brief"), tiny, max_tokens=8)
    assert raw == answer_to("Hi", tiny, max_tokens=8)
    assert len({system, raw, answer_to(chat("Hi"), tiny, max_tokens=8)}) == 3


def test_json_has_text_reason_and_timings(invoke, tiny):
    result = invoke("run", tiny, "Hi", "-n", "5", "--json")
    assert result.stdout.count("\n") == 1
    report = json.loads(result.stdout)
    assert set(report) == {"model", "text", "thinking", "finish_reason", "timings", "memory"}
    memory = report["memory"]
    assert (
        memory["peak_bytes"]
        > memory["peak_mlx_bytes"]
        > 0
        < memory["planned_mlx_bytes"]
        < memory["planned_bytes"]
    )
    assert (report["model"], report["finish_reason"]) == (tiny, "length")
    timings = report["timings"]
    assert set(timings) == {
        *(
            "prompt_tokens",
            "reused_tokens",
            "dropped_tokens",
            "generated_tokens",
            "time_to_first_token",
        ),
        *("prefill_seconds", "decode_seconds", "prefill_rate", "decode_rate"),
    }
    assert (timings["generated_tokens"], timings["reused_tokens"], timings["prompt_tokens"]) == (
        5,
        0,
        4,
    )
    assert timings["time_to_first_token"] > 0


def test_what_a_full_context_leaves_out_is_said_once(invoke, tiny):
    result = invoke(
        "run", tiny, "Hi " * 60, "-n", "5", "-c", "64", "--overflow", "keep-ends", "--json"
    )
    dropped = json.loads(result.stdout)["timings"]["dropped_tokens"]
    assert dropped > 0 and result.stderr.count("context") == 1
    assert (
        f"the context was full: {dropped} tokens behind the opening are left out" in result.stderr
    )


def test_json_keeps_control_characters_from_the_terminal_and_loses_none(invoke, tiny):
    result = invoke("run", tiny, "Hi", "-n", "300", "--temp", "100", "--seed", "3", "--json")
    assert "\x1b" not in result.stdout
    assert "\x1b" in json.loads(result.stdout)["text"]


def test_escape_sequences_of_a_model_do_not_reach_the_output(invoke, tiny):
    result = invoke("run", tiny, "Hi", "-n", "300", "--temp", "100", "--seed", "3")
    assert "\x1b" not in result.stdout and "␛" in result.stdout


def test_the_seed_decides_and_options_reach_the_sampler(invoke, tiny):
    def sampled(*arguments: str) -> str:
        return invoke("run", tiny, "Hi", "-n", "30", *arguments).stdout

    assert sampled("--temp", "2", "--seed", "1") == sampled("--temperature", "2", "--seed", "1")
    assert sampled("--temp", "2", "--seed", "1") != sampled("--temp", "2", "--seed", "2")
    assert sampled("--temp", "2", "--seed", "1", "--top-k", "1") == sampled()
    assert sampled("--temp", "2", "--seed", "1", "--top-p", "0.0001") == sampled()
    assert sampled("--temp", "2", "--seed", "1", "--min-p", "1") == sampled()
    assert sampled("--repetition-penalty", "5") != sampled()


def test_sampling_is_the_makers_advice_until_an_option_replaces_it(invoke, tmp_path, tiny):
    import shutil

    folder = shutil.copytree(tiny, tmp_path / "advised")
    advice = {"do_sample": True, "temperature": 2.0, "top_k": 1}
    (folder / "generation_config.json").write_text(json.dumps(advice))
    greedy = invoke("run", tiny, "Hi", "-n", "30").stdout
    assert invoke("run", str(folder), "Hi", "-n", "30", "--seed", "1").stdout == greedy, (
        "top_k 1 is greedy"
    )
    assert (
        invoke("run", str(folder), "Hi", "-n", "30", "--seed", "1", "--top-k", "0").stdout != greedy
    )


def test_stop_strings_and_stats(invoke, tiny):
    whole = json.loads(invoke("run", tiny, "Hi", "-n", "20", "--json").stdout)["text"]
    result = invoke("run", tiny, "Hi", "-n", "20", "--stop", whole[5:8], "--json", "--stats")
    assert json.loads(result.stdout)["text"] == whole[: whole.index(whole[5:8])]
    assert json.loads(result.stdout)["finish_reason"] == "stop"
    assert "tokens/s" in result.stderr and "first token after" in result.stderr


@pytest.mark.parametrize("command", ["run", "chat", "fit", "tune"])
@pytest.mark.parametrize(
    "name", ["-c", "--context", "--ctx", "--ctx-size", "--context-length", "--max-context"]
)
def test_the_context_has_every_usual_name(invoke, tiny, command, name):
    result = invoke(command, tiny, name, "-7")
    assert result.exit_code == 2 and "no number of tokens" in result.stderr
    assert "No such option" in invoke(command, tiny, name + "x", "-7").stderr or name == "-c"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temp", "-1"],
        ["--temp", "nan"],
        ["--top-p", "0"],
        ["--top-p", "x"],
        ["--min-p", "2"],
        ["--seed", "-1"],
        ["-n", "0"],
        ["--context", "0"],
        ["--ctx", "5000"],
        ["--bits", "7"],
        ["--dtype", "float64"],
        ["-p", "again"],
        ["--stop", ""],
    ],
    ids=" ".join,
)
def test_values_out_of_range_are_wrong_usage(invoke, tiny, arguments):
    result = invoke("run", tiny, "Hi", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("mlxarch: error: ")


def test_a_prompt_is_needed_and_must_be_text(invoke, tiny):
    assert invoke("run", tiny).exit_code == 2
    assert invoke("run", tiny, input="\n \n").exit_code == 2
    result = invoke("run", tiny, input=b"caf\xe9")
    assert result.exit_code == 2 and "byte 3 is 0xe9" in result.stderr
    assert invoke("run", tiny, "-f", "/nonexistent/file").exit_code == 1


def test_an_unknown_model_offers_three(invoke):
    result = invoke("run", "qwen3-9b", "Hi")
    assert result.exit_code == 3
    assert (
        len([name for name in ("qwen3-8b", "qwen3-4b", "qwen3-0.6b") if name in result.stderr]) >= 2
    )


def test_the_model_comes_from_an_option_or_the_environment(invoke, tiny, monkeypatch):
    expected = invoke("run", tiny, "Hi", "you", "-n", "8").stdout
    assert invoke("run", "-m", tiny, "Hi", "you", "-n", "8").stdout == expected
    assert invoke("run").exit_code == 2
    monkeypatch.setenv("MLXARCH_MODEL", tiny)
    assert invoke("run", "Hi you", "-n", "8").stdout == expected
    assert invoke("run", "-p", "Hi you", "-n", "8").stdout == expected
    monkeypatch.setenv("MLXARCH_MODEL", "no-such-model")
    assert invoke("run", tiny, "Hi", "you", "-n", "8").stdout == expected


def test_the_context_is_kept_and_comes_from_the_environment_too(invoke, tiny, monkeypatch):
    monkeypatch.setenv("MLXARCH_CONTEXT", "10")
    result = invoke("run", tiny, "Hi")
    assert result.exit_code == 0 and "the context of 10 tokens is reached" in result.stderr
    result = invoke("run", tiny, "a prompt that is too long")
    assert result.exit_code == 1 and "context of 10 tokens" in result.stderr
    assert "context of 12" in invoke("run", tiny, "Hi", "-c", "12").stderr


def test_a_base_model_completes_and_takes_no_system_prompt(invoke, tiny_base):
    result = invoke("run", tiny_base, "Once upon", "-n", "8", "--json")
    assert json.loads(result.stdout)["text"] == answer_to("Once upon", tiny_base, max_tokens=8)
    refused = invoke("run", tiny_base, "Once", "-s", "Be brief")
    assert refused.exit_code == 2 and "no chat template" in refused.stderr


def test_an_answer_follows_a_schema_from_a_file_or_from_the_option(invoke, tiny, tmp_path):
    schema = {"type": "array", "items": {"enum": ["a", "bb"]}, "minItems": 2, "maxItems": 2}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    from_file = invoke("run", tiny, "Hi", "--schema", str(tmp_path / "schema.json"))
    assert from_file.exit_code == 0, from_file.stderr
    answer = json.loads(from_file.stdout)
    assert len(answer) == 2 and set(answer) <= {"a", "bb"}
    wrapped = json.dumps({"allOf": [schema], "not": {"minItems": 2}})
    inline = invoke("run", tiny, "Hi", "--schema", wrapped)
    assert json.loads(inline.stdout) == answer
    assert "#/not is not held" in inline.stderr
    assert "does not match the schema: $ breaks not" in inline.stderr


@pytest.mark.parametrize(
    ("schema", "reason"), [("{", "not JSON"), ('{"type": "x"}', "Invalid type")]
)
def test_a_broken_schema_is_refused(invoke, tiny, schema, reason):
    result = invoke("run", tiny, "Hi", "--schema", schema)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert not result.stdout


def test_an_answer_that_repeats_itself_is_stopped(invoke, tiny, monkeypatch):
    script(monkeypatch, tiny, "ab" * 300)
    stopped = invoke("run", tiny, "Hi", "-n", "500")
    assert (
        len(stopped.stdout.strip()) == 128 and "repeats itself; --no-loop-guard" in stopped.stderr
    )
    script(monkeypatch, tiny, "ab" * 300)
    assert len(invoke("run", tiny, "Hi", "-n", "500", "--no-loop-guard").stdout.strip()) == 500


def test_a_question_without_a_model_says_how_to_name_one(invoke):
    ended = invoke("run", "Why is the sky blue?")
    assert ended.exit_code == 2 and "`mlxarch run MODEL 'Why is the sky blue?'`" in ended.stderr


def test_a_prompt_that_is_too_long_names_the_options(invoke, tiny):
    ended = invoke("run", tiny, "x" * 5000)
    assert ended.exit_code == 1 and "--overflow keep-ends" in ended.stderr


def test_a_budget_that_is_too_small_names_the_options(invoke, tiny):
    ended = invoke("run", tiny, "Hi", "--memory", "1MB")
    assert ended.exit_code == 4 and "-c 2k" in ended.stderr
