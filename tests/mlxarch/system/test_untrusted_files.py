"""Names, files and JSON that come from elsewhere."""

import json
import os
import signal
import socket
import stat
from contextlib import contextmanager

import pytest
from raw_safetensors import open_in

from mlxarch.errors import CheckpointError, ConfigError
from mlxarch.system.untrusted_files import (
    open_regular_file,
    read_exactly,
    read_json,
    safe_path,
    short_repr,
)

BAD_WORDS = r"""
    . .. ... .hidden .model.safetensors ../x ../../x ../../../../etc/passwd ./x x/ x/. x/.. a/../b a/b /x /etc/passwd
    //x / ~ ~/x ~root -x --help \ ..\x a\b \\server\share C:\x C:x c: x:y con CON Con.safetensors nul.json AUX PRN
    COM1 com9.safetensors LPT1 x. x.. x- a|b a;b a&b a$b $HOME `x` a* a? a'b a"b <x> %2e%2e %2e%2e%2fx x%00 x#y
"""
BAD_NAMES: list[object] = [*BAD_WORDS.split(), None, 5, True, 1.5, ["x"], {"x": "y"}, b"x"]
BAD_NAMES += [
    "",
    " ",
    "x ",
    " x",
    "x\n",
    "x\0",
    "\0",
    "x\0.safetensors",
    "x\ty",
    "\x1b[31m",
    "x\x7f",
    "ü",
    "e\u0301",
]
BAD_NAMES += [
    "\u2024\u2024",
    "\u2025",
    "\uff0e\uff0e",
    "\u3002",
    "\uff0fetc",
    "x\u2215y",
    "x\u202ey",
    "\u200bx",
]
BAD_NAMES += ["\ud800", "x" * 256, "x" * 5_000, "x/" * 2_000]

GOOD_WORDS = """
    model.safetensors model-00001-of-00002.safetensors config.json tokenizer.model vocab.txt x _x 1 a..b
    pytorch_model-00000-TP-000.safetensors consolidated.00.safetensors model.fp16.safetensors model(1).safetensors
    a+b=c@d,e~f[g].json console.json community.safetensors
"""
GOOD_NAMES = [*GOOD_WORDS.split(), "my model.safetensors", "x" * 255]


@contextmanager
def deadline(seconds: float):
    """A call that hangs becomes a failure."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Names ---------------------------------------------------------------------------------------------------------------


def test_there_are_more_than_sixty_bad_names():
    assert len({repr(name) for name in BAD_NAMES}) == len(BAD_NAMES) > 60


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:40])
def test_a_bad_name_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="is not a plain one.*download it again") as refusal:
        safe_path(tmp_path, name)
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert short_repr(name) in message
    assert len(message) < 700 and message.isprintable()


@pytest.mark.parametrize("name", GOOD_NAMES, ids=lambda name: name[:40])
def test_a_plain_name_is_a_path_in_the_folder(name, tmp_path):
    assert safe_path(tmp_path, name) == tmp_path / name
    (tmp_path / name).write_text("there")
    assert safe_path(str(tmp_path), name).read_text() == "there"


# Links ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A cache as huggingface_hub lays it out: snapshots link to the repository's blobs, and these to shared ones."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    blobs = snapshot.parents[1] / "blobs"
    shared = tmp_path / "hub" / "blobs" / "ab"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    (blobs / "b1").write_text("own")
    (snapshot / "own.json").symlink_to("../../blobs/b1")
    (snapshot / "absolute.json").symlink_to(blobs / "b1")
    (shared / ("ab" * 32)).write_text("shared")
    (blobs / "b2").symlink_to("../../blobs/ab/" + "ab" * 32)
    (snapshot / "shared.json").symlink_to("../../blobs/b2")
    (snapshot / "dangling.json").symlink_to("../../blobs/b3")
    return snapshot


@pytest.mark.parametrize(
    ("name", "text"), [("own.json", "own"), ("absolute.json", "own"), ("shared.json", "shared")]
)
def test_links_of_the_hubs_cache_are_followed(name, text, hub, tmp_path):
    assert safe_path(hub, name).read_text() == text
    (tmp_path / "here").symlink_to(
        hub
    )  # where the folder itself is a link, it counts where it leads
    assert safe_path(tmp_path / "here", name).read_text() == text


def test_a_dangling_link_of_the_hubs_cache_is_a_missing_file(hub):
    with pytest.raises(CheckpointError, match=r"dangling\.json: the file is missing"):
        open_regular_file(safe_path(hub, "dangling.json"))


BAD_LINKS = [
    "/etc/passwd", "/dev/zero", "../outside", "../../outside", "../../../outside", "../../blobs", "../../../blobs",
    "../../blobs/../outside", "../../blobs/escape", "../../blobs/deep/x", "../../snapshots/other/x", "other.json",
    "../../../blobs/outside", "../../../models--other--name/blobs/x", "../../../blobs/ab/escape", ".", "..",
    "loop.json",
]  # fmt: skip


@pytest.mark.parametrize("target", BAD_LINKS)
def test_any_other_link_is_refused(target, hub):
    for path in (
        "../outside",
        "../../outside",
        "../../../outside",
        "../../blobs/deep/x",
        "../../snapshots/other/x",
    ):
        (hub / path).parent.mkdir(exist_ok=True)
        (hub / path).write_text("secret")
    (hub / "../../blobs/escape").symlink_to("/etc/passwd")
    (hub / "../../../blobs/ab/escape").symlink_to("/etc/passwd")
    (hub / "other.json").write_text("{}")
    (hub / "loop.json").symlink_to("loop.json")
    (hub / "x.json").symlink_to(target)
    with pytest.raises(
        CheckpointError,
        match="'x.json' is a symbolic link to .*Put the file itself into the folder",
    ):
        safe_path(hub, "x.json")


def test_the_layout_of_the_hubs_cache_is_asked_for(tmp_path):
    folder = tmp_path / "a" / "not-snapshots" / "c"
    folder.mkdir(parents=True)
    (tmp_path / "a" / "blobs").mkdir()
    (tmp_path / "a" / "blobs" / "x").write_text("{}")
    (folder / "y").symlink_to("../../blobs/x")
    with pytest.raises(CheckpointError, match="symbolic link"):
        safe_path(folder, "y")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("config.json", "config.json"),
        ("LICENSE", "LICENSE"),
        ("model-00001-of-00002.safetensors", "weights.safetensors"),
    ],
)
def test_links_that_keep_the_kind_of_a_file_are_followed(name, target, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / target).write_text("text")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).symlink_to(tmp_path / "elsewhere" / target)
    assert safe_path(tmp_path / "model", name).read_text() == "text"
    (tmp_path / "elsewhere" / target).unlink()
    with pytest.raises(CheckpointError, match="symbolic link"):
        safe_path(tmp_path / "model", name)
    (tmp_path / "elsewhere" / target).mkdir()
    with pytest.raises(CheckpointError, match="symbolic link"):
        safe_path(tmp_path / "model", name)


# Files ---------------------------------------------------------------------------------------------------------------


def test_what_is_not_a_regular_file_is_refused_and_never_hangs(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "folder", "zero"):
        with deadline(5), pytest.raises(ConfigError, match=f"{name}: this is not a regular file"):
            open_regular_file(tmp_path / name, ConfigError)
    with socket.socket(socket.AF_UNIX) as listener:
        cwd = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket is short
        try:
            listener.bind("socket")
        finally:
            os.chdir(cwd)
        with pytest.raises(CheckpointError, match="cannot be opened"):
            open_regular_file(tmp_path / "socket")
    assert open_in(tmp_path) == 0


@pytest.mark.parametrize("name", ["loop", "x" * 300, "x\0y"])
def test_a_path_that_cannot_be_opened_is_our_error(name, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be opened: .*Check its permissions"):
        open_regular_file(tmp_path / name)


def test_a_regular_file_is_opened_with_its_own_status_and_not_inherited(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    fd, status = open_regular_file(tmp_path / "x")
    try:
        assert status.st_size == 5 and stat.S_ISREG(status.st_mode)
        assert not os.get_inheritable(fd)
        buffer = bytearray(3)
        read_exactly(fd, buffer, 1, "x")
        assert buffer == b"234"
    finally:
        os.close(fd)


# JSON ----------------------------------------------------------------------------------------------------------------


def written(folder, text: str | bytes):
    path = folder / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ('{"a":1', "not JSON"),
        ('{"a":1}}', "not JSON"),
        ("{'a':1}", "not JSON"),
        (b'{"a":"\xff"}', "not JSON in UTF-8"),
        (b"\xff\xfe{\0}\0", "not JSON in UTF-8"),
        ('{"a":"\\ud800"}', "surrogates not allowed"),
        ('{"\\uDFFF":1}', "surrogates not allowed"),
        ("[]", "must be an object"),
        ("null", "must be an object"),
        ('"' + "x" * 10_000 + '"', "must be an object"),
        ('{"a":1,"a":1}', "the key 'a' is there twice"),
        ('{"b":{"a":1,"\\u0061":2}}', "the key 'a' is there twice"),
        ('{"a":' + "[" * 32 + "]" * 32 + "}", "nests deeper than 32"),
        ('{"a":' * 33 + "1" + "}" * 33, "nests deeper than 32"),
        ("[" * 500_000, "nests deeper than 32"),
        ('{"a":' * 100_000, "nests deeper than 32"),
        ("[" + "[]," * 1_000_000 + "0]", "more than 1000000 values"),
        ('"",' * 2_000_001, "more than 1000000 values"),
        ('{"a":' + "9" * 5000 + "}", "thousands of digits"),
        ("{}" + " " * (16 << 20), "at most 16777216 are read"),
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_bad_json_is_refused_quickly_and_with_a_remedy(text, rule, tmp_path):
    path = written(tmp_path, text)
    with deadline(10), pytest.raises(ConfigError) as refusal:
        read_json(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and rule in message and "download it again" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, -0.5, 1e-5, None, True, "x"], "b": {"c": {}}},
        {
            "limit": [0.0, float("inf")]
        },  # Python's own writer spells it Infinity, and configs hold it
        {"template": "{{[[" * 50 + '\\"' + "\U0001f600"},
        {"quotes": '",{["' * 100, "back": "\\" * 99},
    ],
    ids=str,
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_good_json_is_read_as_python_reads_it(value, ascii_only, tmp_path):
    assert read_json(written(tmp_path, json.dumps(value, ensure_ascii=ascii_only))) == value


def test_the_deepest_and_the_fullest_json_are_read(tmp_path):
    assert read_json(written(tmp_path, '{"a":' * 32 + "1" + "}" * 32))
    text = json.dumps({"a": [0] * 10})
    assert read_json(written(tmp_path, text), values=12) == {"a": [0] * 10}
    with pytest.raises(ConfigError, match="more than 10 values"):
        read_json(written(tmp_path, text), values=10)


def test_a_missing_file_and_the_callers_error_class(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: the file is missing"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        read_json(tmp_path / "config.json", error=CheckpointError)
