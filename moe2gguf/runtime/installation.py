"""The installed runtime: find it, install it, say what it is, check that it works."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime.build import (
    INFO_FILE,
    TOOLS,
    Build,
    BuildInfo,
    Progress,
    build,
    build_path,
    cache_folder,
    cached_builds,
    info_from_json,
    load_build,
)
from moe2gguf.runtime.process import run_logged
from moe2gguf.runtime.upstream import read_upstream

_WAY_OUT = "run `moe2gguf runtime install`"


@dataclass(frozen=True)
class Runtime:
    """The patched llama.cpp in use."""

    version: str  # of llama_cpp_python, with our local segment
    tree: Path  # llama.cpp's converter: conversion/, gguf-py/
    tools: Path  # the folder with llama-quantize and the others
    libraries: Path  # the folder with libllama and libggml, inside the installed package


@dataclass(frozen=True)
class Device:
    """What the installed library can compute on."""

    name: str  # "CPU", "CUDA0", "Vulkan0"
    description: str
    memory_bytes: int


@dataclass(frozen=True)
class Status:
    """What is pinned, installed and cached; None where something is absent."""

    wanted_version: str
    wanted_patches: str  # sha256 over this moe2gguf's patches
    installed_version: str | None  # of any llama_cpp_python
    gguf_version: str | None
    installed: BuildInfo | None  # None where the installed one is not ours
    package: Path | None
    builds: tuple[Build, ...]


def _distribution_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package() -> Path | None:
    """Folder of the installed llama_cpp package, found without importing it."""
    importlib.invalidate_caches()  # it may have been installed by a child process just now
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def status() -> Status:
    """What is pinned, installed and cached, without importing or running any of it."""
    upstream = read_upstream()
    package = _package()
    info = None
    if package is not None and (package / INFO_FILE).is_file():
        info = info_from_json((package / INFO_FILE).read_text(encoding="utf-8"))
    return Status(
        wanted_version=f"{upstream.version}+{upstream.local_version}",
        wanted_patches=upstream.patches_digest,
        installed_version=_distribution_version("llama_cpp_python"),
        gguf_version=_distribution_version("gguf"),
        installed=info,
        package=package,
        builds=tuple(cached_builds()),
    )


def find_runtime() -> Runtime:
    """The installed runtime. Raises RuntimeMissing unless it is complete and made from the current patches."""
    found = status()
    if found.package is None:
        raise RuntimeMissing(f"the patched llama-cpp-python is not installed: {_WAY_OUT}")
    if found.installed is None:
        raise RuntimeMissing(
            f"llama-cpp-python {found.installed_version} in {found.package} is not the patched one "
            f"({found.wanted_version}): {_WAY_OUT}, which replaces it"
        )
    if found.installed.version != found.wanted_version:
        raise RuntimeMissing(
            f"the installed runtime is {found.installed.version}, but this moe2gguf needs {found.wanted_version}: "
            f"{_WAY_OUT}"
        )
    folder = build_path(found.installed.key)
    if not (folder / "runtime.json").is_file():
        raise RuntimeMissing(f"the runtime's tools are gone from {folder}: {_WAY_OUT}")
    built = load_build(folder)
    return Runtime(found.installed.version, built.tree, built.tools, found.package / "lib")


def tool(name: str) -> Path:
    """The program NAME ("llama-quantize", ...) of the installed runtime. Raises RuntimeMissing without one."""
    assert name in TOOLS, f"{name} is not built; there are {', '.join(TOOLS)}"
    return find_runtime().tools / name


def install(
    *, gpus: Sequence[str] = (), jobs: int | None = None, progress: Progress = lambda stage, done, total: None
) -> Runtime:
    """Build the runtime unless cached, with the backends GPUS, and install its two wheels where they are not yet.

    Only the environment of the running interpreter is touched, and in it only llama_cpp_python and gguf.
    """
    built = build(gpus=gpus, jobs=jobs, progress=progress)
    if not _is_installed(built):
        progress("installing", 0, 0)
        run_logged(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--no-deps",
                "--no-index",
                "--force-reinstall",
                "--disable-pip-version-check",
                *built.wheels,
            ],
            what="installing the wheels",
            log=cache_folder() / "install.log",
        )
    return find_runtime()


def _is_installed(built: Build) -> bool:
    found = status()
    gguf_versions = [wheel.name.split("-")[1] for wheel in built.wheels if wheel.name.startswith("gguf-")]
    return found.installed == built.info and [found.gguf_version] == gguf_versions


def check() -> str:
    """Load the installed library in a child process and multiply with it, on every device.

    Returns what it says of itself. Raises RuntimeMissing when it cannot be loaded, lacks our op, or computes nonsense.
    """
    runtime = find_runtime()
    _child(runtime, "-c", "import llama_cpp, gguf")
    return _child(runtime, "-m", "moe2gguf.runtime.smoke", str(runtime.libraries), "--gpus")


def find_devices(runtime: Runtime) -> list[Device]:
    """What RUNTIME can compute on, asked in a child process. Raises RuntimeMissing when it cannot be loaded."""
    said = _child(runtime, "-m", "moe2gguf.runtime.smoke", str(runtime.libraries), "--devices")
    return [Device(**fields) for fields in json.loads(said.splitlines()[-1])]


def _child(runtime: Runtime, *arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)
    if result.returncode != 0:
        # a crash says nothing, a Python error says it in its last line
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise RuntimeMissing(f"the installed runtime {runtime.version} does not work: {reason}; {_WAY_OUT}")
    return result.stdout
