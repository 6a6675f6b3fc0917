"""Prompts against transformers' (tests/fixtures/chat_golden.json); where templates are found; refusals."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mlxarch.errors import ChatTemplateError, InvalidInput, MlxArchError
from mlxarch.tokenizer.chat_template import (
    RESERVED_VARIABLES,
    ChatTemplate,
    choose_template,
    find_templates,
)
from mlxarch.tokenizer.jinja import sandbox
from mlxarch.tokenizer.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"
GOLDEN = json.loads((FIXTURES / "chat_golden.json").read_text(encoding="utf-8"))
USER = [{"role": "user", "content": "hi"}]
ECHO = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


class Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2025, 7, 26, 12, 30, tzinfo=tz)


def render(source: str, messages: Any = USER, **arguments: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        messages, **arguments
    )


def prompt(template: ChatTemplate, messages: Any, options: dict[str, Any]) -> str:
    variables = {
        name: value
        for name, value in options.items()
        if name not in ("add_generation_prompt", "tools")
    }
    return template.render(
        messages,
        add_generation_prompt=options.get("add_generation_prompt", False),
        tools=options.get("tools"),
        variables=variables,
    )


TEMPLATES = sorted({(folder, name) for folder, name, *_ in GOLDEN["cases"]})


@pytest.mark.parametrize(("folder", "name"), TEMPLATES)
def test_prompts_and_refusals_equal_those_of_transformers(
    folder: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sandbox, "datetime", Clock)
    tokenizer = Tokenizer.from_folder(FIXTURES / "tokenizers" / folder)
    source = (
        (FIXTURES / "chat_templates" / name).read_text(encoding="utf-8")
        if name
        else tokenizer._templates["default"]
    )
    template = ChatTemplate(source, tokenizer._special_tokens)
    rendered = 0
    for conversation, option, expected in (
        case[2:] for case in GOLDEN["cases"] if case[:2] == [folder, name]
    ):
        messages, options = GOLDEN["conversations"][conversation], GOLDEN["options"][option]
        if isinstance(expected, str):
            assert prompt(template, messages, options) == expected, (conversation, option)
            rendered += 1
        else:
            with pytest.raises(ChatTemplateError) as refusal:
                prompt(template, messages, options)
            assert (expected["refused"] or "") in str(refusal.value), (conversation, option)
    assert rendered >= 40


@pytest.mark.parametrize(("option", "without"), [(1, 0), (2, 1), (3, 1), (4, 0)])
def test_a_template_that_missed_an_option_could_not_equal_the_golden_prompts(
    option: int, without: int
):
    texts = {(*case[:3], case[3]): case[4] for case in GOLDEN["cases"]}
    changed = [
        key for key, text in texts.items() if key[3] == option and text != texts[*key[:3], without]
    ]
    assert len({name for _, name, *_ in changed}) >= 1 and len(changed) >= 10


def test_a_refusal_passes_on_what_the_template_says():
    with pytest.raises(ChatTemplateError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_missing_special_token_is_empty_and_a_present_one_is_not():
    assert render("[{{ bos_token }}{{ pad_token }}]") == "[<s>]"


def test_fields_that_are_none_count_as_missing():
    source = "{% for m in messages %}{{ 'content' in m }}{{ 'tool_calls' in m }}{% endfor %}"
    assert render(source, [{"role": "user", "content": None, "tool_calls": []}]) == "FalseTrue"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_goes_by_all_its_names(name: str):
    source = "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}"
    text = "because"
    assert render(source, [{"role": "assistant", "content": "x", name: text}]) == "because|because"


@pytest.mark.parametrize("name", sorted(RESERVED_VARIABLES) + ["_x", "a b", "a.b", ""])
def test_variables_with_reserved_names_are_refused(name: str):
    with pytest.raises(InvalidInput, match="not allowed as a variable"):
        render("x", variables={name: "{{ 1 }}"})


def test_a_client_cannot_bring_a_template():
    tokenizer = Tokenizer.from_folder(FIXTURES / "tokenizers" / "qwen3")
    with pytest.raises(InvalidInput, match="'chat_template' is not allowed"):
        tokenizer.apply_chat_template(USER, chat_template="{{ 7 * 7 }}")
    assert "49" not in tokenizer.apply_chat_template(
        [{"role": "user", "content": "{{ 7 * 7 }}"}], tokenize=False
    )


class Dangerous:
    def __str__(self) -> str:
        raise AssertionError("a template must not reach this")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        {"role": "user"},
        ["hi"],
        [{"content": "no role"}],
        [{"role": 5, "content": "x"}],
        [{"role": "user", "content": Dangerous()}],
        [{"role": "user", "content": {"a": [Dangerous()]}}],
        [{"role": "user", "content": {1: "x"}}],
        [{"role": "user", "content": b"x"}],
        [{"role": "user", "content": {1, 2}}],
    ],
)
def test_messages_of_another_form_are_refused(messages: Any):
    with pytest.raises(InvalidInput):
        render(ECHO, messages)


def test_content_that_nests_too_deeply_is_refused():
    content: Any = "x"
    for _ in range(100):
        content = [content]
    with pytest.raises(InvalidInput, match="nests deeper"):
        render(ECHO, [{"role": "user", "content": content}])


def test_the_messages_stay_as_they_were():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x"}], "name": None, "reasoning": "y"}
    ]
    before = json.dumps(messages)
    render("{% set m = messages[0] %}{{ m.content }}", messages)
    assert json.dumps(messages) == before


def test_a_long_conversation_renders_within_the_limits():
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": "word " * 150} for i in range(1000)
    ]
    for name in ("qwen3_thinking", "gemma", "mistral_inst", "chatml_default_system"):
        source = (FIXTURES / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        assert len(render(source, messages)) > 700_000


# where templates are found


def folder_with(tmp_path: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def found(tmp_path: Path, files: dict[str, Any]) -> dict[str, str]:
    folder = folder_with(tmp_path, files)
    settings = (
        json.loads((folder / "tokenizer_config.json").read_text())
        if "tokenizer_config.json" in files
        else {}
    )
    return find_templates(folder, settings)


CONFIG = {"tokenizer_config.json": {"chat_template": "config"}}
NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


def test_sources_come_in_their_order(tmp_path: Path):
    assert find_templates(tmp_path, {}) == {}
    assert found(tmp_path, CONFIG) == {"default": "config"}
    with_json = CONFIG | {"chat_template.json": {"chat_template": "json"}}
    assert found(tmp_path, with_json) == {"default": "json"}
    assert found(tmp_path, with_json | {"chat_template.jinja": "jinja"}) == {"default": "jinja"}


def test_named_templates_are_found_and_chosen(tmp_path: Path):
    templates = found(
        tmp_path,
        {
            "tokenizer_config.json": {"chat_template": NAMED},
            "additional_chat_templates/rag.jinja": "rag",
            "additional_chat_templates/notes.txt": "no",
        },
    )
    assert templates == {"default": "plain", "tool_use": "tools", "rag": "rag"}
    assert choose_template(templates, None) == "plain"
    assert choose_template(templates, []) == choose_template(templates, [{}]) == "tools"
    assert choose_template({"default": "plain"}, [{}]) == "plain"
    assert choose_template({"only": "one"}, None) == "one"
    assert choose_template({"a": "1", "b": "2"}, None) is None
    assert choose_template({}, None) is None


def test_tools_choose_the_template_of_the_tokenizer(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "tokenizers" / "qwen3", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": NAMED}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(USER, tokenize=False) == "plain"
    assert tokenizer.apply_chat_template(USER, tools=[{"name": "f"}], tokenize=False) == "tools"


@pytest.mark.parametrize(
    "value", [5, [], [5], [{"name": "x"}], [{"name": 1, "template": "x"}], {"name": "x"}, True]
)
def test_a_template_of_another_form_is_refused(tmp_path: Path, value: Any):
    files = {"tokenizer_config.json": {"chat_template": value}}
    if value == []:
        assert found(tmp_path, files) == {}
    else:
        with pytest.raises(ChatTemplateError, match="chat_template is"):
            found(tmp_path, files)


def test_template_files_that_are_not_what_they_must_be_are_refused(tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ChatTemplateError, match="not UTF-8"):
        find_templates(tmp_path, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * ((256 << 10) + 1))
    with pytest.raises(ChatTemplateError, match="262145 bytes, and at most 262144"):
        find_templates(tmp_path, {})
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").symlink_to("/etc/passwd")
    with pytest.raises(MlxArchError, match="symbolic link"):
        find_templates(tmp_path, {})


def test_named_template_files_may_be_links_only_into_the_hubs_cache(tmp_path: Path):
    repository = tmp_path / "models--org--name"
    folder = repository / "snapshots" / "0123"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abcd").write_text("linked")
    link = folder / "additional_chat_templates" / "tool_use.jinja"
    link.symlink_to("../../../blobs/abcd")
    assert find_templates(folder, {}) == {"tool_use": "linked"}
    link.unlink()
    link.symlink_to("/etc/passwd")
    with pytest.raises(ChatTemplateError, match="symbolic link out of"):
        find_templates(folder, {})
