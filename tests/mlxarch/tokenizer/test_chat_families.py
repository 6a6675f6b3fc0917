"""Prompts of every family's chat template against transformers' (tests/fixtures/chat_families.json)."""

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mlxarch.errors import ChatTemplateError
from mlxarch.tokenizer.chat_template import ChatTemplate
from mlxarch.tokenizer.jinja import sandbox

FIXTURES = Path(__file__).parents[2] / "fixtures"
GOLDEN = json.loads((FIXTURES / "chat_families.json").read_text(encoding="utf-8"))
FAMILIES = sorted(GOLDEN["families"])


class Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2025, 7, 26, 12, 30, tzinfo=tz)


def template(family: str) -> ChatTemplate:
    text = (FIXTURES / "chat_templates" / family).read_text(encoding="utf-8")
    return ChatTemplate(text, GOLDEN["special"])


def prompt(found: ChatTemplate, conversation: str, options: dict[str, Any]) -> str:
    variables = dict(options)
    tools, generation = variables.pop("tools", None), variables.pop("add_generation_prompt", False)
    messages = GOLDEN["conversations"][conversation]
    return found.render(
        messages, add_generation_prompt=generation, tools=tools, variables=variables
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_and_refusal_equals_that_of_transformers(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "datetime", Clock)
    found, wanted = template(family), GOLDEN["families"][family]
    assert (
        prompt(found, "turns", {"add_generation_prompt": True}) == wanted["turns"]
    )  # text, for whoever looks
    for conversation, row in wanted["prompts"].items():
        for options, expected in zip(GOLDEN["options"], row, strict=True):
            if isinstance(expected, str):
                text = prompt(found, conversation, options)
                assert hashlib.sha256(text.encode()).hexdigest()[:16] == expected, (
                    conversation,
                    options,
                )
            else:
                with pytest.raises(ChatTemplateError) as refusal:
                    prompt(found, conversation, options)
                assert (expected["refused"] or "") in str(refusal.value), (conversation, options)
    assert sum(isinstance(each, str) for row in wanted["prompts"].values() for each in row) >= 120


@pytest.mark.parametrize(
    ("family", "switch"),
    [
        *((f"published/{name}.jinja", "enable_thinking") for name in ("qwen3", "smollm3")),
        *((f"{name}.jinja", "enable_thinking") for name in ("deepseek_v3", "glm4_moe")),
        ("deepseek_v3.jinja", "thinking"),
        ("published/gpt_oss.jinja", "reasoning_effort"),
    ],
)
def test_the_golden_prompts_tell_the_positions_of_a_thinking_switch_apart(
    family: str, switch: str
) -> None:
    positions = [
        index for index, each in enumerate(GOLDEN["options"]) if switch in each and len(each) == 2
    ][-2:]
    assert len({GOLDEN["options"][at][switch] for at in positions}) == 2
    first, second = (
        [row[at] for row in GOLDEN["families"][family]["prompts"].values()] for at in positions
    )
    assert sum(a != b for a, b in zip(first, second, strict=True)) >= 6


def test_every_family_that_chats_has_a_template_here() -> None:
    names = {Path(family).stem for family in FAMILIES}
    assert names >= {
        "llama3",
        "olmo2",
        "gemma",
        "mistral3",
        "llama4",
        "qwen3",
        "qwen3_coder",
        "smollm3",
    }
    assert names >= {
        "deepseek_v3",
        "kimi_k2",
        "gpt_oss",
        "grok2",
        "glm4_moe",
    }  # GPT-2 has none, Gemma 3n Gemma's
