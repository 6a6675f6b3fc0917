"""Thinking of a model, switched on or off through the chat template."""

from dataclasses import dataclass, field
from typing import Any

from mlxarch.generation.thinking.splitter import ThinkingTokenizer, thinking_tags

EFFORTS = ("low", "medium", "high")
_SWITCHES = ("enable_thinking", "thinking")
_FLAGS = ("/no_think", "/nothink")


@dataclass
class Switches:
    """Settings by which a model is asked to think or not to.

    Attributes:
        variables: variables for the chat template.
        flag: text to append to the system prompt; "" for none.
        warnings: requests that the model cannot follow; a sentence each, without its subject.
    """

    variables: dict[str, Any] = field(default_factory=dict)
    flag: str = ""
    warnings: list[str] = field(default_factory=list)

    def system(self, prompt: str | None) -> str | None:
        """System prompt with the flag; None if there is neither."""
        return "\n".join(part for part in (prompt, self.flag) if part) if self.flag else prompt


def switches(
    tokenizer: ThinkingTokenizer, think: bool | None = None, effort: str | None = None
) -> Switches:
    """Find the switches for thinking that a chat template has, by the variables it reads.

    Args:
        tokenizer: the model's tokenizer.
        think: whether to think; None leaves it to the model.
        effort: "low", "medium" or "high"; None leaves it to the model.
    """
    found = Switches()
    known = tokenizer.template_variables
    has_effort = "reasoning_effort" in known
    if think is not None:
        flag = next((flag for flag in _FLAGS if flag in (tokenizer.chat_template or "")), "")
        found.variables = {name: think for name in _SWITCHES if name in known}
        if not found.variables and flag:
            found.flag = flag if not think else flag.replace("no_", "").replace("no", "")
        elif not found.variables and has_effort and not think:
            found.variables["reasoning_effort"] = EFFORTS[0]
            found.warnings.append("always thinks: it is asked for low effort instead")
        elif not found.variables and not has_effort:
            thinks = thinking_tags(tokenizer) is not None
            found.warnings.append(
                f"{'cannot be told whether to think' if thinks else 'does not think'}: its chat template has no "
                "switch for that"
            )
    if effort is not None and has_effort:
        found.variables["reasoning_effort"] = effort
    elif effort is not None:
        found.warnings.append("knows no levels of effort: its chat template has no switch for that")
    return found
