"""Style of the source that linters do not check: first lines of docstrings, statements, line lengths."""

import ast
import re

from house import ROOT

FOLDERS = ("mlxarch", "models", "quantize", "cli")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in FILES}

RIDDLE = re.compile(r"(What|Of|That|See)\b")
PRIVATE_WORDS = re.compile(r"\bpull(s|ed|ing)?\b(?! *command)|\bchances?\b", re.IGNORECASE)
COLUMNS = 100
MAX_TUPLES = 5  # assignments of unrelated values in one statement, for 1,000 statements
MAX_WIDE = 0.03  # share of lines


def first_lines(tree: ast.AST) -> list[str]:
    """First line of every docstring, those of attributes included."""
    strings = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    return [text.strip().split("\n")[0] for text in strings if isinstance(text, str)]


def statements(tree: ast.AST) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))


def tuple_assignments(tree: ast.AST) -> int:
    """Statements such as ``a, b = x, y``, swaps left out."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            targets = node.targets[0]
            if isinstance(targets, ast.Tuple):
                names = sorted(map(ast.unparse, targets.elts))
                count += names != sorted(map(ast.unparse, node.value.elts))
    return count


def private_words(source: str) -> list[str]:
    """Words that this project once used for gradient and probability; the command `pull` is left out."""
    lines = [
        line
        for line in source.splitlines()
        if not re.search(r"mlxarch pull|\bpull[_.\"`,]|[\"/`._]pull", line)
    ]
    return [found[0] for line in lines for found in PRIVATE_WORDS.finditer(line)]


def test_docstrings_begin_with_a_noun_or_an_imperative():
    found = [
        f"{path.relative_to(ROOT)}: {line}"
        for path, tree in TREES.items()
        for line in first_lines(tree)
        if RIDDLE.match(line)
    ]
    assert len(found) <= 5, "\n".join(found)


def test_gradients_and_probabilities_are_called_so():
    found = {
        str(path.relative_to(ROOT)): words
        for path in FILES
        if (words := private_words(path.read_text()))
    }
    assert not found


def test_unrelated_values_are_assigned_in_statements_of_their_own():
    tuples = sum(map(tuple_assignments, TREES.values()))
    assert 1000 * tuples / sum(map(statements, TREES.values())) <= MAX_TUPLES


def test_few_lines_are_wide():
    lines = [line for path in FILES for line in path.read_text().splitlines()]
    assert sum(len(line) > COLUMNS for line in lines) / len(lines) <= MAX_WIDE


def test_each_rule_sees_what_it_is_for():
    source = '"""What it is."""\na, b = 1, 2\na, b = b, a\nx = 3\n"""Of a number."""\n'
    tree = ast.parse(source)
    assert [bool(RIDDLE.match(line)) for line in first_lines(tree)] == [True, True]
    assert (tuple_assignments(tree), statements(tree)) == (1, 5)
    assert private_words("# a pull at the logits\n# by chance\n# mlxarch pull NAME") == [
        "pull",
        "chance",
    ]
