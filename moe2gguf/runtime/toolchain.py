"""What a build depends on besides the sources: compilers, the processor, and whether its AMX unit can be used."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
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


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)
