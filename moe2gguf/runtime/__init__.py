"""The patched llama.cpp: built from pinned sources, cached, installed as an ordinary llama-cpp-python.

install()            build if needed, install into the running interpreter's environment
find_runtime()       what is installed, or RuntimeMissing
tool("llama-quantize")
status(), check(), find_devices()
"""

from moe2gguf.runtime.installation import (
    Device,
    Runtime,
    Status,
    check,
    find_devices,
    find_runtime,
    install,
    status,
    tool,
)

__all__ = ["Device", "Runtime", "Status", "check", "find_devices", "find_runtime", "install", "status", "tool"]
