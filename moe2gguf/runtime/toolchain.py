"""What a build depends on besides the sources: compilers, the processor, whether its AMX unit can be used, GPUs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe2gguf.errors import RuntimeMissing

NO_AMX_FLAGS = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")

# One 16x64 by 64x16 product of int8 ones on the tile unit. Exits 0 only if every step works: asking the kernel
# for the tile state, configuring, multiplying, and getting 64 back.
_AMX_PROGRAM = r"""
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void) {
    const int arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
    if (syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata)) {
        return 1;
    }
    unsigned char config[64] = {0};
    config[0] = 1; /* palette */
    for (int tile = 0; tile < 3; tile++) {
        config[16 + 2*tile] = 64; /* bytes per row */
        config[48 + tile]   = 16; /* rows */
    }
    signed char ones[1024];
    int product[256] = {0};
    memset(ones, 1, sizeof(ones));
    _tile_loadconfig(config);
    _tile_zero(0);
    _tile_loadd(1, ones, 64);
    _tile_loadd(2, ones, 64);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, product, 64);
    _tile_release();
    return product[0] != 64;
}
"""


@dataclass(frozen=True)
class Toolchain:
    """The compilers, and what `-march=native` (or the platform's like) means to them."""

    cc: str
    cxx: str
    versions: tuple[str, str]  # first line of `cc --version`, `c++ --version`
    native_macros: str  # what the compiler defines for this processor; "" if it cannot say

    @property
    def native_digest(self) -> str:
        """Stands for the processor in a cache key: a library built for one machine may trap on another."""
        seen = self.native_macros or f"{platform.machine()} {platform.processor()}"
        return hashlib.sha256(seen.encode()).hexdigest()

    @property
    def uses_amx(self) -> bool:
        return "__AMX_TILE__" in self.native_macros


def find_toolchain(env: Mapping[str, str]) -> Toolchain:
    """The compilers CMake will take: $CC and $CXX, else the usual names. Raises RuntimeMissing if there is none."""
    cc = _find_compiler("C", env, "CC", ("cc", "gcc", "clang"))
    cxx = _find_compiler("C++", env, "CXX", ("c++", "g++", "clang++"))
    return Toolchain(cc, cxx, (_version(cc), _version(cxx)), _native_macros(cc))


def _find_compiler(language: str, env: Mapping[str, str], variable: str, names: tuple[str, ...]) -> str:
    if variable in env:
        names = (env[variable],)
    for name in names:
        if path := shutil.which(name, path=env.get("PATH")):
            return path
    raise RuntimeMissing(
        f"no {language} compiler found (looked for {', '.join(names)}): install one, for instance with "
        "`apt install build-essential`, or name it in " + variable
    )


def _version(compiler: str) -> str:
    return _run(compiler, "--version").stdout.partition("\n")[0]


def _native_macros(cc: str) -> str:
    for flag in ("-march=native", "-mcpu=native"):  # x86 and ARM spellings
        result = _run(cc, flag, "-dM", "-E", "-x", "c", os.devnull)
        if result.returncode == 0:
            return result.stdout
    return ""


def amx_works(toolchain: Toolchain) -> bool:
    """Whether a tiny AMX program runs. Some virtual machines advertise AMX in CPUID and trap on its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "amx.c"), Path(folder, "amx")
        source.write_text(_AMX_PROGRAM)
        compiled = _run(toolchain.cc, "-O1", "-mamx-tile", "-mamx-int8", str(source), "-o", str(program))
        return compiled.returncode == 0 and _run(str(program)).returncode == 0


@dataclass(frozen=True)
class GpuBackend:
    """A backend for graphics cards, with everything that building it needs at hand."""

    name: str  # "cuda", "vulkan"
    version: str  # of its compiler
    cmake_args: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)  # what CMake would not find by itself


_CUDA_FOLDER = "/usr/local/cuda"
_CUDA_PROGRAM = "#include <cublas_v2.h>\n#include <cuda_runtime.h>\nint main() { return 0; }\n"

# what nvcc, the host compiler or the linker print, and the way out
_CUDA_CAUSES = (
    ("unsupported GNU version", "it does not take this g++: name an older one, for instance CUDAHOSTCXX=g++-12"),
    ("unsupported clang version", "it does not take this clang: name another compiler in CUDAHOSTCXX"),
    ("cublas_v2.h", "cuBLAS is missing: `apt install libcublas-dev`, or libcublas-dev-12-x from NVIDIA's packages"),
    ("lcublas", "cuBLAS is missing: `apt install libcublas-dev`, or libcublas-dev-12-x from NVIDIA's packages"),
    ("cuda_runtime.h", "CUDA's headers are missing: `apt install nvidia-cuda-dev`, or cuda-cudart-dev from NVIDIA's"),
)


def find_cuda(toolchain: Toolchain, env: Mapping[str, str]) -> GpuBackend:
    """nvcc, cuBLAS, and the architectures of the GPUs here, or those in $CUDAARCHS or $CMAKE_ARGS.

    Raises RuntimeMissing, naming packages, where one of them is missing.
    """
    nvcc, environment = _find_nvcc(env)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cu"), Path(folder, "probe")
        source.write_text(_CUDA_PROGRAM)
        host = ("-ccbin", env["CUDAHOSTCXX"]) if env.get("CUDAHOSTCXX") else ()
        probe = _run(nvcc, *host, source, "-o", program, "-lcublas")
    if probe.returncode != 0:
        output = f"{probe.stderr}\n{probe.stdout}"
        said = next((line for line in output.splitlines() if "error" in line or "cannot find" in line), output.strip())
        reason = next((advice for sign, advice in _CUDA_CAUSES if sign in output), said)
        raise RuntimeMissing(f"--cuda: {nvcc} does not compile a program of one line: {reason}")

    args = ["-DGGML_CUDA=ON"]
    if env.get("CUDAARCHS"):
        args.append(f"-DCMAKE_CUDA_ARCHITECTURES={env['CUDAARCHS']}")
    elif "CMAKE_CUDA_ARCHITECTURES" not in env.get("CMAKE_ARGS", ""):
        # by name and not as "native", so that another card makes another cache key
        capabilities = nvidia_capabilities(env)
        if not capabilities:
            raise RuntimeMissing(
                "--cuda: nvidia-smi shows no GPU here, so it is unknown which one to compile for: name its compute "
                "capability without the point, for instance CUDAARCHS=86"
            )
        args.append("-DCMAKE_CUDA_ARCHITECTURES=" + ";".join(f"{c.replace('.', '')}-real" for c in capabilities))
    if not has_cuda_driver():
        # the driver's library comes with the driver, and the linker would look for it
        flags = f"{env.get('LDFLAGS', '')} -Wl,--allow-shlib-undefined".strip()
        args.append(f"-DCMAKE_EXE_LINKER_FLAGS={flags}")
    release = re.search(r"release .*", _run(nvcc, "--version").stdout)
    return GpuBackend("cuda", f"nvcc {release[0] if release else nvcc}", tuple(args), environment)


def _find_nvcc(env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """nvcc, and the variable that leads CMake to it where it is not on PATH."""
    if env.get("CUDACXX"):
        if path := shutil.which(env["CUDACXX"], path=env.get("PATH")):
            return path, {}
        raise RuntimeMissing(f"--cuda: CUDACXX names {env['CUDACXX']}, and there is no such program")
    if path := shutil.which("nvcc", path=env.get("PATH")):
        return path, {}
    for folder in (env.get("CUDA_PATH"), env.get("CUDA_HOME"), _CUDA_FOLDER):
        if folder and (path := shutil.which("nvcc", path=str(Path(folder, "bin")))):
            return path, {"CUDACXX": path}
    raise RuntimeMissing(
        f"--cuda needs NVIDIA's compiler nvcc, and it is neither on PATH nor in {_CUDA_FOLDER}/bin: "
        "`apt install nvidia-cuda-toolkit`, or cuda-toolkit from NVIDIA's packages, or name it in CUDACXX"
    )


def nvidia_capabilities(env: Mapping[str, str]) -> list[str]:
    """Compute capabilities of the NVIDIA GPUs here ("8.6"), sorted, each once; none without nvidia-smi."""
    program = shutil.which("nvidia-smi", path=env.get("PATH"))
    if program is None:
        return []
    result = _run(program, "--query-gpu=compute_cap", "--format=csv,noheader")
    found = {line.strip() for line in result.stdout.splitlines()} if result.returncode == 0 else set()
    return sorted((c for c in found if re.fullmatch(r"\d+\.\d", c)), key=float)


def has_cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


_VULKAN_PROGRAM = "#include <vulkan/vulkan.hpp>\nint main() { return vkGetInstanceProcAddr(nullptr, 0) != nullptr; }\n"
_SPIRV_PROGRAM = "#include <spirv/unified1/spirv.hpp>\nint main() { return 0; }\n"


def find_vulkan(toolchain: Toolchain, env: Mapping[str, str]) -> GpuBackend:
    """glslc, Vulkan's headers and loader, SPIR-V's headers; the packages or the SDK in $VULKAN_SDK.

    Raises RuntimeMissing naming all that is missing at once.
    """
    sdk = env.get("VULKAN_SDK")
    path = os.pathsep.join(filter(None, [env.get("PATH", os.defpath), sdk and str(Path(sdk, "bin"))]))
    flags = [f"-I{sdk}/include", f"-L{sdk}/lib"] if sdk else []
    glslc = shutil.which("glslc", path=path)
    checks = (
        ("the shader compiler glslc", "glslc", glslc is not None),
        (
            "Vulkan's headers and loader",
            "libvulkan-dev",
            _links(toolchain, _VULKAN_PROGRAM, *flags, libraries=("-lvulkan",)),
        ),
        ("SPIR-V's headers", "spirv-headers", _links(toolchain, _SPIRV_PROGRAM, *flags)),
    )
    missing = [(what, package) for what, package, found in checks if not found]
    if missing:
        raise RuntimeMissing(
            f"--vulkan needs {', '.join(what for what, _ in missing)}, not found here: "
            f"`apt install {' '.join(package for _, package in missing)}`, or set VULKAN_SDK to LunarG's SDK"
        )
    assert glslc is not None
    return GpuBackend("vulkan", _version(glslc), ("-DGGML_VULKAN=ON",))


def _links(toolchain: Toolchain, program: str, *flags: str, libraries: tuple[str, ...] = ()) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program)
        return _run(toolchain.cxx, "-O0", *flags, source, "-o", Path(folder, "probe"), *libraries).returncode == 0


# the value of `--NAME` on the command line -> how to find it
GPU_BACKENDS: dict[str, Callable[[Toolchain, Mapping[str, str]], GpuBackend]] = {
    "cuda": find_cuda,
    "vulkan": find_vulkan,
}


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)
