"""The pinned sdist and the patch series."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime.build import cache_folder
from moe2gguf.runtime.toolchain import find_toolchain
from moe2gguf.runtime.upstream import (
    Upstream,
    apply_patch,
    apply_series,
    patches_folder,
    read_upstream,
    split_header,
    unpack,
    verify_sdist,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sdist() -> Path:
    path = cache_folder() / read_upstream().sdist_name
    if not path.is_file():
        pytest.skip(f"{path} is not there: `moe2gguf runtime build` fetches it")
    return path


@pytest.fixture(scope="module")
def pristine(sdist, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("sdist") / "source"
    upstream = read_upstream()
    unpack(sdist, upstream, target)
    return target / upstream.tree


def test_series_names_every_patch_once() -> None:
    upstream = read_upstream()
    assert sorted(upstream.patches) == sorted(patches_folder().glob("*.patch"))


@pytest.mark.parametrize("patch", read_upstream().patches, ids=lambda patch: patch.stem)
def test_headers(patch) -> None:
    """DEP-3: where it comes from, whether it was sent upstream."""
    header, _ = split_header(patch.read_text())
    fields = [line.partition(":")[0] for line in header.splitlines() if not line.startswith(" ")]
    assert fields == ["Description", "Origin", "Forwarded", "Author", "Last-Update"]


@pytest.mark.slow
def test_series_applies_as_patch_and_git_apply_it(pristine, tmp_path) -> None:
    """Our applier, GNU patch without fuzz, and git agree."""
    upstream = read_upstream()
    lines = [line for patch in upstream.patches for line in patch.read_text().splitlines()]
    files = sorted({line.removeprefix("+++ b/") for line in lines if line.startswith("+++ b/")})
    appliers = {
        "ours": lambda patch, tree: apply_patch(patch, tree),
        "patch": lambda patch, tree: subprocess.run(
            ["patch", "-p1", "--fuzz=0", "-i", patch], cwd=tree, check=True, capture_output=True
        ),
        "git": lambda patch, tree: subprocess.run(["git", "apply", patch], cwd=tree, check=True, capture_output=True),
    }
    results = {}
    for name, apply in appliers.items():
        if name != "ours" and shutil.which(name) is None:
            continue
        tree = tmp_path / name
        for file in files:
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            if (pristine / file).exists():
                shutil.copy(pristine / file, tree / file)
        for patch in upstream.patches:
            apply(patch, tree)
        results[name] = {file: hashlib.sha256((tree / file).read_bytes()).hexdigest() for file in files}
    assert len(results) > 1, "neither git nor patch is here to compare with"
    assert all(result == results["ours"] for result in results.values())
    with pytest.raises(RuntimeMissing, match="does not fit"):  # a second time
        apply_series(upstream.patches, tmp_path / "ours")


@pytest.mark.slow
def test_refresh_round_trips(sdist, tmp_path) -> None:
    """Applying the series as commits and writing the commits back changes no byte."""
    scripts = ROOT / "scripts"
    subprocess.run([sys.executable, scripts / "patches-apply", tmp_path / "tree"], check=True, capture_output=True)
    (tmp_path / "patches").mkdir()
    refresh = [sys.executable, scripts / "patches-refresh", tmp_path / "tree", tmp_path / "patches"]
    subprocess.run(refresh, check=True, capture_output=True)
    for path in [patches_folder() / "series", *read_upstream().patches]:
        assert (tmp_path / "patches" / path.name).read_text() == path.read_text(), path.name


# what a compiler alone can judge: the other backends' sources include headers of their SDKs or of generated shaders
JUDGED = re.compile(r"(ggml/src/(ggml-cpu|ggml-rpc)|src|common|tests)/[\w-]+\.(c|cpp)|ggml/src/[\w-]+\.(c|cpp)")
INCLUDES = ("ggml/include", "ggml/src", "ggml/src/ggml-cpu", "include", "src", "common", "vendor")


@pytest.mark.slow
def test_each_patch_compiles_on_its_own(pristine, tmp_path) -> None:
    """The files that a patch changes, with only the patches before it."""
    toolchain = find_toolchain(os.environ)
    tree = shutil.copytree(pristine, tmp_path / "tree")
    (tree / "ggml/src/ggml-version.h").write_text('#define GGML_VERSION "0"\n#define GGML_COMMIT "0"\n')  # by CMake
    includes = [f"-I{tree / folder}" for folder in INCLUDES]

    def errors(file: str) -> str:
        compiler = [toolchain.cc, "-std=gnu11"] if file.endswith(".c") else [toolchain.cxx, "-std=gnu++17"]
        definitions = ["-D_GNU_SOURCE", "-DGGML_SCHED_MAX_COPIES=4"]
        command = [*compiler, "-fsyntax-only", *definitions, *includes, tree / file]
        result = subprocess.run(command, capture_output=True, text=True)
        return "\n".join(line for line in result.stderr.splitlines() if "error" in line) if result.returncode else ""

    n_judged = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for patch in read_upstream().patches:
            apply_patch(patch, tree)
            touched = re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)
            files = [file for file in touched if JUDGED.fullmatch(file)]
            n_judged += len(files)
            for file, error in zip(files, pool.map(errors, files), strict=True):
                assert not error, f"{file} as of {patch.name}: {error}"
    assert n_judged > 20


ORIGINAL = "".join(f"line {i}\n" for i in range(1, 21))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(ORIGINAL.replace("line 7\n", "line seven\n"), id="a line changed"),
        pytest.param("first\n" + ORIGINAL, id="a line before the first"),
        pytest.param(ORIGINAL + "last\n", id="a line after the last"),
        pytest.param(
            ORIGINAL.replace("line 3\n", "").replace("line 15\n", "--- line\n+++ b/line\n"), id="two hunks, odd text"
        ),
        pytest.param("", id="emptied"),
    ],
)
def test_apply_patch(tmp_path, changed) -> None:
    apply_patch(make_patch(tmp_path, changed), tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == changed


def test_apply_patch_refuses_a_missing_newline(tmp_path) -> None:
    with pytest.raises(RuntimeMissing, match="end without a newline"):
        apply_patch(make_patch(tmp_path, ORIGINAL[:-1]), tmp_path / "a")


def make_patch(tmp_path: Path, changed: str) -> Path:
    """git's diff from ORIGINAL, in tmp_path/a/file, to CHANGED."""
    for folder, text in (("a", ORIGINAL), ("b", changed)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(text)
    diff = subprocess.run(["git", "diff", "--no-index", "a", "b"], cwd=tmp_path, capture_output=True, text=True).stdout
    patch = tmp_path / "x.patch"
    patch.write_text(f"Description: x\n---\n\n{diff}".replace("a/a/", "a/").replace("b/b/", "b/"))
    return patch


def test_apply_patch_creates_files(tmp_path) -> None:
    patch = tmp_path / "x.patch"
    patch.write_text("--- /dev/null\n+++ b/new/file\n@@ -0,0 +1,2 @@\n+one\n+two\n")
    apply_patch(patch, tmp_path)
    assert (tmp_path / "new" / "file").read_text() == "one\ntwo\n"
    with pytest.raises(RuntimeMissing, match="exists"):
        apply_patch(patch, tmp_path)


def test_apply_patch_takes_no_fuzz(tmp_path) -> None:
    patch = tmp_path / "x.patch"
    patch.write_text("--- a/file\n+++ b/file\n@@ -2,3 +2,3 @@\n line 2\n-line 3\n+line three\n line 4\n")
    for text in (ORIGINAL.replace("line 4", "line four"), "shifted\n" + ORIGINAL):
        (tmp_path / "file").write_text(text)
        with pytest.raises(RuntimeMissing, match=r"x.patch does not fit .*file at line 2"):
            apply_patch(patch, tmp_path)
        assert (tmp_path / "file").read_text() == text


def test_sha256_mismatch(tmp_path) -> None:
    sdist = tmp_path / "sdist.tar.gz"
    sdist.write_bytes(b"not what was pinned")
    upstream = read_upstream()
    found = hashlib.sha256(b"not what was pinned").hexdigest()
    with pytest.raises(RuntimeMissing, match=f"{found}.* pins {upstream.sha256}: delete the file"):
        verify_sdist(sdist, upstream)
    verify_sdist(sdist, replace(upstream, sha256=found))


def test_digest_follows_content_and_order(tmp_path) -> None:
    def digest(*contents: bytes) -> str:
        paths = []
        for i, content in enumerate(contents):
            paths.append(tmp_path / str(i))
            paths[-1].write_bytes(content)
        return Upstream("x", "1", "0", ".", tuple(paths)).patches_digest

    assert digest(b"a", b"b") == digest(b"a", b"b")
    assert len({digest(b"a", b"b"), digest(b"b", b"a"), digest(b"ab"), digest(b"", b"ab"), digest(b"ab", b"")}) == 5
