"""Training steps reuse the memory of freed tensors."""

import platform
import subprocess
import sys

import pytest

COUNT_PAGE_FAULTS = """
import resource, sys
import numpy as np
from topwork.training.memory_allocation import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
np.ones(64 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(64 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(*arguments: str) -> int:
    command = [sys.executable, "-c", COUNT_PAGE_FAULTS, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_not_returned_to_the_kernel():
    assert count_page_faults("keep") < count_page_faults() / 10
