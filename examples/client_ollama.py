"""Ask a running server with the package of Ollama: `mlxarch serve MODEL`, then this script."""

import argparse

import ollama

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("text")
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--model", default="default", help="first model of the server by default")
arguments = parser.parse_args()

client = ollama.Client(arguments.url)
messages = [{"role": "user", "content": arguments.text}]

options = {"num_predict": 200}
for part in client.chat(arguments.model, messages, stream=True, options=options):
    print(part.message.content, end="", flush=True)
print()
for model in client.ps().models:
    print(f"{model.model} is loaded until {model.expires_at}")
