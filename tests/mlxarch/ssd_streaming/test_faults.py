"""Disks that fail while a model runs: each fault is an error that names layer, expert and file, or changes nothing.

At 50 random reads for each fault. The request fails, the caches hold whole tokens, and the next request is answered.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest

from mlxarch.blocks import CausalLM
from mlxarch.errors import ExpertReadError
from mlxarch.generation.decode import decode
from mlxarch.generation.sampling import Sampling
from mlxarch.generation.session import Session
from mlxarch.loading.execution import Execution
from mlxarch.loading.load import load_model
from mlxarch.quantization.scheme import Quantization
from mlxarch.quantize.repack.pack_experts import pack
from mlxarch.ssd_streaming import experts
from mlxarch.ssd_streaming.experts import StreamedExperts
from streamed import attached
from tiny_moe import make_moe

TRIALS = 50
PROMPT = np.random.default_rng(3).integers(0, 96, 12).tolist()
real_preadv = os.preadv
Outcome = Literal["detected", "harmless"]


@dataclass
class Read:
    """One call of preadv, at which a fault strikes."""

    fd: int
    buffers: Any
    position: int
    trial: int

    @property
    def path(self) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{self.fd}"))

    def go(self) -> int:
        return real_preadv(self.fd, self.buffers, self.position)


def fails(code: int) -> Callable[[Read], int]:
    def fault(read: Read) -> int:
        raise OSError(code, os.strerror(code))

    return fault


def short(read: Read) -> int:
    return real_preadv(read.fd, [memoryview(read.buffers[0])[: 1 + read.trial]], read.position)


def nothing(read: Read) -> int:
    return 0


def truncate(read: Read) -> int:
    os.truncate(read.path, read.position + read.trial)
    return read.go()


def replace(read: Read) -> int:
    path = read.path
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    os.replace(other, path)
    return read.go()


def overwrite(read: Read) -> int:
    """In place, before the next read looks at the file."""
    count = read.go()
    with read.path.open("r+b") as file:
        file.seek(read.position)
        file.write(b"other bytes")
    return count


def flip(read: Read) -> int:
    """One bit of what is read, without a trace in the file's times."""
    before, path = os.fstat(read.fd), read.path
    with path.open("r+b") as file:
        place = read.position + 17 * read.trial
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << read.trial % 8]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return read.go()


@dataclass(frozen=True)
class Fault:
    strike: Callable[[Read], int]
    outcome: Outcome
    lasting: bool = False  # every later read fails, too
    spoils: bool = False  # the file is another afterwards


FAULTS = {
    "EIO": Fault(fails(errno.EIO), "detected", lasting=True),
    "EIO once": Fault(fails(errno.EIO), "harmless"),
    "EINTR": Fault(fails(errno.EINTR), "harmless"),
    "EAGAIN": Fault(fails(errno.EAGAIN), "harmless"),
    "EBADF": Fault(fails(errno.EBADF), "detected"),
    "short read": Fault(short, "harmless"),
    "no bytes": Fault(nothing, "detected"),
    "truncation": Fault(truncate, "detected", spoils=True),
    "replacement": Fault(replace, "harmless", spoils=True),
    "change in place": Fault(overwrite, "detected", spoils=True),
    "bit flip": Fault(flip, "detected", spoils=True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("faults")
    plain = make_moe(folder / "plain", packed=Quantization(4, 32))
    return {"plain": plain, "packed": pack(plain, folder / "packed").output}


def load(folder: Path, verify: Literal["first", "always", "never"] = "always") -> CausalLM:
    return load_model(folder, execution=Execution(slots=(4, 0, 4), verify=verify))[0]


def ask(model: CausalLM, session: Session | None = None) -> list[int]:
    session = session or Session(model.make_caches(), renew=model.make_caches)
    return [token for token, _ in decode(model, session, PROMPT, Sampling(), 5)]


def logits(model: CausalLM) -> bytes:
    return np.asarray(model(mx.array([PROMPT]))).tobytes()


@pytest.fixture
def strike(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Fault | None, int, int], list[Path]]]:
    """Let a fault strike at a read from now on; gives the list to which the file struck is added."""
    state: dict[str, Any] = {"fault": None}

    def preadv(fd: int, buffers: Any, position: int) -> int:
        fault: Fault | None = state["fault"]
        if fault is None:
            return real_preadv(fd, buffers, position)
        state["left"] -= 1
        if state["left"] == 0 or (state["left"] < 0 and fault.lasting):
            read = Read(fd, buffers, position, state["trial"])
            state["struck"].append(read.path)
            return fault.strike(read)
        return real_preadv(fd, buffers, position)

    def arm(fault: Fault | None, read: int = 0, trial: int = 0) -> list[Path]:
        state.update(fault=fault, left=read, trial=trial, struck=[])
        return state["struck"]

    monkeypatch.setattr(os, "preadv", preadv)
    yield arm


# Without checksums of the maker's, only what was read once can be compared: a plain folder's flipped bits are below.
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in FAULTS for k in ("packed", "plain") if (n, k) != ("bit flip", "plain")],
)
def test_every_fault_is_detected_or_harmless(
    name: str, kind: str, folders: dict[str, Path], strike: Any, tmp_path: Path
) -> None:
    fault, draw = FAULTS[name], np.random.default_rng(4)
    model, found = load(folders[kind]), []
    wanted = ask(model)
    for trial in range(TRIALS):
        if fault.spoils:
            model = load(Path(shutil.copytree(folders[kind], tmp_path / f"{trial}")))
        session = Session(model.make_caches(), renew=model.make_caches)
        struck = strike(fault, int(draw.integers(1, 14 if kind == "packed" else 30)), trial)
        try:
            assert ask(model, session) == wanted
            found.append("harmless")
        except ExpertReadError as error:
            assert struck and f"{struck[0].parent}" in str(error), error
            assert re.match(
                r"expert \d+ of layer [02] could not be read from .*(bin|safetensors), byte \d+: [^()<>]+$",
                str(error),
            )
            found.append("detected")
            assert all(cache.length == len(session.tokens) for cache in session.caches if cache)
        strike(None)
        assert struck, "the fault did not strike"
        if not fault.spoils:
            assert ask(model, session) == wanted  # the same model, the same session
        elif fault.outcome == "detected" and trial % 10 == 0:
            assert ask(load(folders[kind])) == wanted  # the same process
    assert found == [fault.outcome] * TRIALS


def test_without_checksums_a_flipped_bit_changes_answers_unseen(
    folders: dict[str, Path], strike: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        experts, "READER_THREADS", 1
    )  # another reader might look at the file's times before they are put back
    wanted = logits(load(folders["packed"]))
    for trial in range(3):
        model = load(Path(shutil.copytree(folders["packed"], tmp_path / f"{trial}")), "never")
        strike(FAULTS["bit flip"], 1 + trial, 3 + 8 * trial)
        assert logits(model) != wanted
        strike(None)


@pytest.mark.parametrize("kind", ["packed", "plain"])
@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_when_a_checksum_is_compared(
    verify: Literal["first", "always", "never"], kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A bit flips after the first read, for good or once; before it, only the published checksum tells."""
    seen = []
    for before in (True, False):
        model = load(Path(shutil.copytree(folders[kind], tmp_path / f"{before}")), verify)
        records = attached(model).layers[2].records
        buffers = [np.empty(part.nbytes, np.uint8) for part in records.parts]
        if not before:
            records.read(5, buffers)
        place = next(iter(records.files.values())) if kind == "plain" else None
        file = next(
            f for s, f in records.files.items() if place or s is records.parts[0].tensor.shard
        )  # type: ignore[attr-defined]
        positions: list[int] = []
        real, file.read = file.read, lambda b, p, positions=positions: positions.append(p)
        records.verify = "never"
        records.read(5, buffers)
        file.read, records.verify = real, verify
        descriptor = os.open(file.path, os.O_RDONLY)
        flip(Read(descriptor, [bytearray(1)], positions[0], 1))
        os.close(descriptor)
        try:
            records.read(5, buffers)
            seen.append(False)
        except ExpertReadError as error:
            assert "checksum" in str(error) and "expert 5 of layer 2" in str(error)
            seen.append(True)
    expected = {
        "first": [kind == "packed", False],
        "always": [kind == "packed", True],
        "never": [False, False],
    }
    assert seen == expected[verify]


def test_nothing_is_mapped_into_memory(folders: dict[str, Path]) -> None:
    model = load(folders["packed"])
    ask(model)
    assert str(folders["packed"]) not in Path("/proc/self/maps").read_text()


def test_a_failed_read_gives_its_slot_back(folders: dict[str, Path], strike: Any) -> None:
    model = load(folders["packed"])
    for trial in range(30):
        strike(FAULTS["EIO"], 1 + trial % 9, trial)
        with pytest.raises(ExpertReadError):
            ask(model)
        strike(None)
        for layer in attached(model).layers.values():
            assert sorted([*layer._slots.values(), *layer._free]) == list(range(4))
            assert {e: s for e, s in enumerate(layer._slot_of.tolist()) if s >= 0} == dict(
                layer._slots
            )


def test_a_second_thread_may_generate(folders: dict[str, Path]) -> None:
    model = load(folders["packed"])
    wanted = ask(model)
    with ThreadPoolExecutor(3) as threads:
        found = [threads.submit(ask, model) for _ in range(9)]
        assert [future.result() for future in found] == [wanted] * 9


def test_an_interruption_anywhere_leaves_the_slots_sound(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders["packed"])
    wanted = ask(model)
    for name in ("_take_slot", "_read", "_product", "_compute_at_once"):
        for moment in range(1, 6):
            real, left = getattr(StreamedExperts, name), [moment]

            def interrupted(*arguments: Any, real: Any = real, left: list[int] = left) -> Any:
                found = real(
                    *arguments
                )  # the worst moment: what it did is done, and nobody was told
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return found

            monkeypatch.setattr(StreamedExperts, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                ask(model)
            monkeypatch.undo()
            for layer in attached(model).layers.values():
                assert sorted([*layer._slots.values(), *layer._free]) == list(range(4))
            assert ask(model) == wanted
