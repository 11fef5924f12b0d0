"""One run at a time in an output folder."""

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .options import check_encodable


LOCK_NAME = ".run.lock"
ORPHANS = 15.0  # seconds until the data loader's workers notice that their process was killed, and end too


@contextmanager
def output_lock(folder: str, option: str = "--output_dir") -> Iterator[None]:
    """
    Makes the folder and holds it for this process. The lock is the operating system's: it goes with the process,
    however that ends.

    Args:
        option: that names the folder, for the error.

    Raises:
        ValueError: if another process holds the folder, with its id and start; for a folder that the locale cannot
            write.
    """
    check_encodable(folder)
    os.makedirs(folder, exist_ok=True)
    lock, note = FileLock(os.path.join(folder, LOCK_NAME)), os.path.join(folder, f"{LOCK_NAME}.json")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        owner = _read(note)
        try:
            held = lock.acquire(timeout=0 if _is_alive(owner) else ORPHANS)
        except Timeout as error:
            raise ValueError(
                f"{folder} is in use by process {owner.get('process', 'unknown')} on {owner.get('host', 'a host')}, "
                f"started {owner.get('started', 'just now')}; two runs in one folder would overwrite each other. Wait "
                f"for it or stop it, or give another {option}."
            ) from error
    with held:
        with open(note, "w", encoding="utf-8") as file:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process().create_time()))
            json.dump({"process": os.getpid(), "host": platform.node(), "started": started}, file)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                os.remove(note)


def _read(note: str) -> dict[str, Any]:
    try:
        with open(note, encoding="utf-8") as file:
            owner = json.load(file)
    except (OSError, ValueError):  # just being written, or removed
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether a process runs that is, or may be, the owner; one on another host may."""
    return owner.get("host") != platform.node() or psutil.pid_exists(owner.get("process", 0))
