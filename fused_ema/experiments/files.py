"""Files that are complete or absent: durable replacement, checksums, and a lock on a folder."""

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
PART = ".part-"  # prefix of a file's name while it is written
MARK = b"sha256:"  # marks the end of a checkpoint; the digest of everything before follows
DIGEST = hashlib.sha256().digest_size
BLOCK = 1 << 20

# Descriptors of the lock files that this process has locked. A lock belongs to the process, not to
# an object, and closing any other descriptor of the file would release it.
_locks: dict[Path, int] = {}


def lock(folder: Path) -> None:
    """Lock the folder against other processes until :func:`unlock`, or until this one ends.

    It is a POSIX record lock: it ends with the process, however that ends, and the processes that
    load data do not inherit it. A process that already has it keeps it.

    Raises:
        ValueError: another process holds it (the message names it), or the system has no locks.
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
    """Release the folder if this process has locked it."""
    path = (folder / LOCK).resolve()
    if _is_current(path):
        path.unlink()
    number = _locks.pop(path, None)
    if number is not None:
        os.close(number)


def _is_current(path: Path) -> bool:
    """Whether this process has locked the file that now has this name."""
    if path not in _locks or not path.exists():
        return False
    return os.path.samestat(os.fstat(_locks[path]), path.stat())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write, which replaces ``path`` on exit, completely or not at all.

    It has its own name in the same folder, and is on disk when the context ends. After an exception
    ``path`` is unchanged.
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
    """Wait until a file's content, or a folder's entries, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def is_own(path: Path) -> bool:
    """Whether the file is a lock, or the unfinished file of a process that ended."""
    return path.name == LOCK or path.name.startswith(PART)


def remove_parts(folder: Path) -> None:
    """Remove unfinished files of ended processes; only the process with the lock may call it."""
    for part in folder.glob(f"{PART}*"):
        part.unlink()


class _Hashing(io.BufferedWriter):
    """A new file that computes the digest of its content."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return super().write(data)


def save(state: dict[str, Any], path: Path) -> None:
    """Replace a checkpoint by one that ends with its digest; ``torch.load`` reads it too."""
    with replacing(path) as part, _Hashing(part) as file:
        torch.save(state, file)
        file.write(MARK + file.hash.digest())


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint of :func:`save`, on the CPU.

    Raises:
        ValueError: the file differs from what was written. Nothing in it is interpreted then.
    """
    try:
        _check_digest(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read; delete it to start that run again ({error})"
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
