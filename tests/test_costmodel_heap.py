"""Memory that a process frees and takes again, against the kernel's count of page faults."""

from __future__ import annotations

import subprocess
import sys

_BLOCKS = """
import os, resource
import torch
from costmodel.heap import keep_freed

MIB, PAGE = 2**20, resource.getpagesize()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        blocks = [torch.ones(24 * MIB // 4), torch.ones(40 * MIB // 4)]
        del blocks
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * PAGE

os.environ["MALLOC_TRIM_THRESHOLD_"] = "1"
assert not keep_freed(256 * MIB)
del os.environ["MALLOC_TRIM_THRESHOLD_"]
assert faults() > 100 * MIB  # of 192
assert keep_freed(256 * MIB) and keep_freed(MIB)  # the most that was asked for stays
for _ in range(3):  # until freed blocks are where they stay
    faults()
assert faults() < 2 * MIB
large = torch.ones(300 * MIB // 4)
held = int(open("/proc/self/statm").read().split()[1]) * PAGE
del large
assert held - int(open("/proc/self/statm").read().split()[1]) * PAGE > 290 * MIB  # goes back
"""


def test_what_a_step_needs_stays_with_the_process_and_no_more() -> None:
    done = subprocess.run([sys.executable, "-c", _BLOCKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
