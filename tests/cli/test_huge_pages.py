"""The command line starts itself again with large pages, once, and leaves a user's own setting alone."""

import os
import platform
import subprocess
import sys

import pytest

from unlearnjax.cli.huge_pages import KEEP, with_huge_pages

linux = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")


@linux
def test_the_setting_is_added_once_and_beside_others():
    first = with_huge_pages({"A": "b"})
    assert first == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert with_huge_pages(first) is None
    kept = with_huge_pages({}, keep_freed=True)
    assert kept == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1" + KEEP} and with_huge_pages(kept) is None
    beside = with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.check=1"})
    assert beside == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}
    assert with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) is None


@linux
def test_a_process_comes_back_as_itself():
    code = (
        "import os, sys\n"
        "from unlearnjax.cli.huge_pages import restart_with_huge_pages\n"
        "restart_with_huge_pages()\n"
        "print(os.getpid(), os.environ['GLIBC_TUNABLES'], sys.argv[1:])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    with subprocess.Popen(
        [sys.executable, "-c", code, "one", "two words"], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        out, _ = child.communicate()
    assert out.split(maxsplit=2) == [str(child.pid), "glibc.malloc.hugetlb=1", "['one', 'two words']\n"]
