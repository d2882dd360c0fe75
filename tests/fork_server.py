"""Imported by the fork server before it forks: what each of its processes would otherwise find out for itself.

To learn which vector extensions this CPU has, Inductor builds a library for each and loads it in another interpreter:
over a second of each process that compiles.
"""

from __future__ import annotations

import seldom  # noqa: F401
from torch._inductor.cpu_vec_isa import pick_vec_isa

pick_vec_isa()
