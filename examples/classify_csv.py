"""Add a column "label" to the rows of a CSV file: one of the given labels each, fitting or not, so check a sample.

python classify_csv.py mails.csv text billing shipping login > labelled.csv
"""

import argparse
import csv
import sys

import mlx.core as mx

import mlxarch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file")
parser.add_argument("column", help="with the texts, whose first 1000 characters count")
parser.add_argument("labels", nargs="+", help="common words that begin differently")
parser.add_argument("-m", "--model", default="qwen3-4b")
args = parser.parse_args()
try:
    with open(args.file, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file, strict=True) if row]
    if not rows or args.column not in rows[0] or any(len(row) != len(rows[0]) for row in rows):
        sys.exit(f"classify_csv: {args.file} needs a column {args.column!r}, and rows as long as its header")
    texts = [" ".join(row[rows[0].index(args.column)].split())[:1000] for row in rows[1:]]
    prompts = [f"Labels: {', '.join(args.labels)}\nText: {text}\nLabel:" for text in ["", *texts]]
    model = mlxarch.load(args.model)
    nothing, *tokens = map(model.tokens_of, prompts)
    first = {model.tokens_of(f"{prompts[0]} {label}")[len(nothing)]: label for label in args.labels}
    if len(first) < len(args.labels):
        sys.exit(f"classify_csv: some labels begin with the same token; these differ: {', '.join(first.values())}")
    prior = model.model(mx.array([nothing]))[0, -1]  # what it likes to say of no text at all (arXiv:2102.09690)
    settings = {"max_tokens": 1, "logit_bias": {token: 500 - float(prior[token]) for token in first}}
    column = ["label", *(first[answer.tokens[0]] for answer in model.generate_batch(tokens, **settings))]
    csv.writer(sys.stdout, lineterminator="\n").writerows([*row, new] for row, new in zip(rows, column, strict=True))
except (mlxarch.MlxArchError, OSError, ValueError, csv.Error) as error:
    sys.exit(f"classify_csv: {error}")
