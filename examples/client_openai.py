"""Ask a running server with the package of OpenAI: `mlxarch serve MODEL`, then this script."""

import argparse

import openai
from pydantic import BaseModel


class Verdict(BaseModel):
    """Form of the second answer."""

    question: bool
    topic: str


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text")
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--model", default="default", help="first model of the server by default")
arguments = parser.parse_args()

client = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key="none")
messages = [{"role": "user", "content": arguments.text}]

for chunk in client.chat.completions.create(
    model=arguments.model, messages=messages, max_tokens=200, stream=True
):
    delta = chunk.choices[0].delta
    thinking = getattr(delta, "reasoning_content", None)
    print(thinking or delta.content or "", end="", flush=True)
print()

# The answer is held to the class while it is written, so it always parses unless it is cut off.
answer = client.chat.completions.parse(
    model=arguments.model,
    messages=[{"role": "user", "content": f"Classify: {arguments.text}"}],
    response_format=Verdict,
    max_tokens=500,
)
print(answer.choices[0].message.parsed)
