"""Files that are whole or not there: durable replacement, checksums, and a lock on a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import pickle
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

LOCK = "run.lock"
PART = ".part-"  # what the name of a file begins with while it is written
MARK = b"sha256:"  # ends a checkpoint, before the digest of all that stands before it
DIGEST = hashlib.sha256().digest_size
BLOCK = 1 << 20

# Descriptors of the lock files that this process has locked. A lock belongs to the process, not to
# the object that asked for it, and closing any other descriptor of the file would give it up.
_locks: dict[Path, int] = {}


def lock(folder: Path) -> None:
    """Let no other process write to the folder until :func:`unlock`, or until this one ends.

    A POSIX record lock: it goes with the process however that ends, and is not passed on to the
    processes that load data. A process that has it already keeps it.

    Raises:
        ValueError: another process holds it, which the message names; or there are no locks.
    """
    path = (folder / LOCK).resolve()
    while not _is_current(path):
        unlock(folder)
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(number, BLOCK).decode(errors="replace") or "another process"
            os.close(number)
            raise ValueError(_refusal(folder, holder, error)) from error
        _locks[path] = number
        os.truncate(number, 0)
        os.write(number, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _refusal(folder: Path, holder: str, error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EAGAIN):
        return (
            f"--out {folder}: {holder} is writing to it; stop that run or let it end, or give "
            "another folder"
        )
    return f"--out {folder}: its file system cannot lock files ({error}); give a folder on another"


def unlock(folder: Path) -> None:
    """Give the folder back, if this process has it."""
    path = (folder / LOCK).resolve()
    if _is_current(path):
        path.unlink()
    number = _locks.pop(path, None)
    if number is not None:
        os.close(number)


def _is_current(path: Path) -> bool:
    """Whether this process has locked the file that has this name at present."""
    if path not in _locks or not path.exists():
        return False
    return os.path.samestat(os.fstat(_locks[path]), path.stat())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, which takes the place of ``path`` on exit: at once or not at all.

    Its name is its own, in the same folder. It is on disk when the context is left; where that is
    by an exception, ``path`` is as it was.
    """
    part = path.with_name(f"{PART}{secrets.token_hex(8)}-{path.name}")
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def is_own(path: Path) -> bool:
    """Whether the file is a lock, or was being written by a process that ended."""
    return path.name == LOCK or path.name.startswith(PART)


def remove_parts(folder: Path) -> None:
    """Remove what ended processes were writing; for the process that has the lock."""
    for part in folder.glob(f"{PART}*"):
        part.unlink()


class _Hashing(io.BufferedWriter):
    """A new file that knows the digest of what was written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return super().write(data)


def save(state: dict[str, Any], path: Path) -> None:
    """Replace a checkpoint, by one that ends with its digest; ``torch.load`` reads it too."""
    with replacing(path) as part, _Hashing(part) as file:
        torch.save(state, file)
        file.write(MARK + file.hash.digest())


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of :func:`save`, on the CPU.

    Raises:
        ValueError: it is not what was written; nothing in it was interpreted then.
    """
    try:
        _check_digest(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read; delete it to start that run anew ({error})"
        ) from error
    return state


def _check_digest(path: Path) -> None:
    left = path.stat().st_size - len(MARK) - DIGEST
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while left > 0:
            block = file.read(min(left, BLOCK))
            left -= len(block)
            digest.update(block)
        end = file.read()
    if not end.startswith(MARK):
        raise ValueError("it is cut off, or not a checkpoint of this version")
    if end != MARK + digest.digest():
        raise ValueError("its checksum differs")
