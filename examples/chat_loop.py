"""Chat in the terminal. Ctrl-C stops an answer; Ctrl-D or an empty line ends the chat.

    python chat_loop.py
    python chat_loop.py --model llama3.2-3b --system "You are a patient teacher of Portuguese."

The session keeps the KV cache of the conversation, so that each turn computes only new tokens.
"""

import argparse
import sys

import mlxarch

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("-m", "--model", help="model (default: MLXARCH_MODEL, or one that is here)")
parser.add_argument("--system", help="system prompt (default: none)")
parser.add_argument("--max-tokens", type=int, help="tokens per answer (default: until it ends)")
args = parser.parse_args()

try:
    model = mlxarch.load(args.model)
    session = model.session()
    options = {"sampling": model.recommended_sampling, "max_tokens": args.max_tokens}
    messages = [{"role": "system", "content": args.system}] if args.system else []
    while question := input("> "):
        messages.append({"role": "user", "content": question})
        answer, thinking = "", False
        try:
            for piece in model.stream(messages, session=session, **options):
                if piece.thinking != thinking:  # shown apart, and not sent back later
                    print("(thinking)" if piece.thinking else "\n(answer)")
                    thinking = piece.thinking
                answer += "" if thinking else piece.text
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print()
        messages.append({"role": "assistant", "content": answer})
except (EOFError, KeyboardInterrupt):
    print()
except mlxarch.MlxArchError as error:
    sys.exit(f"chat_loop: {error}")
