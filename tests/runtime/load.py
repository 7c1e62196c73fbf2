"""Load model files in a child process, one after another: a crash ends the child, not the test.

The child, `python -m tests.runtime.load`, reads a request per line and answers with a line, both JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SILENT_SECONDS = 120  # a child that says nothing for so long hangs


@dataclasses.dataclass(frozen=True)
class Request:
    path: str
    mmap: bool = False
    repack: bool = False
    decode: bool = False  # compute with what loads
    overrides: Mapping[str, float | int] = dataclasses.field(default_factory=dict)  # of metadata
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answer:
    outcome: str  # "refused", "loaded", "computed" and others
    log: str

    @property
    def sentence(self) -> str:
        """Why the file was refused, empty if that was not said."""
        match = re.search(r"error loading model: *(.*)", self.log)
        return match[1].strip() if match else ""


class Died(Exception):
    """The child is gone. HOW: its exit status and the first line that says why."""

    def __init__(self, status: int, stderr: str) -> None:
        self.stderr = stderr
        self.how = f"{status}: {_first_reason(stderr)}"
        super().__init__(self.how)


class Loader:
    """A child, started anew after it died. STDERRS: what the ended ones said."""

    def __init__(self, environment: Mapping[str, str] = {}) -> None:
        self.environment = {**os.environ, "GGML_NO_BACKTRACE": "1", **environment}
        self.stderrs: list[str] = []
        self._child: subprocess.Popen[str] | None = None

    def ask(self, request: Request) -> Answer:
        """Raises Died."""
        if self._child is None:
            self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.runtime.load"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=self.environment,
                cwd=ROOT,
            )
        assert self._child.stdin is not None and self._child.stdout is not None
        timer = threading.Timer(SILENT_SECONDS, self._child.kill)
        timer.start()
        try:
            self._child.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            status = self.close()
            raise Died(status, self.stderrs[-1])
        return Answer(**json.loads(line))

    def close(self) -> int:
        """The child's exit status."""
        if self._child is None:
            return 0
        child, self._child = self._child, None
        child.communicate()
        self._stderr.seek(0)
        self.stderrs.append(self._stderr.read())
        self._stderr.close()
        return child.returncode


def _first_reason(stderr: str) -> str:
    if match := re.search(r"^\S+\.(?:c|h|cpp|cu):\d+: .*", stderr, re.MULTILINE):  # GGML_ASSERT, GGML_ABORT, assert
        return match[0]
    if match := re.search(r"ERROR: AddressSanitizer: (\S+).*", stderr):
        frames = re.findall(r"^ +#\d+ \S+ in (.*)", stderr[match.start() :], re.MULTILINE)
        ours = [frame for frame in frames if re.search(r"/(?:src|ggml)/\S+:\d+", frame) and "libsanitizer" not in frame]
        return f"{match[1]} in {ours[0]}" if ours else match[0]
    lines = [line for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines else "silent"


# the child


def serve() -> None:
    import llama_cpp

    logged: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        logged.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        logged.clear()
        request = Request(**json.loads(line))
        os.environ.update(request.environment)
        outcome = load(llama_cpp, request)
        for name in request.environment:
            del os.environ[name]
        print(json.dumps({"outcome": outcome, "log": "".join(logged)}), flush=True)
    with contextlib.suppress(AttributeError):  # there is one where an address sanitizer is
        ctypes.CDLL(None).__lsan_do_recoverable_leak_check()


def load(llama_cpp: Any, request: Request) -> str:
    params = llama_cpp.llama_model_default_params()
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if request.mmap else llama_cpp.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = request.repack
    if request.overrides:
        overrides = (llama_cpp.llama_model_kv_override * (len(request.overrides) + 1))()  # the last one has no key
        for override, (key, value) in zip(overrides, request.overrides.items(), strict=False):
            override.key = key.encode()
            if isinstance(value, float):
                override.tag, override.value.val_f64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
            else:
                override.tag, override.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
        params.kv_overrides = overrides
    model = llama_cpp.llama_model_load_from_file(request.path.encode(), params)
    if not model:
        return "refused"
    try:
        return compute(llama_cpp, model) if request.decode else "loaded"
    finally:
        llama_cpp.llama_model_free(model)


def compute(llama_cpp: Any, model: Any) -> str:
    """A prompt of 33 tokens, then one token: the kernels for many and for one."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        return "loaded without a context"
    try:
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        for n in (33, 1):
            tokens = (llama_cpp.llama_token * n)(*[i % max(n_vocab, 1) for i in range(n)])
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, n)) != 0:
                return "loaded, not computed"
            logits = llama_cpp.llama_get_logits_ith(context, -1)[:n_vocab]
            if not all(map(math.isfinite, logits)):
                return "computed, not finite"
        return "computed"
    finally:
        llama_cpp.llama_free(context)


if __name__ == "__main__":
    serve()
