"""How much memory this process may use on its host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OF_THIS_PROCESS = Path("/proc/self/cgroup")


def host_memory_bytes(groups: Path = _CONTROL_GROUPS, listed: Path = _OF_THIS_PROCESS) -> int:
    """The machine's memory in bytes, or what a container or batch job is held to where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_limits(groups, listed)])


def _limits(root: Path, listed: Path) -> Iterator[int]:
    """Limits in bytes of the control groups that `listed` puts a process in, and of those around them.

    A line is `number:controllers:path`, without controllers for version 2. From inside a container the path may be
    the host's, and then only the outermost group is seen here, which is the container's own.
    """
    lines = listed.read_text().splitlines() if listed.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        top = root / "memory" if controllers else root
        group = top / path.lstrip("/")
        for each in (top, group, *group.parents):
            if (file := each / name).is_file() and (text := file.read_text().strip()).isdigit():
                yield int(text)
