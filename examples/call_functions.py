"""Answer a question with the help of Python functions that the model may call.

    python call_functions.py "How many words has README.md, and what is 17% of that?"

The functions become tools by their signatures and docstrings, and the model's calls follow their
schemas. This script runs them and gives the results back until the model answers in words.
"""

import argparse
import sys
from pathlib import Path

import mlxarch
from mlxarch.tool_calls.tool import call_function, tools_of


def count_words(path: str) -> int:
    """Count the words of a text file in the current folder."""
    return len(Path(Path(path).name).read_text(encoding="utf-8").split())


def multiply(a: float, b: float) -> float:
    """Multiply two numbers."""
    return a * b


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("question", help="question to answer")
parser.add_argument("-m", "--model", default="qwen3-4b", help="model (default: qwen3-4b)")
args = parser.parse_args()
tools = {tool.name: tool for tool in tools_of([count_words, multiply])}
messages = [{"role": "user", "content": args.question}]
try:
    model = mlxarch.load(args.model)
    for _ in range(8):  # turns at most
        answer = model.generate(messages, tools=list(tools.values()), max_tokens=2000)
        messages.append(answer.message)
        for call in answer.calls:
            try:
                value = call_function(tools[call.name], call.arguments)
            except (OSError, mlxarch.MlxArchError) as error:
                value = f"error: {error}"
            messages.append(call.result(value))
        if not answer.calls:
            break
    print(answer.text)
except mlxarch.MlxArchError as error:
    sys.exit(f"call_functions: {error}")
