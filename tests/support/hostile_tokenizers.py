"""Tokenizer files that panic, hang or lie, each with the text that provokes it. As a script: one JSON line per case.

    python hostile_tokenizers.py SEED.json [MUTANTS]

A line is [name, outcome, seconds]; the outcome is "ok", or the kind of error and its message. With a number of mutants,
that many random changes of the seed are loaded as well, and only those that end in another way are printed.
"""

import base64
import copy
import json
import random
import sys
import time
from pathlib import Path

LONG = "a" * 3000 + "!"


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(document):
        for key in path:
            document = document[key]
        document[last] = value

    return change


def _append(*path_and_value):
    *path, value = path_and_value

    def change(document):
        for key in path:
            document = document[key]
        document.append(value)

    return change


def _split(regex):
    pattern = {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }
    return _set("pre_tokenizer", pattern)


def _replace(regex=None, text=None, content="b"):
    pattern = {"Regex": regex} if regex is not None else {"String": text}
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(steps, kind="normalizers"):
    return {"type": "Sequence", kind: steps}


def _model(kind, **fields):
    return _set("model", {"type": kind, **fields})


def _charsmap(longest):
    data = (4).to_bytes(4, "little") + bytes(4) + b"x" * longest + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
}
MISSING = {"SpecialToken": {"id": "<none>", "type_id": 0}}
PADDING = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
TRUNCATION = {"strategy": "LongestFirst", "direction": "Right"}
WORDPIECE = {
    "vocab": {"a": 0, "##a": 1, "<unk>": 2},
    "unk_token": "<unk>",
    "continuing_subword_prefix": "##",
}


def _add_tokens(count, length):
    def change(document):
        document["added_tokens"] += [
            {**document["added_tokens"][-1], "id": 1000 + index, "content": f"{index:0{length}}"}
            for index in range(count)
        ]

    return change


def _template(count):
    def change(document):
        token = next(iter(document["post_processor"]["special_tokens"].values()))
        token |= {"ids": [1] * count, "tokens": ["<s>"] * count}

    return change


# name → (change of the seed, text to encode)
CASES = {
    # panics while loading
    "merge outside the vocabulary": (
        _append("model", "merges", ["zzzzzzzzzz", "aaaaaaaaaaaaaaaaaaa"]),
        "a",
    ),
    "prefix longer than every token": (_set("model", "continuing_subword_prefix", "#" * 50), "a"),
    "prefix that cuts characters": (_set("model", "continuing_subword_prefix", "a"), "a"),
    "empty charsmap": (
        _set("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
        "a",
    ),
    "bad charsmap": (
        _set("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "a",
    ),
    "charsmap that is no base64": (
        _set("normalizer", {"type": "Precompiled", "precompiled_charsmap": "%"}),
        "a",
    ),
    # panics while encoding
    "nested repeat": (_split("(a+)+$"), LONG),
    "ambiguous choice": (_split("(a|aa)+$"), LONG),
    "nested repeat in a normalizer": (_set("normalizer", _replace(regex="(a*)*$")), LONG),
    "ambiguous choice in a normalizer": (_set("normalizer", _replace(regex="(a|a|aa)+$")), LONG),
    "template with a missing token": (
        _set("post_processor", {**TEMPLATE, "single": [MISSING]}),
        "a",
    ),
    "template token without ids": (_append("post_processor", "single", MISSING), "a"),
    "stride as long as the cut": (
        _set("truncation", {**TRUNCATION, "max_length": 4, "stride": 4}),
        "a b c d e f g",
    ),
    "stride longer than the cut": (
        _set("truncation", {**TRUNCATION, "max_length": 2, "stride": 9}),
        "a b c d e f g",
    ),
    "padding to a multiple of 0": (
        _set("padding", {**PADDING, "strategy": {"Fixed": 9}, "pad_to_multiple_of": 0}),
        "a",
    ),
    "padding to the length 0": (
        _set("padding", {**PADDING, "strategy": {"Fixed": 0}, "pad_to_multiple_of": 0}),
        "a",
    ),
    "padding to 2^40": (
        _set("padding", {**PADDING, "strategy": {"Fixed": 2**40}, "pad_to_multiple_of": None}),
        "a",
    ),
    # hangs
    "chained replacements": (
        _set("normalizer", _sequence([_replace(text="a", content="a" * 10)] * 9)),
        "a",
    ),
    "replacement of nothing": (
        _set("normalizer", _sequence([_replace(text="", content="a" * 99)] * 4)),
        "a",
    ),
    "regex that matches nothing": (
        _set("normalizer", _sequence([_replace(regex="", content="ab" * 9)] * 9)),
        "a",
    ),
    "long prepend": (
        _set("normalizer", _sequence([{"type": "Prepend", "prepend": "a" * 10_000}] * 9)),
        "a",
    ),
    "long charsmap": (_set("normalizer", _charsmap(100_000)), "a"),
    "many steps": (_set("normalizer", _sequence([{"type": "NFC"}] * 100_000)), LONG),
    "nested sequences": (
        _set(
            "normalizer",
            _sequence([_sequence([_sequence([_replace(text="a", content="aaaaa")] * 3)] * 3)]),
        ),
        "a",
    ),
    "chained replacements in the decoder": (
        _set("decoder", _sequence([_replace(text="a", content="a" * 10)] * 9, "decoders")),
        "a",
    ),
    "wordpiece without a word limit": (
        _model("WordPiece", max_input_chars_per_word=10**8, **WORDPIECE),
        "a" * 20_000,
    ),
    "unigram with a long piece": (
        _model("Unigram", unk_id=0, vocab=[["<unk>", 0.0], ["a" * 50_000, -1.0]]),
        "a" * 20_000,
    ),
    # lies
    "id of 2^31": (_set("model", "vocab", "zz", 2**31), "a"),
    "negative id": (_set("model", "vocab", "zz", -1), "a"),
    "id that is a text": (_set("model", "vocab", "zz", "1"), "a"),
    "added token of id 2^40": (
        _append("added_tokens", {"id": 2**40, "content": "q", "special": True}),
        "a",
    ),
    "unk_id outside": (_model("Unigram", unk_id=9, vocab=[["a", 0.0]]), "b"),
    "unigram without pieces": (_model("Unigram", unk_id=None, vocab=[]), "b"),
    "unigram score that is no number": (_model("Unigram", unk_id=0, vocab=[["a", None]]), "b"),
    "unknown model": (_model("Sorcery", vocab={}), "a"),
    "no model": (lambda document: document.pop("model"), "a"),
    "decoder of no type": (_set("decoder", {}), "a"),
    "sequence of nothing": (_set("decoder", _sequence([], "decoders")), "a"),
    "strip beyond the end": (
        _set("decoder", {"type": "Strip", "content": " ", "start": 2**40, "stop": 2**40}),
        "a",
    ),
    "dropout": (_set("model", "dropout", 2.0), "a"),
    "long added tokens": (_add_tokens(10_000, 490), "a"),
    "many added tokens": (_add_tokens(140_000, 1), "a"),
    "template with many ids": (_template(100_000), "a"),
    "template that repeats": (
        _set("post_processor", "single", [{"Sequence": {"id": "A", "type_id": 0}}] * 5000),
        "a",
    ),
    "many replacements": (_set("normalizer", _sequence([_replace(text="b")] * 20)), LONG),
    "replacements of a long text": (
        _set("normalizer", _sequence([_replace(text="b")] * 14)),
        "b" * 5_000_000,
    ),
    "run that is read anew from each blank": (_split(r"\s*[\r\n]+"), " " * 200_000 + "x\n"),
    "digits counted from the right": (
        _split(r"\d{1,3}(?=(?:\d{3})*\b)"),
        "1" * 200_000,
    ),
    "back-reference": (_split(r"(a*)\1b"), LONG),
    "sixty optional letters": (_split("a?" * 60 + "b"), LONG),
    "unigram with all lengths": (
        _model(
            "Unigram", unk_id=0, vocab=[["<unk>", 0.0]] + [["a" * k, -1.0] for k in range(1, 512)]
        ),
        "a" * 1_000_000,
    ),
    "huge pattern": (_split("a" * 100_000), "a"),
    "open group": (_split("(a"), "a"),
}


def outcome(document, text, folder_name="tokenizer.json"):
    from mlxarch.errors import MlxArchError
    from mlxarch.tokenizer.load_json import load_tokenizer_json
    from mlxarch.tokenizer.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer(load_tokenizer_json(json.dumps(document).encode(), folder_name))
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        return "ok"
    except MlxArchError as error:
        return f"{type(error).__name__}: {error}"
    except BaseException as error:
        return f"ESCAPED {type(error).__name__}: {error}"


def mutant(seed, rng):
    """A copy of the seed with one to three places changed: a value replaced, dropped, doubled or moved."""
    document = copy.deepcopy(seed)
    for _ in range(rng.randint(1, 3)):
        nodes = [document]
        for _ in range(rng.randint(0, 6)):  # walk down at random
            node = nodes[-1]
            children = [
                child
                for child in (node.values() if isinstance(node, dict) else node)
                if child and isinstance(child, (dict, list))
            ]
            if not children:
                break
            nodes.append(rng.choice(children))
        node = rng.choice(nodes)
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        values = [
            None,
            0,
            -1,
            2**31,
            1e300,
            "",
            "a",
            "é" * 40,
            [],
            {},
            True,
            "ByteLevel",
            "Sequence",
            {"type": "NFKC"},
            node[key],
        ]
        kind = rng.random()
        if kind < 0.7:
            node[key] = rng.choice(values)
        elif kind < 0.85:
            node.pop(key)
        elif isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[rng.choice(["type", "pattern", "content", "decoders", "vocab", "x"])] = (
                copy.deepcopy(node[key])
            )
        if not document:
            break
    return document


def main():
    seed = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    mutants = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    cases = CASES.items() if not mutants else ()
    for name, (change, text) in cases:
        document = copy.deepcopy(seed)
        change(document)
        start = time.process_time()
        print(json.dumps([name, outcome(document, text), time.process_time() - start]), flush=True)
    rng = random.Random(0)
    accepted = 0
    for index in range(mutants):
        document = mutant(seed, rng)
        start = time.process_time()
        result = outcome(document, "The quick  brown\n føx 今天 <s>x</s> 🙂" * 3)
        seconds = time.process_time() - start
        accepted += result == "ok"
        if result.startswith("ESCAPED") or seconds > 5:
            print(json.dumps([f"mutant {index}", result, seconds]), flush=True)
    if mutants:
        print(json.dumps(["accepted", str(accepted), 0.0]), flush=True)


if __name__ == "__main__":
    main()
