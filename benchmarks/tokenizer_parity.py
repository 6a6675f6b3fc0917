"""Do the tokenizers of published models give the ids and texts that transformers gives?

    python benchmarks/tokenizer_parity.py --transformers PYTHON FOLDER [FOLDER …]

PYTHON is an interpreter of an environment with transformers. Each folder holds a tokenizer.json, as a model's
repository does. The texts are those of tests/fixtures/tokenizers/texts.json and of random characters of 32 blocks of
Unicode, alone and mixed, 250 in all: ids with and without special tokens, and what they are decoded to.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

from mlxarch.tokenizer.tokenizer import Tokenizer

TEXTS = Path(__file__).parents[1] / "tests" / "fixtures" / "tokenizers" / "texts.json"
COUNT = 250
# Latin to the ends of the supplementary planes: first and last character
BLOCKS = [
    *(
        (0x20, 0x7E),
        (0xA0, 0x24F),
        (0x250, 0x36F),
        (0x370, 0x3FF),
        (0x400, 0x52F),
        (0x531, 0x5FF),
        (0x600, 0x6FF),
    ),
    *(
        (0x700, 0x8FF),
        (0x900, 0x97F),
        (0x980, 0xDFF),
        (0xE00, 0xE7F),
        (0xE80, 0x10FF),
        (0x1100, 0x11FF),
    ),
    *(
        (0x1200, 0x13FF),
        (0x1400, 0x1DFF),
        (0x1E00, 0x1FFF),
        (0x2000, 0x206F),
        (0x2070, 0x218F),
        (0x2190, 0x2BFF),
    ),
    *(
        (0x2C00, 0x2FFF),
        (0x3000, 0x30FF),
        (0x3100, 0x33FF),
        (0x3400, 0x4DBF),
        (0x4E00, 0x9FFF),
        (0xA000, 0xABFF),
    ),
    *((0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFFEF), (0x10000, 0x10FFF), (0x1D400, 0x1D7FF)),
    *((0x1F300, 0x1FAFF), (0x20000, 0x2A6DF)),
]
KINDS = ("ids", "ids without special tokens", "texts", "texts without special tokens")

REFERENCE = """
import json, sys
from transformers import PreTrainedTokenizerFast
folder, texts, target = sys.argv[1:]
tokenizer, texts = PreTrainedTokenizerFast.from_pretrained(folder), json.load(open(texts))
ids, plain = ([tokenizer(t, add_special_tokens=s)["input_ids"] for t in texts] for s in (True, False))
decode = lambda i, skip: tokenizer.decode(i, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
json.dump([ids, plain, [decode(i, False) for i in plain], [decode(i, True) for i in ids]], open(target, "w"))
"""


def texts() -> list[str]:
    source, found = random.Random(7), json.loads(TEXTS.read_text(encoding="utf-8"))
    while len(found) < COUNT:
        blocks = [source.choice(BLOCKS)] if len(found) % 2 else source.choices(BLOCKS, k=5)
        drawn = (chr(source.randint(*source.choice(blocks))) for _ in range(source.randint(5, 60)))
        found.append("".join(c if unicodedata.category(c) != "Cn" else " " for c in drawn))
    return found


def ours(folder: Path, texts: list[str]) -> list[list]:
    tokenizer = Tokenizer.from_folder(folder)
    ids, plain = (
        [tokenizer.encode(text, add_special_tokens=special) for text in texts]
        for special in (True, False)
    )
    decoded = [tokenizer.decode(each, skip_special_tokens=False) for each in plain]
    return [ids, plain, decoded, [tokenizer.decode(each) for each in ids]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--transformers", required=True, help="a Python that has transformers")
    options = parser.parse_args()
    all_texts, wrong = texts(), 0
    for folder in options.folders:
        with tempfile.TemporaryDirectory() as place:
            given, target = Path(place, "texts.json"), Path(place, "reference.json")
            given.write_text(json.dumps(all_texts))
            command = [options.transformers, "-c", REFERENCE, str(folder), str(given), str(target)]
            subprocess.run(command, check=True, capture_output=True)
            wanted = json.loads(target.read_text())
        for kind, found, expected in zip(KINDS, ours(folder, all_texts), wanted, strict=True):
            differ = [text for text, a, b in zip(all_texts, found, expected, strict=True) if a != b]
            wrong += len(differ)
            print(
                f"{folder}: {kind}: {len(differ)} of {len(all_texts)} differ",
                *map(repr, differ[:2]),
                flush=True,
            )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
