"""Memory in large pages for runs on a CPU: glibc reads the setting when a process starts, so it is started again."""

import os
import platform
import sys
from collections.abc import Mapping

TUNABLE = "glibc.malloc.hugetlb"
KEEP = ":glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"


def with_huge_pages(environment: Mapping[str, str], keep_freed: bool = False) -> dict[str, str] | None:
    """The environment with transparent huge pages for malloc switched on; None where that changes nothing.

    XLA takes its buffers from malloc, a step's in one piece of up to gigabytes. In 4 KiB pages a training step spends a
    quarter of its time on page faults and on misses of the address cache (measured on 2 cores; see benchmarks/).

    Args:
      keep_freed: keep up to 1 GiB of freed memory instead of handing it back, for a command that takes as much again at
        once: a merge of model folders does so for each tensor.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if TUNABLE in tunables or platform.libc_ver()[0] != "glibc":
        return None
    return {**environment, "GLIBC_TUNABLES": f"{tunables}:{TUNABLE}=1".lstrip(":") + (KEEP if keep_freed else "")}


def restart_with_huge_pages(keep_freed: bool = False) -> None:
    """Replace this process by itself in that environment. Call it first thing, before JAX or threads are started."""
    environment = with_huge_pages(os.environ, keep_freed)
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
