"""Work that is not done twice: a step is skipped while what went in, and the files that came out, are unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class Steps:
    """Results as JSON, one file per step in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.n_found = 0  # steps that an earlier run had done
        self._seen: set[str] = set()  # asked for in this one
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self, name: str, inputs: Mapping[str, Any], outputs: Sequence[Path], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """`inputs` are numbers, strings and paths of files, which count as changed when their size or time is. What
        `work` returns is JSON."""
        record = self.folder / f"{name}.json"
        wanted = {key: _identity(value) for key, value in sorted(inputs.items())}
        if record.exists() and all(path.exists() for path in outputs):
            try:
                found = json.loads(record.read_text(encoding="utf-8"))
            except ValueError:  # the computer stopped before it was on the disk
                found = {"inputs": None}
            if found["inputs"] == wanted and found["outputs"] == [_identity(path) for path in outputs]:
                self.n_found += name not in self._seen
                self._seen.add(name)
                return found["result"]
        record.unlink(missing_ok=True)
        result = work()
        self._seen.add(name)
        done = {"inputs": wanted, "outputs": [_identity(path) for path in outputs], "result": result}
        aside = record.with_name(f".{record.name}.partial")
        aside.write_text(json.dumps(done, indent=1), encoding="utf-8")
        os.replace(aside, record)
        return result


def _identity(value: Any) -> Any:
    if isinstance(value, Path):
        status = value.stat()
        return [str(value), status.st_size, status.st_mtime_ns]
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    return value
