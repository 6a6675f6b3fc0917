"""Tokens that end an answer: of the config files, and the one that the chat template shows.

A template shows the end of a turn when a conversation is rendered: it is the token behind the
answer. Finetuned models often add it without the flag ``special``, or have it in the vocabulary
only, so its spelling counts as well.
"""

from collections.abc import Callable, Collection

from mlxarch.errors import TokenizerError
from mlxarch.tokenizer.added_tokens import leading_tag

# For models whose template does not show one. "<|end|>" is not among them: gpt-oss ends its
# reasoning with it.
_KNOWN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
)
# End-of-turn token -> the token that ends a tool call in the same chat format.
_END_OF_TOOL_CALL = {"<|return|>": "<|call|>", "<|eot_id|>": "<|eom_id|>"}
_ANSWER = "0987654321"


def end_of_turn_tokens(
    render: Callable[[list[dict[str, str]]], str],
    token_id: Callable[[str], int | None],
    special: Collection[str],
) -> list[str]:
    """Return the tokens that end an answer in the model's chat format.

    Args:
        render: renders messages by the chat template; raises TokenizerError if it cannot.
        token_id: id of a token; None if the vocabulary lacks it.
        special: texts of the special tokens.

    Returns:
        The token that the template writes behind an answer, and the one that ends a tool call in
        the same format. All known ones of the vocabulary if the template shows none.
    """
    ends: list[str] = []
    try:
        text = render([{"role": "user", "content": "1"}, {"role": "assistant", "content": _ANSWER}])
        shown = _first_token(text.rpartition(_ANSWER)[2].lstrip(), token_id, special)
        ends = [] if shown is None else [shown]
    except TokenizerError:
        pass  # a base model, or a template that refuses these messages
    if not ends:
        ends = [token for token in _KNOWN_ENDS if token_id(token) is not None]
    return ends + [_END_OF_TOOL_CALL[token] for token in ends if token in _END_OF_TOOL_CALL]


def _first_token(
    text: str, token_id: Callable[[str], int | None], special: Collection[str]
) -> str | None:
    """Return the control token that a text begins with; the longest, if there are several."""
    found = [token for token in special if token and text.startswith(token)]
    tag = leading_tag(text)
    if tag is not None and token_id(tag) is not None:
        found.append(tag)
    longest = max(found, key=len, default=None)
    if longest == "<|end|>" and token_id("<|channel|>") is not None:
        return None  # gpt-oss: there it ends a message, not the answer
    return longest
