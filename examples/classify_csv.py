"""Classify the rows of a CSV file: add a column "label" with one of the given labels.

    python classify_csv.py mails.csv text billing shipping login > labelled.csv

Every row gets a label, even if none fits, so check a sample.
"""

import argparse
import csv
import sys

import mlx.core as mx

import mlxarch

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("file", help="CSV file with a header")
parser.add_argument("column", help="column to classify by; its first 1000 characters are used")
parser.add_argument("labels", nargs="+", help="labels: common words with different beginnings")
parser.add_argument("-m", "--model", help="model (default: MLXARCH_MODEL, or one that is here)")
args = parser.parse_args()
try:
    with open(args.file, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file, strict=True) if row]
    if not rows or args.column not in rows[0] or any(len(row) != len(rows[0]) for row in rows):
        needs = f"needs a column {args.column!r}, and rows as long as its header"
        sys.exit(f"classify_csv: {args.file} {needs}")
    column = rows[0].index(args.column)
    texts = [" ".join(row[column].split())[:1000] for row in rows[1:]]
    prompts = [f"Labels: {', '.join(args.labels)}\nText: {text}\nLabel:" for text in ["", *texts]]
    model = mlxarch.load(args.model)
    empty, *tokens = map(model.tokens_of, prompts)
    # first token of each label after the prompt
    first = {model.tokens_of(f"{prompts[0]} {label}")[len(empty)]: label for label in args.labels}
    if len(first) < len(args.labels):
        distinct = ", ".join(first.values())
        sys.exit(f"classify_csv: some labels begin with the same token; these differ: {distinct}")
    # Contextual calibration: logits after an empty text are subtracted (arXiv:2102.09690).
    prior = model.model(mx.array([empty]))[0, -1]
    bias = {token: 500 - float(prior[token]) for token in first}
    answers = model.generate_batch(tokens, max_tokens=1, logit_bias=bias)
    labels = ["label", *(first[answer.tokens[0]] for answer in answers)]
    table = [[*row, label] for row, label in zip(rows, labels, strict=True)]
    csv.writer(sys.stdout, lineterminator="\n").writerows(table)
except (mlxarch.MlxArchError, OSError, ValueError, csv.Error) as error:
    sys.exit(f"classify_csv: {error}")
