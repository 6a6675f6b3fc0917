"""Templates that try to break out or to use up time and memory: each ends soon, in a refusal or in harmless text."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mlxarch.errors import ChatTemplateError
from mlxarch.tokenizer.chat_template import ChatTemplate
from mlxarch.tokenizer.jinja import limits

SCRIPT = Path(__file__).parents[2] / "support" / "hostile_templates.py"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[str, float, float, float]]:
    import json

    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        name: (outcome, seconds, allowed, peak) for name, outcome, seconds, allowed, peak in lines
    }


def test_every_template_ends_soon_after_its_time_and_below_512_mb(
    results: dict[str, tuple[str, float, float, float]],
):
    assert len(results) >= 37 + 29
    slow = {
        name: seconds
        for name, (_, seconds, allowed, _) in results.items()
        if seconds >= allowed + 1
    }
    assert slow == {}
    assert max(peak for *_, peak in results.values()) < 512
    assert (
        sum("longer than 2 s" in outcome for outcome, *_ in results.values()) >= 3
    )  # the clock did stop some
    assert sum("longer than 0.25 s" in outcome for outcome, *_ in results.values()) >= 3


def test_no_template_breaks_out(results: dict[str, tuple[str, float, float, float]]):
    harmless = {"text: ", "text: [Undefined]"}
    for name, (outcome, *_) in results.items():
        if outcome.startswith("text: ") and outcome not in harmless:
            for trace in (
                "<class",
                "<module",
                "root:",
                "uid=",
                "built-in",
                "environment",
                "/",
                "hello",
            ):
                assert trace not in outcome, (name, outcome)


def test_most_are_refused_in_words(results: dict[str, tuple[str, float, float, float]]):
    refused = [outcome for outcome, *_ in results.values() if outcome.startswith("refused: ")]
    assert len(refused) > 0.85 * len(results)
    assert all(outcome.startswith("refused: The chat template ") for outcome in refused)
    assert sum("exceeds a limit: it " in outcome for outcome in refused) > 40


def render(source: str, messages: Any = MESSAGES) -> str:
    return ChatTemplate(source, {}).render(messages)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'ab' * 3 }}{{ [1] * 2 }}", "ababab[1, 1]"),
        ("{{ 2 ** 100 }}", str(2**100)),
        ("{{ '%5d|%-5s|%.2f' % (1, 'a', 2.5) }}", "    1|a    |2.50"),
        ("{{ '{:>5}|{:.2f}|{x}'.format(1, 2.5, x='y') }}", "    1|2.50|y"),
        ("{{ 'a'.center(5) }}|{{ 'a'|center(5) }}|{{ 'a\nb'|indent(2) }}", "  a  |  a  |a\n  b"),
        (
            "{% for i in range(3) %}{% for j in range(2) %}{{ i }}{{ j }} {% endfor %}{% endfor %}",
            "00 01 10 11 20 21 ",
        ),
        (
            "{{ ','.join(['a', 'b']) }}{{ 'aa'.replace('a', 'bb') }}{{ range(5)|join('-') }}",
            "a,bbbbb0-1-2-3-4",
        ),
        (
            "{% set ns = namespace(l=[]) %}{% for i in range(3) %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.l }}",
            "[0, 1, 2]",
        ),
        ("{{ ([1, 2] == [1, 2]) }}{{ 'x'[0:5] }}{{ {'a': (1, 2)} }}", "Truex{'a': (1, 2)}"),
    ],
)
def test_the_same_operators_work_within_the_limits(source: str, text: str):
    assert render(source) == text


def test_a_limit_is_a_limit_and_not_a_wall_before_it():
    n = limits.MAX_CHARACTERS
    assert len(render("{{ 'a' * " + str(n) + " }}")) == n
    with pytest.raises(ChatTemplateError, match=f"more than {n} characters"):
        render("{{ 'a' * " + str(n) + " }}b")


def test_a_template_that_was_stopped_can_be_used_again():
    template = ChatTemplate(
        "{% for m in messages %}{% for i in range(m.content) %}{{ 7 ** i }}{% endfor %}{% endfor %}",
        {},
    )
    with pytest.raises(ChatTemplateError, match="limit"):
        template.render([{"role": "user", "content": 99_999}])
    assert template.render([{"role": "user", "content": 3}]) == "1749"


def test_two_threads_share_a_template():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    texts: list[str] = []

    def work(number: int) -> None:
        for _ in range(50):
            texts.append(template.render([{"role": "user", "content": str(number)}] * 9))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(str(number) * 9 for number in range(4) for _ in range(50))


@pytest.mark.parametrize(
    "name", ["wordwrap", "urlize", "striptags", "xmlattr", "pprint", "forceescape"]
)
def test_filters_without_a_bound_do_not_exist(name: str):
    with pytest.raises(ChatTemplateError, match="No filter named"):
        render("{{ 'a'|" + name + " }}")


def test_a_broken_template_names_its_line():
    with pytest.raises(ChatTemplateError, match="broken in line 3"):
        render("\n\n{% for %}")
