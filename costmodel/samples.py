"""What `calibrate` measures: times of matrix products, memory traffic, attention and collectives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MatmulSample:
    dtype: str
    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True)
class MemorySample:
    """An elementwise op that moves `bytes_moved` in all and writes a new tensor."""

    bytes_moved: int
    seconds: float


@dataclass(frozen=True)
class AttentionSample:
    dtype: str
    heads: int
    sequence: int
    head_size: int
    backward: bool
    seconds: float


@dataclass(frozen=True)
class CollectiveSample:
    """`bytes` of the full tensor; `across` where every rank of the group is on a node of its own.

    `cpu_s`: of `seconds`, what the rank's process kept a core busy; 0 on a GPU.
    """

    kind: str
    ranks: int
    bytes: int
    across: bool
    seconds: float
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Samples:
    """All that was measured, per rank, with every rank of the machine busy.

    `launch_s`: an op on 16 elements, as part of every sample of an op. `step_launch_s`: as a step has it, on a core of
    its own: on a CPU behind work that fills the caches.
    """

    device_name: str
    cuda: bool
    ranks_per_node: int
    cores: int
    memory_bytes: int
    launch_s: float
    step_launch_s: float
    update_s: float
    matmuls: tuple[MatmulSample, ...]
    memory: tuple[MemorySample, ...]
    attention: tuple[AttentionSample, ...]
    collectives: tuple[CollectiveSample, ...]
