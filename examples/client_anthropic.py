"""Ask a running server with the package of Anthropic: `mlxarch serve MODEL`, then this script."""

import argparse

import anthropic

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text")
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--model", default="default", help="first model of the server by default")
arguments = parser.parse_args()

client = anthropic.Anthropic(base_url=arguments.url, api_key="none")
messages = [{"role": "user", "content": arguments.text}]

counted = client.messages.count_tokens(model=arguments.model, messages=messages)
print(f"{counted.input_tokens} tokens")
with client.messages.stream(model=arguments.model, messages=messages, max_tokens=200) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
print()
