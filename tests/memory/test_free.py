"""What is free on the host, whatever its control groups say, and on a disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglp_llm.memory.free import free_memory, host_free


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       9000 kB\nMemFree:  10 kB\nMemAvailable:    5000 kB\n"}
V2 = {"proc/self/cgroup": "0::/outer/inner\n", "sys/fs/cgroup/outer/inner/memory.max": "max\n"}
V2 |= {"sys/fs/cgroup/outer/inner/memory.current": "700\n", "sys/fs/cgroup/outer/memory.current": "900\n"}
V2 |= {"sys/fs/cgroup/outer/memory.stat": "anon 500\ninactive_file 300\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "100"}
V1 |= {"sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 30\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 5000 * 1024),
        ({**MEMINFO, **V2, "sys/fs/cgroup/outer/memory.max": "1000"}, 1000 - 900 + 300),
        ({**MEMINFO, **V2, "sys/fs/cgroup/outer/memory.max": "500"}, 0),
        ({**MEMINFO, **V2, "sys/fs/cgroup/outer/memory.max": "max"}, 5000 * 1024),
        ({**MEMINFO, **V2, "sys/fs/cgroup/outer/memory.max": f"{2**40}"}, 5000 * 1024),
        ({**MEMINFO, **V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000"}, 4000 - 100 + 30),
        ({**MEMINFO, **V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 5000 * 1024),
        ({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000"}, 4000 - 100 + 30),
    ],
)
def test_free_on_the_host(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert host_free(tree(tmp_path, files)) == expected


def test_free_without_proc(tmp_path: Path) -> None:
    pages = host_free(tmp_path)
    assert pages is None or 0 < pages <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_free_on_the_disk_of_a_folder_to_come(tmp_path: Path) -> None:
    there = free_memory(scratch=str(tmp_path / "not" / "yet")).disk
    assert there is not None
    assert there > 0
    assert free_memory().disk is None
