"""Folders that one run works in at a time."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe2gguf.errors import Moe2ggufError


@contextmanager
def alone_in(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Where another run works there, waits until it is done, and `waiting` says so; without it raises Moe2ggufError.
    Whether that can be told is given: some network file systems have no locks. A lock goes with the process."""
    descriptor, has_locks = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise Moe2ggufError(f"another run works in {folder}; wait until it is done") from None
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            has_locks = False
        yield has_locks
    finally:
        os.close(descriptor)
