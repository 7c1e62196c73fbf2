"""The llama.cpp we build on: a pinned sdist of llama-cpp-python, and our patches to the tree inside."""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import moe2gguf
from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime.process import run_logged

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class Upstream:
    """patches/UPSTREAM and patches/series."""

    package: str  # distribution name, as in the sdist's file name: "llama_cpp_python"
    version: str
    sha256: str  # of the sdist
    tree: str  # llama.cpp's folder inside the sdist
    patches: tuple[Path, ...]  # in the order they apply

    @property
    def sdist_name(self) -> str:
        return f"{self.package}-{self.version}.tar.gz"

    @property
    def patches_digest(self) -> str:
        """sha256 over the patches in order; renaming a file does not change it."""
        digest = hashlib.sha256()
        for patch in self.patches:
            content = patch.read_bytes()
            digest.update(f"{len(content)}\n".encode() + content)
        return digest.hexdigest()

    @property
    def local_version(self) -> str:
        """PEP 440 local segment of what we build. The "p" keeps an all-digit digest from being read as a number."""
        return f"moe2gguf.p{self.patches_digest[:8]}"


def patches_folder() -> Path:
    """Inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(moe2gguf.__file__).parent
    for folder in (package / "patches", package.parent / "patches"):
        if (folder / "series").is_file():
            return folder
    raise RuntimeMissing(f"the patches are missing beside {package}: reinstall moe2gguf")


def read_upstream(folder: Path | None = None) -> Upstream:
    """Read UPSTREAM ("key: value" lines) and series (a file name per line) from FOLDER, default patches_folder()."""
    folder = folder or patches_folder()
    lines = (folder / "UPSTREAM").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))
    series = (folder / "series").read_text(encoding="utf-8").split()
    return Upstream(patches=tuple(folder / name for name in series), **fields)


def verify_sdist(sdist: Path, upstream: Upstream) -> None:
    """Raises RuntimeMissing unless SDIST is byte for byte the pinned one."""
    digest = hashlib.sha256()
    with sdist.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != upstream.sha256:
        raise RuntimeMissing(
            f"{sdist} has sha256 {found}, but patches/UPSTREAM pins {upstream.sha256}: delete the file and try again"
        )


def fetch_sdist(upstream: Upstream, folder: Path, *, env: Mapping[str, str], log: Path) -> Path:
    """The verified sdist in FOLDER, downloaded by pip (so that its index and proxy settings hold) if not there."""
    sdist = folder / upstream.sdist_name
    if sdist.is_file():
        verify_sdist(sdist, upstream)
        return sdist
    download = folder / "download"
    shutil.rmtree(download, ignore_errors=True)
    download.mkdir(parents=True)
    requirement = download / "requirements.txt"
    requirement.write_text(f"{upstream.package}=={upstream.version} --hash=sha256:{upstream.sha256}\n")
    run_logged(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--require-hashes",
            "--disable-pip-version-check",
            "--dest",
            download,
            "-r",
            requirement,
        ],
        what=f"downloading {upstream.sdist_name}",
        env=env,
        log=log,
    )
    verify_sdist(download / upstream.sdist_name, upstream)
    (download / upstream.sdist_name).replace(sdist)
    shutil.rmtree(download)
    return sdist


def unpack(sdist: Path, upstream: Upstream, target: Path) -> None:
    """Unpack SDIST as folder TARGET, which appears only when complete, without the traces of the git checkout."""
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with tarfile.open(sdist) as archive:
            # an argument of extractall only since 3.10.12 and 3.11.4; Debian 12 has 3.11.2
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(aside)
        root = aside / f"{upstream.package}-{upstream.version}"
        # the submodule's .git file points outside the sdist and makes every git command in the tree fail
        (root / upstream.tree / ".git").unlink(missing_ok=True)
        root.rename(target)
    except OSError as error:
        raise RuntimeMissing(f"cannot unpack {sdist} to {target.parent}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def split_header(patch_text: str) -> tuple[str, str]:
    """A patch file's DEP-3 header and its diff, which a line "---" separates."""
    header, _, diff = patch_text.partition("\n---\n\n")
    return header, diff


def apply_series(patches: Iterable[Path], root: Path) -> None:
    """Apply the unified diffs PATCHES to the tree ROOT, in order."""
    for patch in patches:
        apply_patch(patch, root)


def apply_patch(patch: Path, root: Path) -> None:
    """Apply one unified diff (as `patch -p1` would, but with no fuzz and no offset) to the tree ROOT.

    Raises RuntimeMissing, naming the patch and the place, where the tree is not what the patch was made from.
    """
    lines = patch.read_bytes().split(b"\n")
    i = 0
    while i < len(lines):
        if not (lines[i].startswith(b"--- ") and i + 1 < len(lines) and lines[i + 1].startswith(b"+++ b/")):
            i += 1
            continue
        is_new = lines[i] == b"--- /dev/null"
        path = root / lines[i + 1][len(b"+++ b/") :].decode()
        i += 2
        if is_new == path.exists():
            raise RuntimeMissing(f"{patch.name} does not fit: {path} {'exists' if is_new else 'is missing'}")
        old = [] if is_new else path.read_bytes().split(b"\n")
        new: list[bytes] = []
        n_copied = 0  # lines of old that are in new or deleted
        while i < len(lines) and (hunk := _HUNK.match(lines[i])):
            start, n_old, _, n_new = (int(number) if number else 1 for number in hunk.groups())
            begin = start - 1 if n_old else start  # "-12,0" inserts after line 12
            body = []
            i += 1
            n_old_left, n_new_left = n_old, n_new
            while n_old_left or n_new_left:
                body.append(lines[i])
                n_old_left -= lines[i][:1] != b"+"
                n_new_left -= lines[i][:1] != b"-"
                i += 1
            if old[begin : begin + n_old] != [line[1:] for line in body if line[:1] != b"+"]:
                raise RuntimeMissing(f"{patch.name} does not fit {path} at line {start}")
            if i < len(lines) and lines[i].startswith(b"\\"):
                raise RuntimeMissing(f"{patch.name} makes {path} end without a newline, which is not supported")
            new += old[n_copied:begin] + [line[1:] for line in body if line[:1] != b"-"]
            n_copied = begin + n_old
        new += old[n_copied:] if not is_new else [b""]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n".join(new))
