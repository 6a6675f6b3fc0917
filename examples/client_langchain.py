"""Ask a running server with LangChain: `mlxarch serve MODEL`, then this script."""

import argparse
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text")
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--model", default="default", help="first model of the server by default")
arguments = parser.parse_args()


def weather(unit: Literal["celsius", "fahrenheit"]) -> str:
    """The temperature outside.

    Args:
        unit: unit of the answer.
    """
    return "21 °C" if unit == "celsius" else "70 °F"


chat = ChatOpenAI(
    model=arguments.model,
    base_url=f"{arguments.url}/v1",
    api_key=SecretStr("none"),
    max_completion_tokens=200,
)
for chunk in chat.stream(arguments.text):
    print(chunk.text, end="", flush=True)
print()

# The call follows the signature, because the server holds the model to it while it writes.
question = HumanMessage("How warm is it?")
answer = chat.bind_tools([weather], tool_choice="weather").invoke([question])
for call in answer.tool_calls:
    result = weather(**call["args"])
    print(f"{call['name']}({call['args']}) = {result}")
    print(chat.invoke([question, answer, ToolMessage(result, tool_call_id=call["id"])]).text)
