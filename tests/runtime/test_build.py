"""Cache keys, and one sentence for everything that is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe2gguf import runtime as api
from moe2gguf.cli import main
from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime import build as build_module
from moe2gguf.runtime import toolchain as toolchain_module
from moe2gguf.runtime.build import build, describe
from moe2gguf.runtime.process import run_logged
from moe2gguf.runtime.toolchain import GPU_BACKENDS, GpuBackend, Toolchain, find_toolchain
from moe2gguf.runtime.upstream import read_upstream

TOOLCHAIN = Toolchain("/usr/bin/cc", "/usr/bin/c++", ("cc 12", "c++ 12"), "#define __AMX_TILE__ 1\n")


CUDA = GpuBackend("cuda", "nvcc 12", ("-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=86-real"))
VULKAN = GpuBackend("vulkan", "shaderc 2023", ("-DGGML_VULKAN=ON",))


def key(
    *,
    toolchain: Toolchain = TOOLCHAIN,
    env: dict[str, str] | None = None,
    amx: bool = True,
    gpus: Sequence[GpuBackend] = (),
    **upstream,
) -> str:
    return describe(replace(read_upstream(), **upstream), toolchain, env or {}, amx=amx, gpus=gpus).key


def test_key_stands_for_everything_that_changes_the_library(tmp_path) -> None:
    patch = tmp_path / "x.patch"
    patch.write_text("x")
    keys = [
        key(),
        key(sha256="0" * 64),
        key(patches=(patch,)),
        key(amx=False),
        key(env={"CFLAGS": "-O1"}),
        key(env={"CMAKE_ARGS": "-DGGML_CUDA=ON"}),
        key(toolchain=replace(TOOLCHAIN, versions=("cc 13", "c++ 13"))),
        key(toolchain=replace(TOOLCHAIN, native_macros="")),
        key(gpus=[CUDA]),
        key(gpus=[VULKAN]),
        key(gpus=[CUDA, VULKAN]),
        key(gpus=[replace(CUDA, version="nvcc 13")]),
        key(gpus=[replace(CUDA, cmake_args=("-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90-real"))]),
        key(gpus=[replace(CUDA, environment={"CUDACXX": "/opt/nvcc"})]),
        key(gpus=[CUDA], env={"CUDAHOSTCXX": "g++-12"}),
    ]
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_the_rest() -> None:
    assert key(env={"HOME": "/x", "CFLAGS": ""}) == key(env={"LANG": "C"}) == key()
    assert key(env={"CUDAHOSTCXX": "g++-12", "VULKAN_SDK": "/sdk"}) == key()  # what only GPU backends read


def test_flags_against_amx_are_added_to_the_users() -> None:
    info = describe(read_upstream(), TOOLCHAIN, {"CFLAGS": "-g"}, amx=False)
    assert info.environment["CFLAGS"] == "-g -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    assert info.environment["CXXFLAGS"] == "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    assert build_module.info_from_json(build_module.info_to_json(info)) == info


def test_gpu_backends_are_described() -> None:
    info = describe(read_upstream(), TOOLCHAIN, {"CUDAHOSTCXX": "g++-12"}, amx=True, gpus=[CUDA, VULKAN])
    assert info.gpu_backends == ("cuda", "vulkan")
    assert info.compilers == ("cc 12", "c++ 12", "nvcc 12", "shaderc 2023")
    assert set(CUDA.cmake_args) | set(VULKAN.cmake_args) < set(info.cmake_args)
    assert info.environment == {"CUDAHOSTCXX": "g++-12"}
    assert build_module.info_from_json(build_module.info_to_json(info)) == info


def test_builds_of_earlier_versions_are_read() -> None:
    """They knew no GPU backends."""
    info = describe(read_upstream(), TOOLCHAIN, {}, amx=True)
    fields = json.loads(build_module.info_to_json(info))
    del fields["gpu_backends"]
    assert build_module.info_from_json(json.dumps(fields)) == info


@pytest.mark.parametrize("name", ["cuda", "vulkan"])
def test_missing_gpu_compiler_is_told_before_anything_else(monkeypatch, tmp_path, name) -> None:
    """Nothing is fetched, compiled or even written by then."""
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, str(compiler))
    for variable in ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "VULKAN_SDK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(toolchain_module, "_CUDA_FOLDER", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = CliRunner().invoke(main, ["runtime", "build", f"--{name}"])
    assert result.exit_code == 1
    assert re.fullmatch(f"moe2gguf: --{name} needs .*`apt install .*\n", result.stderr)
    assert not (tmp_path / "cache").exists()


def test_flags_choose_the_backends(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(build_module, "build", lambda *, gpus, jobs, progress: asked.append((gpus, jobs)))
    monkeypatch.setattr(api, "install", lambda *, gpus, jobs, progress: asked.append((gpus, jobs)))
    for words in (["--cuda", "--jobs", "3"], ["--vulkan"], ["--vulkan", "--cuda"], []):
        CliRunner().invoke(main, ["runtime", "build", *words])
    CliRunner().invoke(main, ["runtime", "install", "--vulkan"])
    assert asked == [(["cuda"], 3), (["vulkan"], None), (["cuda", "vulkan"], None), ([], None), (["vulkan"], None)]


def test_a_gpu_needs_more_disk(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(GPU_BACKENDS, "cuda", lambda toolchain, env: CUDA)
    monkeypatch.setattr(build_module, "_NEEDED_BYTES_MORE", {"cuda": 10**18})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeMissing, match=r"building needs 1000000003 GB in"):
        build(gpus=["cuda"])


def test_version_is_a_local_version() -> None:
    from packaging.version import Version

    info = describe(read_upstream(), TOOLCHAIN, {}, amx=True)
    assert str(Version(info.version)) == info.version  # pip would normalise anything else, and never find it again
    assert Version(info.version).public == read_upstream().version


@pytest.mark.parametrize(("variable", "language"), [("CC", "C"), ("CXX", r"C\+\+")])
def test_missing_compiler(monkeypatch, tmp_path, variable, language) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeMissing, match=rf"no {language} compiler found \(looked for no-such-compiler\): install"):
        build()


def test_no_compiler_on_the_path(tmp_path) -> None:
    with pytest.raises(RuntimeMissing, match="looked for cc, gcc, clang"):
        find_toolchain({"PATH": str(tmp_path)})


def test_full_disk(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(build_module, "_NEEDED_BYTES", 10**18)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeMissing, match=r"building needs .* GB in .*moe2gguf and there are .* GB"):
        build()


def test_cache_that_is_a_file(monkeypatch, tmp_path) -> None:
    (tmp_path / "moe2gguf").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeMissing, match=r"cannot write the cache folder .*moe2gguf.*XDG_CACHE_HOME"):
        build()


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("cc1: fatal error: /x.s: No space left on device", "the disk is full"),
        ("socket.gaierror: [Errno -3] Temporary failure in name resolution", "there is no network"),
        ("nothing known", "exit code 3"),
    ],
)
def test_failed_step_is_one_sentence_with_the_log(tmp_path, output, sentence) -> None:
    log = tmp_path / "log"
    program = f"import sys; print({output!r}); sys.exit(3)"
    with pytest.raises(RuntimeMissing, match=f"^baking failed: {sentence}.*log: {log}") as caught:
        run_logged([sys.executable, "-c", program], what="baking", log=log)
    assert "\n" not in str(caught.value)
    assert output in log.read_text()


def test_missing_program(tmp_path) -> None:
    with pytest.raises(RuntimeMissing, match="baking failed: the program no-such-program is not installed"):
        run_logged(["no-such-program"], what="baking", log=tmp_path / "log")


def test_no_network(monkeypatch, tmp_path) -> None:
    """With pip cut off from every index, the first fetch fails with one sentence, and nothing is left locked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for _ in range(2):
        with pytest.raises(RuntimeMissing, match=r"^installing the build tools failed: the package index"):
            build()


def test_a_second_build_waits(tmp_path) -> None:
    """The lock is between processes: the second one says that it waits, and goes on when the first is done."""
    program = (
        "import sys, time; from pathlib import Path; from moe2gguf.runtime.build import _lock\n"
        "with _lock(Path(sys.argv[1]), lambda *stage: print('waiting', flush=True)):\n"
        "    print('in', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    root = Path(__file__).parents[2]
    first, second = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    )
    with first, second:
        assert {first.stdout.readline(), second.stdout.readline()} == {"in\n", "waiting\n"}
        for process in (first, second):
            process.stdin.write("\n")
            process.stdin.flush()
        assert "in\n" in [first.stdout.readline(), second.stdout.readline()]
        first.stdin.close()
        second.stdin.close()
        assert first.wait() == second.wait() == 0


@pytest.mark.parametrize(
    ("said", "cores", "memory_gb", "wanted"),
    [(None, 32, 256, 32), (None, 32, 32, 16), (None, 4, 1, 1), ("3", 32, 256, 3), ("0", 8, 64, 8), ("many", 8, 64, 8)],
)
def test_as_many_compilers_as_there_is_memory_for(monkeypatch, said, cores: int, memory_gb: int, wanted: int) -> None:
    monkeypatch.setattr(build_module, "available_cores", lambda: cores)
    monkeypatch.setattr(build_module, "memory_bytes", lambda: memory_gb * 2**30)
    assert build_module._n_compilers({} if said is None else {"CMAKE_BUILD_PARALLEL_LEVEL": said}) == wanted
