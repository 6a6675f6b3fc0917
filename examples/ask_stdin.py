"""Answer questions from standard input, one line each, optionally about a document.

    python ask_stdin.py < questions.txt > answers.txt
    echo "When is the rent due?" | python ask_stdin.py --about contract.txt

Questions are independent: no answer depends on an earlier one. The session only avoids computing
the document again.
"""

import argparse
import sys
from pathlib import Path

import mlxarch

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("-m", "--model", help="model (default: MLXARCH_MODEL, or one that is here)")
parser.add_argument("--about", type=Path, help="text file with the answers (default: none)")
parser.add_argument("--max-tokens", type=int, default=200, help="tokens per answer (default: 200)")
args = parser.parse_args()

try:
    document = f"{args.about.read_text('utf-8')}\n\n" if args.about else ""
    model = mlxarch.load(args.model)
    session = model.session()  # keeps the KV cache of the beginning that all prompts share
    for line in sys.stdin:
        question = line.strip()
        if not question:
            print()
            continue
        content = f"{document}Answer in one short sentence. {question}"
        messages = [{"role": "user", "content": content}]
        prompt = model.tokenizer.apply_chat_template(messages, enable_thinking=False)
        answer = model.generate(prompt, max_tokens=args.max_tokens, session=session)
        print(" ".join(answer.text.split()), flush=True)
except (mlxarch.MlxArchError, OSError, UnicodeDecodeError) as error:
    sys.exit(f"ask_stdin: {error}")
