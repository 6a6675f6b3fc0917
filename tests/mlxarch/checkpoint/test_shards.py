"""Choosing the shards of a folder, and opening nothing else."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from raw_safetensors import open_in, safetensors

from mlxarch.checkpoint.shards import INDEX_FILE, Checkpoint
from mlxarch.errors import CheckpointError, ConfigError, ModelNotFound

A, B = np.zeros(4, np.float32), np.ones(6, np.float32)
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / ONE).write_bytes(safetensors({"format": "mlx", "part": "1"}, a=A))
    (folder / TWO).write_bytes(safetensors({"format": "mlx", "part": "2"}, b=B, c=A))
    index(folder, {"a": ONE, "b": TWO, "c": TWO})
    return folder


def index(folder, weight_map, **more):
    (folder / INDEX_FILE).write_text(
        json.dumps({"metadata": {"total_size": 56.0}, "weight_map": weight_map, **more})
    )


def refused(folder, *words, error: type[Exception] = CheckpointError):
    with pytest.raises(error) as refusal:
        Checkpoint.open(folder)
    message = str(refusal.value)
    for word in (str(folder), *words):
        assert word in message
    assert open_in(folder) == 0


def test_an_indexed_folder_is_opened(folder, caplog):
    with Checkpoint.open(str(folder)) as checkpoint:
        assert open_in(folder) == 2
        assert checkpoint.folder == folder
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.metadata == {"format": "mlx", "part": "1"}
        assert [shard.path for shard in checkpoint.shards] == [folder / ONE, folder / TWO]
        assert set(checkpoint.tensors) == {"a", "b", "c"}
        shard, info = checkpoint.tensors["b"]
        buffer = np.empty(info.shape, np.float32)
        shard.read_into(info, buffer)
        assert np.array_equal(buffer, B)
        checkpoint.check_unchanged()
        os.utime(folder / TWO, ns=(1, 1))
        with pytest.raises(CheckpointError, match=TWO):
            checkpoint.check_unchanged()
    assert open_in(folder) == 0
    assert not caplog.records


def test_a_stray_shard_is_ignored_with_a_warning(folder, caplog):
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"from an older run, and broken")
    (folder / "._model.safetensors").write_bytes(b"of the macOS Finder")
    with caplog.at_level(logging.WARNING), Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b", "c"}
    assert [record.name for record in caplog.records] == ["mlxarch.checkpoint.shards"]
    assert "'model-00003-of-00003.safetensors' left alone: not in the index" in caplog.text


def test_a_tensor_that_the_index_does_not_list_is_ignored_with_a_warning(folder, caplog):
    index(folder, {"a": ONE, "b": TWO})
    with caplog.at_level(logging.WARNING), Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}
    assert "'c' left alone: not in the index" in caplog.text


def test_a_missing_shard_is_named_with_the_remedy(folder):
    os.remove(folder / TWO)
    refused(folder, "1 of 2 weight files are missing", TWO, "Download the model again")


def opened(folder) -> set[str]:
    with Checkpoint.open(folder) as checkpoint:
        return set(checkpoint.tensors)


def test_a_tensor_in_the_index_alone_is_named(folder, caplog):
    index(folder, {"a": ONE, "b": TWO, "c": TWO, "d": ONE})
    assert opened(folder) == {"a", "b", "c"}
    assert "'d' left alone: in the index alone" in caplog.text


def test_a_whole_set_counts_beside_the_index_of_other_files(folder, caplog):
    index(folder, {"a": "model-00001-of-00001.safetensors", "z": ONE})
    assert opened(folder) == {"a", "b", "c"}
    assert f"{INDEX_FILE} names other files" in caplog.text
    index(folder, {"a": ONE, "b": ONE, "c": ONE})  # of a version with one file
    assert opened(folder) == {"a", "b", "c"}
    index(folder, {"a": ONE, "b": ONE, "c": TWO})
    assert opened(folder) == {"a", "b", "c"}
    assert f"{INDEX_FILE} belongs to other files" in caplog.text
    os.rename(folder / TWO, folder / "model-00003-of-00003.safetensors")
    refused(folder, "1 of 2 weight files are missing", TWO)
    (folder / "model.safetensors").write_bytes(safetensors(w=B))
    assert opened(folder) == {"w"}


def test_a_tensor_in_another_file_is_named_where_names_tell_no_whole_set(folder):
    os.rename(folder / TWO, folder / "two.safetensors")
    index(folder, {"a": ONE, "b": ONE, "c": "two.safetensors"})
    refused(folder, "two", "tensor 'b'", f"places it in {ONE}", "download all of them again")


def test_a_tensor_in_two_shards_is_refused(folder):
    (folder / TWO).write_bytes(safetensors(a=A, b=B, c=A))
    refused(folder, TWO, "tensor 'a'", f"is in {ONE} too", "download all of them again")


def test_a_file_under_two_names_is_refused(folder):
    os.link(folder / ONE, folder / "again.safetensors")
    index(folder, {"a": ONE, "b": TWO, "c": "again.safetensors"})
    refused(folder, "tensor 'a'", "download all of them again")


def test_a_broken_shard_is_refused_and_all_files_are_closed(folder):
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-1])
    refused(folder, TWO, "tensor 'c'", "exceed", "download it again")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["not JSON"]),
        ("[]", ["must be an object"]),
        ("{}", ["weight_map is None"]),
        ('{"weight_map": {}}', ["weight_map is {}"]),
        ('{"weight_map": ["a"]}', ["weight_map is ['a']"]),
        (
            '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}',
            ["the key 'a' is there twice"],
        ),
        ('{"weight_map": {"a": null}}', ["tensor 'a'", "its file is None"]),
        (
            '{"weight_map": {"a": ["x.safetensors"]}}',
            ["tensor 'a'", "its file is ['x.safetensors']"],
        ),
        (
            '{"weight_map": {"a": "pytorch_model.bin"}}',
            ["tensor 'a'", "must be a .safetensors file"],
        ),
        ('{"weight_map": ' + "[" * 100_000, ["nests deeper than 8"]),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_a_bad_index_is_refused(text, words, folder):
    (folder / INDEX_FILE).write_text(text)
    refused(folder, INDEX_FILE, *words)


def test_too_many_shards_are_refused(folder):
    index(folder, {str(i): f"{i}.safetensors" for i in range(10_001)})
    refused(folder, INDEX_FILE, "more than 10000 files")


def test_model_safetensors_counts_where_there_is_no_index(folder, caplog):
    os.remove(folder / INDEX_FILE)
    (folder / "model.safetensors").write_bytes(safetensors(w=B))
    with caplog.at_level(logging.WARNING), Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.tensors) == {"w"}
    assert f"'{ONE}', '{TWO}' left alone: model.safetensors is there" in caplog.text


def test_the_only_safetensors_file_counts_whatever_its_name(folder, caplog):
    os.remove(folder / INDEX_FILE)
    os.remove(folder / ONE)
    with caplog.at_level(logging.WARNING), Checkpoint.open(folder) as checkpoint:
        assert set(checkpoint.tensors) == {"b", "c"}
    assert not caplog.records


def test_a_whole_set_needs_no_index(folder, caplog):
    os.remove(folder / INDEX_FILE)
    assert opened(folder) == {"a", "b", "c"} and not caplog.records
    (folder / "adapter.safetensors").write_bytes(safetensors(w=B))
    assert opened(folder) == {"a", "b", "c"}
    assert "'adapter.safetensors' left alone" in caplog.text


@pytest.mark.parametrize(
    "name", ["three", "model-00002-of-00003", "model-2-of-00002", "x-00002-of-00002"]
)
def test_several_files_without_an_index_are_refused(name, folder):
    os.remove(folder / INDEX_FILE)
    os.rename(folder / TWO, folder / f"{name}.safetensors")
    refused(folder, ONE, name, f"neither {INDEX_FILE} nor their names", "Download the index too")


def test_a_folder_without_weights_says_what_is_there(folder):
    for name in (INDEX_FILE, ONE, TWO):
        os.remove(folder / name)
    refused(folder, "no safetensors file, only 'config.json'", "Download the model again")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "no safetensors file, only 'pytorch_model.bin'", "get the model in that format")


def test_a_folder_without_a_config_is_refused(folder):
    os.remove(folder / "config.json")
    refused(folder, "config.json: the file is missing", error=ConfigError)


def test_what_is_not_a_folder_is_not_found(folder):
    refused(folder / "none", "no such folder", error=ModelNotFound)
    refused(folder / ONE, "no such folder", error=ModelNotFound)


def test_a_folder_that_may_not_be_listed_is_refused(folder, monkeypatch):
    def deny(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", deny)  # not chmod, which does not stop root
    with pytest.raises(
        CheckpointError, match="model: Permission denied. Check the folder's permissions"
    ):
        Checkpoint.open(folder)


# What is opened ------------------------------------------------------------------------------------------------------

SHARD_NAMES = """
    ../outside.safetensors ../../outside.safetensors ./model.safetensors /etc/x.safetensors a/../../outside.safetensors
    sub/../outside.safetensors ..\\outside.safetensors C:\\outside.safetensors ~/outside.safetensors //x.safetensors
    file:///etc/x.safetensors .safetensors ..safetensors .hidden.safetensors CON.safetensors nul.safetensors
    $HOME.safetensors `id`.safetensors a|b.safetensors sub/.safetensors -rf.safetensors *.safetensors ?.safetensors
"""
BAD_SHARDS = [
    *SHARD_NAMES.split(),
    "",
    "\0.safetensors",
    "x\0.safetensors",
    " .safetensors",
    "x\n.safetensors",
]
BAD_SHARDS += [
    "\u2024\u2024/outside.safetensors",
    "\uff0e\uff0e.safetensors",
    "..\u2215outside.safetensors",
]
BAD_SHARDS += ["x" * 5_000 + ".safetensors", "../" * 500 + "outside.safetensors"]
BAD_LINKS = [
    "../outside.bin",
    "/dev/zero",
    "/etc/passwd",
    "x.safetensors",
    "../../blobs/x",
    "../hub",
    "/dev/stdin",
]

CHILD = """
import json, os, sys
from mlxarch.checkpoint.shards import Checkpoint
from mlxarch.errors import MlxArchError

opened, watching = [], False

def audit(event, arguments):
    if watching and event in ("open", "os.listdir", "os.scandir"):
        opened.append(os.path.realpath(arguments[0]))

sys.addaudithook(audit)
for folder in sys.stdin.read().split("\\n"):
    opened.clear()
    watching = True
    try:
        Checkpoint.open(folder).close()
        outcome = "opened"
    except MlxArchError as problem:
        outcome = str(problem)
    watching = False
    print(json.dumps([folder, outcome, opened]))
"""


def opened_by(folders) -> list[tuple[str, str, list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="\n".join(map(str, folders)),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_outside_a_hostile_folder_is_opened(tmp_path):
    for name in ("outside.safetensors", "outside.bin"):
        (tmp_path / name).write_bytes(safetensors(a=A))
    folders = []
    for name in [*BAD_SHARDS, *BAD_LINKS, "a fifo", "a folder"]:
        folder = tmp_path / f"model{len(folders)}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if name in BAD_SHARDS:
            index(folder, {"a": name})
        elif name == "a fifo":
            os.mkfifo(folder / "x.safetensors")
        elif name == "a folder":
            (folder / "x.safetensors").mkdir()
        else:
            (folder / "x.safetensors").symlink_to(name)
        folders.append(folder)
    for name in ("config.json", INDEX_FILE):  # which are links themselves
        folder = tmp_path / f"model{len(folders)}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(safetensors(a=A))
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/etc/passwd")
        folders.append(folder)
    results = opened_by(folders)
    assert len(results) == len(folders) > 40
    for folder, outcome, opened in results:
        assert outcome != "opened" and folder in outcome
        assert not [
            path for path in opened if path != folder and not path.startswith(folder + "/")
        ], outcome


def test_the_audit_sees_what_is_opened_and_the_hubs_blobs_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(folder.iterdir()):
        os.rename(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    [(_, outcome, opened)] = opened_by([snapshot])
    assert outcome == "opened"
    assert sorted(opened) == sorted([str(snapshot), *(str(blobs / str(i)) for i in range(4))])
