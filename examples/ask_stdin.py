"""Answer questions from standard input, one per line, with one line each; with --about, from a document.

    python ask_stdin.py < questions.txt > answers.txt
    echo "When is the rent due?" | python ask_stdin.py --about contract.txt

Questions are independent: no answer depends on an earlier line. The session only spares reading the document again.
"""

import argparse
import sys
from pathlib import Path

import mlxarch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("-m", "--model", default="qwen3-4b")
parser.add_argument("--about", type=Path, help="a text file that the answers are in")
parser.add_argument("--max-tokens", type=int, default=200, help="of an answer")
args = parser.parse_args()

try:
    opening = f"{args.about.read_text('utf-8')}\n\n" if args.about else ""
    model = mlxarch.load(args.model)
    session = model.session()  # holds what the last prompt and this one begin with
    for line in sys.stdin:
        if not (question := line.strip()):
            print()
            continue
        messages = [{"role": "user", "content": f"{opening}Answer in one short sentence. {question}"}]
        prompt = model.tokenizer.apply_chat_template(messages, enable_thinking=False)
        answer = model.generate(prompt, max_tokens=args.max_tokens, session=session)
        print(" ".join(answer.text.split()), flush=True)
except (mlxarch.MlxArchError, OSError, UnicodeDecodeError) as error:
    sys.exit(f"ask_stdin: {error}")
