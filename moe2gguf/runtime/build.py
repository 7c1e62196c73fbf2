"""Build the patched llama-cpp-python wheel, llama.cpp's tools and gguf-py, once per sources, flags and machine.

Everything lives in the user's cache folder:

    llama_cpp_python-*.tar.gz     the pinned sdist
    build-tools-*/                what pip needs to build (scikit-build-core, and CMake or Ninja where missing)
    build-<key>/                  work area; survives a failure, so that a second try continues
    build-<key>.log
    runtime-<key>/                a finished build, renamed into place:
        runtime.json              BuildInfo
        wheels/                   llama_cpp_python and gguf
        bin/                      llama-quantize, ... and the libraries they load
        tree/                     llama.cpp's converter and gguf-py, patched
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe2gguf.errors import RuntimeMissing
from moe2gguf.llama import available_cores, memory_bytes
from moe2gguf.runtime.process import UNTESTABLE, run_logged
from moe2gguf.runtime.toolchain import GPU_BACKENDS, NO_AMX_FLAGS, GpuBackend, Toolchain, amx_works, find_toolchain
from moe2gguf.runtime.upstream import Upstream, apply_series, fetch_sdist, read_upstream, unpack

# (stage, steps done, steps in all); steps in all is 0 where there is nothing to count
Progress = Callable[[str, int, int], None]

TOOLS = (
    "llama-quantize",
    "llama-imatrix",
    "llama-perplexity",
    "llama-bench",
    "llama-gguf-split",
    "test-backend-ops",  # compares each backend's operations with the CPU's
)

# written into the llama_cpp package, so that an installed wheel says what it is
INFO_FILE = "moe2gguf_runtime.json"

# what of llama.cpp is kept for use: the converter, which reads its chat templates from models/
_TREE_PARTS = ("conversion", "gguf-py", "convert_hf_to_gguf.py", "models/templates", "LICENSE", "licenses", "AUTHORS")

_BUILD_REQUIREMENTS = ("scikit-build-core[pyproject]==1.1.2", "poetry-core==2.5.0")

_NEEDED_BYTES = 3 * 1000**3  # a build takes about 1.2 GB: sources, objects, libraries in the wheel
_NEEDED_BYTES_MORE = {"cuda": 5 * 1000**3, "vulkan": 2 * 1000**3}  # kernels for every type; shaders as C++ arrays

# of the larger files, CUDA's among them
_COMPILER_BYTES = 2 << 30

_NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")


@dataclass(frozen=True)
class BuildInfo:
    """What was built: the cache key and everything it stands for."""

    key: str
    version: str  # of llama_cpp_python, with our local segment
    sdist_sha256: str
    patches_sha256: str
    cmake_args: tuple[str, ...]
    environment: dict[str, str]  # the variables that reach the compilers
    compilers: tuple[str, ...]
    native_sha256: str  # Toolchain.native_digest
    python: str
    requirements: tuple[str, ...]
    gpu_backends: tuple[str, ...] = ()  # "cuda", "vulkan"; the default reads what earlier versions wrote


@dataclass(frozen=True)
class Build:
    """A finished build in the cache."""

    info: BuildInfo
    folder: Path

    @property
    def wheels(self) -> tuple[Path, ...]:
        return tuple(sorted((self.folder / "wheels").glob("*.whl")))

    @property
    def tools(self) -> Path:
        return self.folder / "bin"

    @property
    def tree(self) -> Path:
        return self.folder / "tree"


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moe2gguf"


def build_path(key: str) -> Path:
    return cache_folder() / f"runtime-{key}"


def cached_builds() -> list[Build]:
    """The finished builds in the cache, sorted by key."""
    return [load_build(path.parent) for path in sorted(cache_folder().glob("runtime-*/runtime.json"))]


def load_build(folder: Path) -> Build:
    return Build(info_from_json((folder / "runtime.json").read_text(encoding="utf-8")), folder)


def info_to_json(info: BuildInfo) -> str:
    return json.dumps(asdict(info), indent=1) + "\n"


def info_from_json(text: str) -> BuildInfo:
    fields: dict[str, Any] = json.loads(text)
    for name, value in fields.items():
        if isinstance(value, list):  # JSON has no tuples
            fields[name] = tuple(value)
    return BuildInfo(**fields)


def describe(
    upstream: Upstream, toolchain: Toolchain, env: dict[str, str], *, amx: bool, gpus: Sequence[GpuBackend] = ()
) -> BuildInfo:
    """The BuildInfo of what would be built now. With AMX false the compilers are told not to use it."""
    for gpu in gpus:
        env = {**env, **gpu.environment}
    if not amx:
        for variable in ("CFLAGS", "CXXFLAGS"):
            env = {**env, variable: " ".join([env.get(variable, ""), *NO_AMX_FLAGS]).strip()}
    kept = ["CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "CMAKE_GENERATOR", "MACOSX_DEPLOYMENT_TARGET"]
    names = tuple(gpu.name for gpu in gpus)
    if "cuda" in names:
        kept += ["CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDA_PATH"]
    if "vulkan" in names:
        kept += ["VULKAN_SDK", "CPLUS_INCLUDE_PATH"]
    content: dict[str, Any] = {
        "version": f"{upstream.version}+{upstream.local_version}",
        "sdist_sha256": upstream.sha256,
        "patches_sha256": upstream.patches_digest,
        "cmake_args": (
            "-DLLAVA_BUILD=OFF",
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_EXAMPLES=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
            "-DLLAMA_OPENSSL=OFF",
            "-DGGML_NATIVE=ON",
            "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # the tools find their libraries wherever bin/ is moved
            f"-DLLAMA_BUILD_COMMIT={upstream.local_version}",
            "-DLLAMA_BUILD_NUMBER=0",
            *(arg for gpu in gpus for arg in gpu.cmake_args),
        ),
        "environment": {variable: env[variable] for variable in kept if env.get(variable)},
        "compilers": (*toolchain.versions, *(gpu.version for gpu in gpus)),
        "native_sha256": toolchain.native_digest,
        "python": f"{sys.implementation.cache_tag} {sys.platform}",
        "requirements": _BUILD_REQUIREMENTS,
        "gpu_backends": names,
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return BuildInfo(key=key, **content)


def build(
    *, gpus: Sequence[str] = (), jobs: int | None = None, progress: Progress = lambda stage, done, total: None
) -> Build:
    """The build for the current patches, compilers and machine: from the cache, or made now with JOBS compilers.

    GPUS names what is built beside the CPU's backend, "cuda" or "vulkan".
    Raises RuntimeMissing when something it needs is missing or a step fails. What was compiled by then is kept for
    the next try.
    """
    upstream = read_upstream()
    env = dict(os.environ)
    toolchain = find_toolchain(env)
    found_gpus = [GPU_BACKENDS[name](toolchain, env) for name in sorted(set(gpus))]
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeMissing(f"cannot write the cache folder {cache}: {error.strerror}; set XDG_CACHE_HOME") from error

    jobs = jobs or _n_compilers(env)
    with _lock(cache / "build.lock", progress):
        amx = not toolchain.uses_amx or _amx_usable(toolchain, cache, progress)
        info = describe(upstream, toolchain, env, amx=amx, gpus=found_gpus)
        if not (build_path(info.key) / "runtime.json").is_file():
            try:
                _make(info, upstream, env, jobs, progress)
            except _Trapped as trap:
                if not (toolchain.uses_amx and amx):
                    raise RuntimeMissing(str(trap)) from None
                progress("the library dies using AMX, building again without it", 0, 0)
                _remember_amx(toolchain, cache, usable=False)
                info = describe(upstream, toolchain, env, amx=False, gpus=found_gpus)
                _make(info, upstream, env, jobs, progress)
        return load_build(build_path(info.key))


def _n_compilers(env: Mapping[str, str]) -> int:
    """What the user tells CMake, else one for each core that this process may use and has memory for."""
    if (said := env.get("CMAKE_BUILD_PARALLEL_LEVEL", "")).isdecimal() and int(said):
        return int(said)
    return max(1, min(available_cores(), memory_bytes() // _COMPILER_BYTES))


class _Trapped(Exception):
    """The library we built does not run on this machine."""


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another build to finish", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _amx_file(toolchain: Toolchain, cache: Path) -> Path:
    return cache / f"amx-{toolchain.native_digest[:16]}.json"


def _remember_amx(toolchain: Toolchain, cache: Path, *, usable: bool) -> None:
    _amx_file(toolchain, cache).write_text(json.dumps({"usable": usable}))


def _amx_usable(toolchain: Toolchain, cache: Path, progress: Progress) -> bool:
    file = _amx_file(toolchain, cache)
    if not file.is_file():
        usable = amx_works(toolchain)
        if not usable:
            progress("this machine advertises AMX but traps on it, building without it", 0, 0)
        _remember_amx(toolchain, cache, usable=usable)
    return json.loads(file.read_text())["usable"]


def _make(info: BuildInfo, upstream: Upstream, env: dict[str, str], jobs: int, progress: Progress) -> None:
    cache = cache_folder()
    free_bytes = shutil.disk_usage(cache).free
    needed_bytes = _NEEDED_BYTES + sum(_NEEDED_BYTES_MORE[name] for name in info.gpu_backends)
    if free_bytes < needed_bytes:
        raise RuntimeMissing(
            f"building needs {needed_bytes / 1e9:.0f} GB in {cache} and there are {free_bytes / 1e9:.1f} GB: "
            "free some, or point XDG_CACHE_HOME to a larger disk"
        )
    work = cache / f"build-{info.key}"
    work.mkdir(exist_ok=True)
    log = cache / f"build-{info.key}.log"
    log.write_text(info_to_json(info))

    env = {**env, **info.environment, "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), "CCACHE_BASEDIR": str(work)}
    env["PIP_USER"] = "0"  # which does not go with --target
    progress("preparing the build tools", 0, 0)
    env = with_build_tools(env, cache, log)
    progress(f"fetching {upstream.sdist_name}", 0, 0)
    sdist = fetch_sdist(upstream, cache, env=env, log=log)
    source = work / "source"
    if not source.is_dir():
        progress("unpacking and patching", 0, 0)
        _prepare_source(sdist, upstream, info, source)

    def count_steps(stage: str) -> Callable[[str], None]:
        def on_line(line: str) -> None:
            if step := _NINJA_STEP.match(line):
                progress(stage, int(step[1]), int(step[2]))

        return on_line

    wheels = work / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    cmake_build = work / "cmake"
    pip_wheel: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--wheel-dir",
        wheels,
    ]
    progress("compiling the library", 0, 0)
    # not as cmake.args, which is split at the semicolons of a CMake list
    defines = [f"--config-settings=cmake.define.{arg.removeprefix('-D')}" for arg in info.cmake_args]
    run_logged(
        [
            *pip_wheel,
            source,
            f"--config-settings=build-dir={cmake_build}",
            *defines,
            # the copies in llama_cpp/lib are the ones in use
            "--config-settings=wheel.exclude=/bin/**;/include/**;/lib/**",
        ],
        what="building the llama-cpp-python wheel",
        env=env,
        log=log,
        on_line=count_steps("compiling the library"),
    )
    progress("compiling the tools", 0, 0)
    # the wheel's build folder, so that only what the wheel did not need is compiled
    configure: list[str | Path] = ["cmake", "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_TESTS=ON", cmake_build]
    run_logged(configure, what="configuring the tools", env=env, log=log)
    run_logged(
        ["cmake", "--build", cmake_build, "--parallel", str(jobs), "--target", *TOOLS],
        what="building the tools",
        env=env,
        log=log,
        on_line=count_steps("compiling the tools"),
    )
    progress("packing gguf-py", 0, 0)
    run_logged([*pip_wheel, source / upstream.tree / "gguf-py"], what="building the gguf wheel", env=env, log=log)

    progress("testing", 0, 0)
    if not _smoke_test(cmake_build / "bin", log):
        progress(f"not tested: the driver of {', '.join(info.gpu_backends)} is not installed here", 0, 0)
    _assemble(info, work, upstream, build_path(info.key))
    shutil.rmtree(work)


def with_build_tools(env: dict[str, str], cache: Path, log: Path) -> dict[str, str]:
    """ENV with the pinned build backends on PYTHONPATH, and CMake and Ninja on PATH where the machine lacks them."""
    # distributions' pip may not know --config-settings
    requirements = ["pip>=23.1", *_BUILD_REQUIREMENTS]
    requirements += [name for name in ("cmake", "ninja") if shutil.which(name, path=env.get("PATH")) is None]
    digest = hashlib.sha256(" ".join([sys.version, *requirements]).encode()).hexdigest()[:8]
    folder = cache / f"build-tools-{digest}"
    if not folder.is_dir():
        aside = folder.with_suffix(".partial")
        shutil.rmtree(aside, ignore_errors=True)
        run_logged(
            [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--target", aside, *requirements],
            what="installing the build tools",
            env=env,
            log=log,
        )
        aside.rename(folder)
    return {
        **env,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), env.get("PYTHONPATH")])),
        "PATH": os.pathsep.join([env.get("PATH", os.defpath), str(folder / "bin")]),
    }


def _prepare_source(sdist: Path, upstream: Upstream, info: BuildInfo, target: Path) -> None:
    aside = target.with_name("source.unpatched")
    shutil.rmtree(aside, ignore_errors=True)
    unpack(sdist, upstream, aside)
    tree = aside / upstream.tree
    apply_series(upstream.patches, tree)
    package = aside / "llama_cpp"
    _replace_once(package / "__init__.py", f'__version__ = "{upstream.version}"', f'__version__ = "{info.version}"')
    (package / INFO_FILE).write_text(info_to_json(info))
    pyproject = tree / "gguf-py" / "pyproject.toml"
    version = re.search(r'^version = "(.+)"$', pyproject.read_text(), re.MULTILINE)
    assert version is not None, pyproject
    _replace_once(pyproject, version[0], f'version = "{version[1]}+{upstream.local_version}"')
    aside.rename(target)


def _replace_once(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new), encoding="utf-8")


def _smoke_test(libraries: Path, log: Path) -> bool:
    """Multiply matrices with the new library in a child process. False where this machine lacks a driver it needs.

    Raises _Trapped when it dies or computes nonsense.
    """
    child = [sys.executable, "-m", "moe2gguf.runtime.smoke", str(libraries)]
    result = subprocess.run(child, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with log.open("a") as sink:
        sink.write(f"$ {' '.join(child)}\n{result.stdout}")
    if result.returncode not in (0, UNTESTABLE):
        raise _Trapped(f"the library just built does not work here (exit code {result.returncode}, log: {log})")
    return result.returncode == 0


def _assemble(info: BuildInfo, work: Path, upstream: Upstream, target: Path) -> None:
    aside = target.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(work / "wheels", aside / "wheels")
    binaries = work / "cmake" / "bin"
    (aside / "bin").mkdir()
    for file in sorted(binaries.iterdir()):
        if file.name in TOOLS or file.suffix == ".dylib" or ".so" in file.suffixes:
            shutil.copy2(file, aside / "bin", follow_symlinks=False)
    for part in _TREE_PARTS:
        source, copy = work / "source" / upstream.tree / part, aside / "tree" / part
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy2(source, copy)
    (aside / "runtime.json").write_text(info_to_json(info), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)  # an entry without runtime.json
    aside.rename(target)
