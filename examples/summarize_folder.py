"""Summarize each text file of a folder, as Markdown on standard output.

    python summarize_folder.py notes/ --model smollm2-1.7b --pattern '*.md' > summaries.md

A file of more than --piece tokens is summarized piece by piece, and then its summaries are.
"""

import argparse
import sys
from pathlib import Path

import mlxarch


def summarize(text: str) -> str:
    """Summarize a text; each round is shorter than the one before, so the recursion ends."""
    tokens = model.tokenizer.encode(text, add_special_tokens=False)
    answers = []
    for start in range(0, len(tokens), args.piece):
        piece = model.tokenizer.decode(tokens[start : start + args.piece])
        task = f"Summarize this text in one sentence:\n\n{piece}"
        messages = [{"role": "user", "content": task}]
        prompt = model.tokenizer.apply_chat_template(messages, enable_thinking=False)
        limit = min(args.piece // 3, 150)
        answer = model.generate(prompt, max_tokens=limit, session=session)
        answers.append(answer.text.strip())
    return "\n".join(answers) if len(answers) < 2 else summarize("\n".join(answers))


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("folder", type=Path, help="folder to read")
parser.add_argument("-m", "--model", help="model (default: MLXARCH_MODEL, or one that is here)")
parser.add_argument("--pattern", default="*.txt", help="file names to read (default: *.txt)")
parser.add_argument(
    "--piece", type=int, default=3000, help="tokens per piece, 30 or more (default: 3000)"
)
args = parser.parse_args()
files = sorted(args.folder.glob(args.pattern))
if args.piece < 30 or not files:
    parser.error("--piece must be 30 or more" if files else f"no {args.pattern} in {args.folder}")
try:
    model = mlxarch.load(args.model)
    session = model.session()  # keeps the KV cache of the instruction that all prompts share
    for path in files:
        summary = summarize(path.read_text("utf-8", errors="replace"))
        print(f"## {path.name}\n\n{summary}\n", flush=True)
except (mlxarch.MlxArchError, OSError) as error:
    sys.exit(f"summarize_folder: {error}")
