"""Conversions that are killed, that run out of disk, or that meet a failing one: the next run makes the same bytes.

Whatever happens, the target is absent or complete, and a former output is never lost.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import faulty_disk
from faulty_disk import FaultyDisk, FullDisk
from mlxarch import quantize
from mlxarch.checkpoint.receipt import RECEIPT_FILE
from mlxarch.errors import CheckpointError, DiskSpaceError, OutputError, QuantizationError
from mlxarch.quantize.conversion import Limits
from mlxarch.quantize.schedule import Method
from mlxarch.system.durable_files import Disk
from tiny_llama import contents, make_llama

# what is asked here has nothing to do with how codes are chosen, and rounding is quick
convert, prepare = (
    partial(quantize.convert, method="round"),
    partial(quantize.prepare, method="round"),
)
LIMITS = Limits(
    chunk_bytes=16_000, sync_bytes=6_000, shard_bytes=14_000
)  # three files, several syncs for each
LARGEST = 5120  # bytes of the largest parameter, packed


class Killer:
    """Runs jobs in processes that are forked from one that has everything imported."""

    def __init__(self) -> None:
        support = str(Path(faulty_disk.__file__).parent)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")]),
        }
        self.process = subprocess.Popen(
            [sys.executable, faulty_disk.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, source: Path, output: Path, **job: Any) -> dict[str, Any]:
        job = {
            "source": str(source),
            "output": str(output),
            "bits": 4,
            "force": False,
            "limits": astuple(LIMITS),
            **job,
        }
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    killer = Killer()
    with killer.process:
        yield killer
        assert killer.process.stdin
        killer.process.stdin.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a") / "source"
    make_llama(folder, layers=1)
    return folder


@pytest.fixture(scope="module")
def reference(source: Path) -> dict[str, str]:
    """Output of an undisturbed run."""
    output = source.parent / "reference"
    prepare(source, output, limits=LIMITS).run()
    return contents(output)


@pytest.fixture(scope="module")
def former(source: Path) -> Path:
    """An output that another run is to replace."""
    convert(source, source.parent / "former", bits=8, method="round")
    return source.parent / "former"


def check_after_kill(output: Path, complete: dict[str, str], before: dict[str, str] | None) -> None:
    if output.exists():
        assert contents(output) in [complete, before]
    elif before is not None:
        assert contents(output.with_name("out.partial") / "replaced") == before


def check_complete(output: Path, complete: dict[str, str]) -> None:
    assert contents(output) == complete
    assert os.listdir(output.parent) == ["out"], "nothing is left behind"


def test_a_kill_at_any_operation_is_survived(
    killer: Killer, source: Path, reference: dict, former: Path, tmp_path: Path
):
    undisturbed = killer.run(source, tmp_path / "count" / "out")
    operations, whole = undisturbed["operations"], undisturbed["written"]
    assert operations > 60
    moments = [(at, "before", False) for at in range(operations)]
    moments += [
        (at, "torn", False) for at in range(0, operations, 5)
    ]  # of a write, only the first bytes arrive
    moments += [
        (at, "before", True) for at in range(operations - 4, operations + 1)
    ]  # the first rename, and from there
    before = contents(former)
    for at, how, force in moments:
        output = tmp_path / f"{at} {how} {force}" / "out"
        if force:
            shutil.copytree(former, output)
        assert killer.run(source, output, at=at, how=how, force=force)["killed"], (at, how, force)
        check_after_kill(output, reference, before if force else None)
        if output.exists() and contents(output) == reference:
            again = killer.run(source, output)
            assert "exists already" in again["error"]
        else:
            again = killer.run(source, output, force=force)
            assert again["written"] <= whole, again
        check_complete(output, reference)
    assert len(moments) >= 80


def test_what_is_durable_is_not_written_again(
    killer: Killer, source: Path, reference: dict, tmp_path: Path
) -> None:
    undisturbed = killer.run(source, tmp_path / "whole" / "out")
    late = undisturbed["operations"] - 3
    assert killer.run(source, tmp_path / "late" / "out", at=late)["killed"]
    again = killer.run(source, tmp_path / "late" / "out")
    check_complete(tmp_path / "late" / "out", reference)
    assert again["written"] < 0.6 * undisturbed["written"], (
        "the weights were there; only the files beside them are new"
    )
    half = undisturbed["operations"] // 2
    assert killer.run(source, tmp_path / "half" / "out", at=half)["killed"]
    first = sum(
        path.stat().st_size for path in (tmp_path / "half" / "out.partial" / "model").iterdir()
    )
    again = killer.run(source, tmp_path / "half" / "out")
    check_complete(tmp_path / "half" / "out", reference)
    assert first > LIMITS.sync_bytes
    assert again["written"] < undisturbed["written"] - first + LIMITS.sync_bytes + 2 * LARGEST


@pytest.mark.parametrize("force", [False, True])
def test_a_kill_at_any_time_is_survived(
    killer: Killer, source: Path, reference: dict, former: Path, tmp_path: Path, force: bool
) -> None:
    before, killed = contents(former), 0
    for n in range(15):
        output = tmp_path / str(n) / "out"
        if force:
            shutil.copytree(former, output)
        killed += killer.run(source, output, after=0.005 * n, force=force)["killed"]
        check_after_kill(output, reference, before if force else None)
        again = killer.run(source, output, force=force)
        assert "error" not in again or "exists already" in again["error"]
        check_complete(output, reference)
    assert killed >= 5


def test_a_kill_between_the_renames_gives_the_former_output_back(
    killer: Killer, source: Path, former: Path, tmp_path: Path
) -> None:
    last = killer.run(source, tmp_path / "count" / "out")["operations"] - 1
    output = tmp_path / "out"
    shutil.copytree(former, output)
    assert killer.run(source, output, at=last, force=True)["killed"]
    assert not output.exists(), "this is the moment that the test is about"
    again = killer.run(source, output, bits=3)  # somebody who does not know of --force
    assert "exists already" in again["error"]
    assert contents(output) == contents(former)


def test_somebody_elses_folder_in_the_place_of_a_replaced_one_is_left_alone(
    killer: Killer, source: Path, former: Path, tmp_path: Path
) -> None:
    last = killer.run(source, tmp_path / "count" / "out")["operations"] - 1
    output = tmp_path / "out"
    shutil.copytree(former, output)
    killer.run(source, output, at=last, force=True)
    output.mkdir()
    with pytest.raises(
        OutputError, match="made by somebody else while its former contents are in .*replaced"
    ):
        convert(source, output, force=True)
    assert contents(tmp_path / "out.partial" / "replaced") == contents(former)


def test_a_full_disk_at_any_offset_loses_nothing(
    source: Path, reference: dict, former: Path, tmp_path: Path
) -> None:
    counting = FaultyDisk(lambda number, name: None)
    prepare(source, tmp_path / "count" / "out", limits=LIMITS, disk=counting).run()
    before, told = contents(former), []
    for n in range(20):
        output = tmp_path / str(n) / "out"
        shutil.copytree(former, output)
        full = FullDisk(counting.written * n // 20)
        with pytest.raises(
            DiskSpaceError, match=r"is full: .*out still needs .*, and .* are free\. (What|Free)"
        ) as caught:
            prepare(source, output, limits=LIMITS, disk=full).run(force=True)
        assert contents(output) == before
        told.append("is kept" in str(caught.value))
        assert (output.parent / "out.partial").exists() == told[-1]
        prepare(source, output, limits=LIMITS).run(force=True)
        check_complete(output, reference)
    assert told == sorted(told) and set(told) == {False, True}


@pytest.mark.parametrize("name", ["write", "sync", "rename"])
def test_a_failing_disk_is_an_output_error_and_loses_nothing(
    source: Path, reference: dict, former: Path, tmp_path: Path, name: str
) -> None:
    for n, at in enumerate((0, 1, 5, 30 if name == "write" else 9)):
        seen = []

        def fail(number: int, operation: str, seen: list[int] = seen, at: int = at) -> None:
            if operation == name:
                seen.append(number)
                if len(seen) == (1 if name == "rename" else at + 1):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))

        output = tmp_path / f"{n}" / "out"
        shutil.copytree(former, output)
        with pytest.raises(
            OutputError, match=r"out could not be written: Input/output error"
        ) as caught:
            prepare(source, output, limits=LIMITS, disk=FaultyDisk(fail)).run(force=True)
        assert contents(output) == contents(former)
        kept = "Nothing is lost" in str(caught.value)
        assert kept == (output.parent / "out.partial").exists() and (kept or n < 3)
        prepare(source, output, limits=LIMITS).run(force=True)
        check_complete(output, reference)


def test_writes_that_come_back_short_are_gone_on_with(
    source: Path, reference: dict, tmp_path: Path
) -> None:
    short = FaultyDisk(lambda number, name: 1 + number % 999)
    prepare(source, tmp_path / "out", limits=LIMITS, disk=short).run()
    check_complete(tmp_path / "out", reference)
    assert short.count > 200


class Small(Disk):
    """A disk with few bytes free, which it says."""

    def __init__(self, room: int) -> None:
        self.room = room

    def free(self, folder: Path) -> int:
        return self.room


def test_too_small_a_disk_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    conversion = prepare(source, tmp_path / "out", limits=LIMITS)
    tight = prepare(source, tmp_path / "out", limits=LIMITS, disk=Small(conversion.disk_bytes - 1))
    needed = conversion.disk_bytes
    message = rf"needs .* \({needed} bytes\) of disk, and .* \({needed - 1} bytes\) are free"
    with pytest.raises(DiskSpaceError, match=message):
        tight.run()
    assert not list(tmp_path.iterdir())
    prepare(source, tmp_path / "out", limits=LIMITS, disk=Small(conversion.disk_bytes)).run()
    held = sum(path.stat().st_blocks * 512 for path in (tmp_path / "out").iterdir())
    assert (
        abs(conversion.disk_bytes - 4096 - held) <= 0.02 * held
    )  # a block of it was the journal's


def interrupted_run(source: Path, output: Path, **settings: Any) -> None:
    conversion = prepare(source, output, limits=LIMITS, **settings)

    def interrupt(label: str, done: int, total: int) -> None:
        if label == "quantizing" and done > total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        conversion.run(progress=interrupt)
    [note] = caught.value.__notes__
    kept = f"{output}: what is written so far is kept; the same command goes on from there"
    again = ", after it has repeated the calibration" if conversion.calibration else ""
    assert note == kept + again


@pytest.mark.parametrize("problem", [KeyboardInterrupt, CheckpointError, QuantizationError])
def test_what_nobody_can_go_on_with_is_not_left_behind(
    source: Path, tmp_path: Path, problem: type[BaseException]
) -> None:
    for moment in (0.0, 0.7):

        def stop(label: str, done: int, total: int, moment: float = moment) -> None:
            if label == "quantizing" and done >= total * moment:
                raise problem

        with pytest.raises(problem) as caught:
            prepare(source, tmp_path / "out", limits=LIMITS).run(progress=stop)
        kept = moment > 0 and problem is not QuantizationError  # which asks for another source
        assert os.listdir(tmp_path) == ["out.partial"] * kept
        said = " ".join(getattr(caught.value, "__notes__", ()))
        assert ("is kept" in said) is kept
        assert ("nothing to keep" in said) is (problem is KeyboardInterrupt and not kept)


def first_report(source: Path, output: Path, **settings: Any) -> int:
    seen: list[int] = []
    prepare(source, output, limits=LIMITS, **settings).run(
        progress=lambda label, done, total: seen.append(done)
    )
    return seen[0]


def test_an_interrupted_run_is_gone_on_with(source: Path, reference: dict, tmp_path: Path) -> None:
    interrupted_run(source, tmp_path / "out")
    assert first_report(source, tmp_path / "out") > 0
    check_complete(tmp_path / "out", reference)


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_an_interrupted_search_is_gone_on_with(
    source: Path, tmp_path: Path, method: Method
) -> None:
    prepare(source, tmp_path / "whole" / "out", limits=LIMITS, method=method).run()
    output = tmp_path / "interrupted" / "out"
    interrupted_run(source, output, method=method)
    assert first_report(source, output, method=method) > 0
    check_complete(output, contents(tmp_path / "whole" / "out"))


def test_other_settings_start_anew(source: Path, tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {"bits": 8},
        {"group_size": 32},
        {"dtype": "float16"},
        {"mode": "mxfp4"},
        {"method": "search"},
    ]
    for n, other in enumerate(others):
        output = tmp_path / str(n) / "out"
        interrupted_run(source, output)
        assert first_report(source, output, **other) == 0
        prepare(source, tmp_path / f"fresh {n}" / "out", limits=LIMITS, **other).run()
        check_complete(output, contents(tmp_path / f"fresh {n}" / "out"))


def test_another_source_or_version_starts_anew(
    source: Path, reference: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    for n in range(2):
        output = tmp_path / str(n) / "out"
        interrupted_run(copy, output)
        if n == 0:
            os.utime(copy / "model.safetensors", (1, 1))
        else:
            monkeypatch.setattr(
                "mlxarch.quantize.conversion.version", lambda package: f"9.9 of {package}"
            )
        assert first_report(copy, output) == 0
    changed = contents(tmp_path / "0" / "out")
    check_complete(tmp_path / "0" / "out", reference)
    assert {
        name for name in changed if changed[name] != contents(tmp_path / "1" / "out")[name]
    } == {
        "README.md",
        RECEIPT_FILE,
    }


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"\x00\xff\n[]\n", b'{"plan": '])
def test_a_journal_that_cannot_be_read_starts_anew(
    source: Path, reference: dict, tmp_path: Path, damage: bytes
) -> None:
    interrupted_run(source, tmp_path / "out")
    (tmp_path / "out.partial" / "journal").write_bytes(damage)
    assert first_report(source, tmp_path / "out") == 0
    check_complete(tmp_path / "out", reference)


def test_a_torn_last_line_of_the_journal_does_not_count(
    source: Path, reference: dict, tmp_path: Path
) -> None:
    interrupted_run(source, tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal"
    journal.write_bytes(journal.read_bytes() + b'["lm_head.weight", "model.norm.weig')
    assert first_report(source, tmp_path / "out") > 0
    check_complete(tmp_path / "out", reference)


def test_a_weight_file_that_vanished_is_written_again(
    source: Path, reference: dict, tmp_path: Path
) -> None:
    interrupted_run(source, tmp_path / "out")
    for file in (tmp_path / "out.partial" / "model").iterdir():
        file.unlink()
    assert first_report(source, tmp_path / "out") == 0
    check_complete(tmp_path / "out", reference)


def test_of_many_processes_on_one_output_one_wins(
    source: Path, reference: dict, tmp_path: Path
) -> None:
    killers = [Killer() for _ in range(3)]
    for killer in killers:  # all have imported what they need before any begins
        killer.run(source, tmp_path / str(id(killer)) / "out")
    job = {
        "source": str(source),
        "output": str(tmp_path / "one" / "out"),
        "bits": 4,
        "force": False,
    }
    for killer in killers:
        assert killer.process.stdin
        killer.process.stdin.write(json.dumps({**job, "limits": astuple(LIMITS)}) + "\n")
        killer.process.stdin.flush()
    answers = []
    for killer in killers:
        with killer.process:
            assert killer.process.stdout and killer.process.stdin
            answers.append(json.loads(killer.process.stdout.readline()))
            killer.process.stdin.close()
    assert sorted("error" in answer for answer in answers) == [False, True, True]
    assert all("OutputError" in answer.get("error", "OutputError") for answer in answers)
    check_complete(tmp_path / "one" / "out", reference)
