"""Writing a file whole: a reader, or a kill, sees the old content or the new."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written to it takes `path`'s place at the end, nothing if it failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors lets the owner alone read its files
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "r+b") as f:  # Windows syncs only what may be written
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> Path:
    """Writes `content` to `path`, whole."""
    with whole(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Writes `content` as JSON to `path`, whole."""
    return write_whole(path, json.dumps(content, indent=1).encode())
