"""The compilers found, the probe for an AMX unit that traps, and what graphics cards need."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from moe2gguf.errors import RuntimeMissing
from moe2gguf.runtime import toolchain as module
from moe2gguf.runtime.build import _smoke_test, _Trapped
from moe2gguf.runtime.toolchain import Toolchain, amx_works, find_cuda, find_toolchain, find_vulkan


@pytest.fixture
def toolchain():
    try:
        return find_toolchain({})
    except RuntimeMissing as error:
        pytest.skip(str(error))


def test_this_machine_has_a_name(toolchain) -> None:
    assert all(toolchain.versions)
    assert toolchain.native_digest == find_toolchain({}).native_digest


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86")
@pytest.mark.parametrize(
    ("program", "works"),
    [
        pytest.param("int main(void) { return 0; }", True, id="runs"),
        pytest.param("int main(void) { __builtin_trap(); }", False, id="illegal instruction"),
        pytest.param("int main(void) { volatile int *p = 0; return *p; }", False, id="segmentation fault"),
        pytest.param("int main(void) { return 1; }", False, id="refused by the kernel"),
        pytest.param("not C", False, id="unknown to the compiler"),
    ],
)
def test_amx_probe(monkeypatch, toolchain, program, works) -> None:
    monkeypatch.setattr(module, "_AMX_PROGRAM", program)
    assert amx_works(toolchain) is works


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86")
def test_amx_program_compiles(toolchain, tmp_path) -> None:
    """Whether it runs is the machine's business."""
    source = tmp_path / "amx.c"
    source.write_text(module._AMX_PROGRAM)
    command = [toolchain.cc, "-Wall", "-Werror", "-mamx-tile", "-mamx-int8", "-c", source, "-o", tmp_path / "o"]
    assert module._run(*command).returncode == 0, module._run(*command).stderr


def test_a_library_that_does_not_work_is_noticed(tmp_path) -> None:
    """The smoke test runs in a child process; whatever happens there, the parent gets a reason and the log."""
    log = tmp_path / "log"
    with pytest.raises(_Trapped, match=f"does not work here .*log: {log}"):
        _smoke_test(tmp_path, log)
    assert "libggml-base" in log.read_text()


# --- graphics cards, with stand-ins for their compilers ---


def put_program(folder: Path, name: str, *lines: str) -> str:
    """A shell script called NAME; "$@" are the arguments it gets."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """An environment with an nvcc that compiles everything, two cards of one kind and one of another."""
    monkeypatch.setattr(module, "_CUDA_FOLDER", str(tmp_path / "no-cuda"))
    monkeypatch.setattr(module, "has_cuda_driver", lambda: True)
    put_program(tmp_path / "bin", "nvcc", "echo 'Cuda compilation tools, release 12.6, V12.6.20'")
    put_program(tmp_path / "bin", "nvidia-smi", "printf '8.6\\n12.0\\n8.6\\n'")
    return {"PATH": str(tmp_path / "bin")}


ANY = Toolchain("cc", "c++", ("cc 12", "c++ 12"), "")


def test_cuda_is_compiled_for_the_cards_here(cuda) -> None:
    found = find_cuda(ANY, cuda)
    assert found.cmake_args == ("-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=86-real;120-real")
    assert found.version == "nvcc release 12.6, V12.6.20"
    assert found.environment == {}


def test_cuda_architectures_of_the_user(cuda, tmp_path) -> None:
    """With or without a card here; $CMAKE_ARGS reach CMake by themselves."""
    put_program(tmp_path / "bin", "nvidia-smi", "exit 9")
    assert "-DCMAKE_CUDA_ARCHITECTURES=75;86" in find_cuda(ANY, {**cuda, "CUDAARCHS": "75;86"}).cmake_args
    assert find_cuda(ANY, {**cuda, "CMAKE_ARGS": "-DCMAKE_CUDA_ARCHITECTURES=90"}).cmake_args == ("-DGGML_CUDA=ON",)


@pytest.mark.parametrize("smi", ["exit 9", "echo 'NVIDIA-SMI has failed'", "echo '[N/A]'"])
def test_no_card_to_compile_for(cuda, tmp_path, smi) -> None:
    put_program(tmp_path / "bin", "nvidia-smi", smi)
    with pytest.raises(RuntimeMissing, match=r"^--cuda: nvidia-smi shows no GPU here, .*for instance CUDAARCHS=86$"):
        find_cuda(ANY, cuda)


def test_cuda_without_driver_links_without_it(monkeypatch, cuda) -> None:
    monkeypatch.setattr(module, "has_cuda_driver", lambda: False)
    flags = "-DCMAKE_EXE_LINKER_FLAGS=-Wl,-O1 -Wl,--allow-shlib-undefined"
    assert find_cuda(ANY, {**cuda, "LDFLAGS": "-Wl,-O1"}).cmake_args[-1] == flags


def test_no_nvcc(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(module, "_CUDA_FOLDER", str(tmp_path))
    with pytest.raises(RuntimeMissing, match=r"^--cuda needs .* nvcc, .*: `apt install nvidia-cuda-toolkit`, or"):
        find_cuda(ANY, {"PATH": str(tmp_path)})
    with pytest.raises(RuntimeMissing, match="CUDACXX names no-such-nvcc, and there is no such program"):
        find_cuda(ANY, {"PATH": str(tmp_path), "CUDACXX": "no-such-nvcc"})


@pytest.mark.parametrize("variable", [None, "CUDA_PATH", "CUDA_HOME"])
def test_nvcc_off_the_path_is_named_to_cmake(monkeypatch, cuda, tmp_path, variable) -> None:
    nvcc = put_program(tmp_path / "toolkit", "unused", "").replace("unused", "bin/nvcc")
    put_program(tmp_path / "toolkit" / "bin", "nvcc", "")
    if variable is None:
        monkeypatch.setattr(module, "_CUDA_FOLDER", str(tmp_path / "toolkit"))
    else:
        cuda[variable] = str(tmp_path / "toolkit")
    (tmp_path / "bin" / "nvcc").unlink()
    assert find_cuda(ANY, cuda).environment == {"CUDACXX": nvcc}


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        (
            "host_config.h:151:2: error: -- unsupported GNU version! gcc versions later than 13",
            "CUDAHOSTCXX=g\\+\\+-12",
        ),
        ("probe.cu:1:10: fatal error: cublas_v2.h: No such file or directory", "`apt install libcublas-dev`"),
        ("/usr/bin/ld: cannot find -lcublas: No such file or directory", "`apt install libcublas-dev`"),
        ("nvcc fatal error: something new", "nvcc fatal error: something new$"),
    ],
)
def test_nvcc_that_compiles_nothing(cuda, tmp_path, output, advice) -> None:
    put_program(tmp_path / "bin", "nvcc", f"echo 'first line'; echo '{output}' >&2; exit 1")
    with pytest.raises(RuntimeMissing, match=f"^--cuda: .*nvcc does not compile a program of one line: .*{advice}"):
        find_cuda(ANY, cuda)


@pytest.fixture
def vulkan(tmp_path):
    """An environment with a glslc, and a compiler that finds every header and library not named in $MISSING."""
    put_program(tmp_path / "bin", "glslc", "echo 'shaderc 2023.2'")
    compiler = put_program(
        tmp_path / "bin",
        "c++",
        'for word in "$@"; do case "$word" in *.cpp) /bin/grep -q "$MISSING" "$word" && exit 1;; esac; done; exit 0',
    )
    return {"PATH": str(tmp_path / "bin")}, Toolchain("cc", compiler, ("cc 12", "c++ 12"), "")


def test_vulkan(monkeypatch, vulkan) -> None:
    env, toolchain = vulkan
    monkeypatch.setenv("MISSING", "nothing")
    found = find_vulkan(toolchain, env)
    assert (found.name, found.version, found.cmake_args) == ("vulkan", "shaderc 2023.2", ("-DGGML_VULKAN=ON",))


@pytest.mark.parametrize(
    ("missing", "packages"),
    [("vulkan/", "libvulkan-dev"), ("spirv/", "spirv-headers"), ("#include", "libvulkan-dev spirv-headers")],
)
def test_no_vulkan_headers(monkeypatch, vulkan, missing, packages) -> None:
    env, toolchain = vulkan
    monkeypatch.setenv("MISSING", missing)
    with pytest.raises(RuntimeMissing, match=f"^--vulkan needs .*, not found here: `apt install {packages}`, or"):
        find_vulkan(toolchain, env)


def test_no_glslc(monkeypatch, vulkan, tmp_path) -> None:
    env, toolchain = vulkan
    monkeypatch.setenv("MISSING", "nothing")
    (tmp_path / "bin" / "glslc").unlink()
    with pytest.raises(RuntimeMissing, match="needs the shader compiler glslc, not found here: `apt install glslc`"):
        find_vulkan(toolchain, env)
    put_program(tmp_path / "bin" / "sdk", "unused")
    put_program(tmp_path / "bin" / "sdk" / "bin", "glslc", "echo 'shaderc of the SDK'")
    sdk = str(tmp_path / "bin" / "sdk")
    assert find_vulkan(toolchain, {**env, "VULKAN_SDK": sdk}).version == "shaderc of the SDK"


def test_library_without_its_driver_is_not_a_trap(monkeypatch, tmp_path) -> None:
    """Built on a machine without the card: nothing can be tested, and nothing is wrong."""
    python = put_program(tmp_path, "python", "echo there is no libcuda.so.1; exit 4")
    monkeypatch.setattr(sys, "executable", python)
    assert _smoke_test(tmp_path, tmp_path / "log") is False
