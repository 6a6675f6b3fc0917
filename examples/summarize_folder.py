"""Summarize each text file of a folder, as Markdown on standard output.

    python summarize_folder.py notes/ --model smollm2-1.7b --pattern '*.md' > summaries.md

A file of more than --piece tokens is summarized piece by piece, and then its summaries are.
"""

import argparse
import sys
from pathlib import Path

import mlxarch


def summarize(text: str) -> str:
    tokens, answers = model.tokenizer.encode(text, add_special_tokens=False), []
    for at in range(0, len(tokens), args.piece):
        task = f"Summarize this text in one sentence:\n\n{model.tokenizer.decode(tokens[at : at + args.piece])}"
        prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": task}], enable_thinking=False)
        answers.append(model.generate(prompt, max_tokens=min(args.piece // 3, 150), session=session).text.strip())
    return "\n".join(answers) if len(answers) < 2 else summarize("\n".join(answers))  # always shorter than the text


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("-m", "--model", default="qwen3-4b")
parser.add_argument("--pattern", default="*.txt", help="names of the files to read")
parser.add_argument("--piece", type=int, default=3000, help="tokens to read at once, 30 or more; they must fit")
args = parser.parse_args()
files = sorted(args.folder.glob(args.pattern))
if args.piece < 30 or not files:
    parser.error("--piece must be 30 or more" if files else f"no {args.pattern} in {args.folder}")
try:
    model = mlxarch.load(args.model)
    session = model.session()  # the instruction, with which all prompts begin, is read once
    for path in files:
        print(f"## {path.name}\n\n{summarize(path.read_text('utf-8', errors='replace'))}\n", flush=True)
except (mlxarch.MlxArchError, OSError) as error:
    sys.exit(f"summarize_folder: {error}")
