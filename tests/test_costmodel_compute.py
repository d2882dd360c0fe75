"""Compute prices: arithmetic by hand, behaviour at the limits, and measured transformer layers."""

from __future__ import annotations

import csv
import time
from dataclasses import replace
from importlib import resources

import pytest

from costmodel.collectives import collective_s
from costmodel.compute import KINDS, Work, attention, matmul, op_s, pointwise, update_traffic_s
from costmodel.hardware import Device, Link, Topology, topology
from costmodel.presets import hardware

A100 = hardware("a100-80gb").device
GPUS = ("a100-40gb", "a100-80gb", "h100", "h200", "b200")


def test_a_large_product_runs_near_the_measured_best_rate() -> None:
    work = matmul(8192, 8192, 8192)
    rate = work.flops / op_s(work, A100)
    assert work.flops == 2 * 8192**3
    assert 0.88 * 271.2e12 < rate < 271.2e12  # best product found on this part: 271.2 TFLOP/s (hardware.csv)


@pytest.mark.parametrize("gpu", GPUS)
def test_no_product_beats_the_peak_or_the_memory(gpu: str) -> None:
    device = hardware(gpu).device
    for m in (1, 17, 128, 1000, 4096, 16384):
        for n in (64, 768, 5120):
            for k in (1, 64, 1024, 8192):
                work = matmul(m, n, k)
                seconds = op_s(work, device)
                assert seconds > work.flops / device.peak_flops_per_s["bfloat16"]
                assert seconds > (work.bytes_read + work.bytes_written) / device.memory_bytes_per_s


def test_products_of_a_batch_by_hand() -> None:
    work = matmul(3, 5, 7, batch=2)
    assert (work.flops, work.bytes_read, work.bytes_written) == (2 * 2 * 105, 2 * 2 * (21 + 35), 2 * 2 * 15)


def test_off_the_tensor_cores_half_the_fp32_peak_is_reached() -> None:
    """19.5 TFLOP/s with fused multiply-adds; a view takes nothing, whatever it spans."""
    assert op_s(pointwise(0, 0, flops=1e12), A100) == pytest.approx(2e-6 + 1e12 / 9.75e12)
    assert op_s(Work(0.0, 1e9, 1e9, "view"), A100) == 0.0


def test_a_wave_of_tiles_is_paid_whole() -> None:
    """109 tiles of 128 x 128 on 108 SMs take two waves where k is too short to be cut."""
    one, two = matmul(128, 128 * 108, 512), matmul(128, 128 * 109, 512)
    assert op_s(two, A100) > 1.15 * op_s(one, A100)


def test_a_thin_product_is_bound_by_its_weight() -> None:
    """One token through a 4096 x 4096 weight reads 33.6 MB: at 87% of 2.0 TB/s, 19.3 us, and a launch of 2 us."""
    assert op_s(matmul(1, 4096, 4096), A100) == pytest.approx(21.3e-6, rel=0.05)


def test_a_product_costs_more_per_flop_as_it_is_cut() -> None:
    whole = matmul(8192, 8192, 8192)
    rates = [work.flops / op_s(work, A100) for work in (whole, matmul(8192, 1024, 8192), matmul(8192, 8192, 128))]
    assert rates[0] > rates[1] > rates[2]


def test_pointwise_reads_and_writes_at_the_memory_rate() -> None:
    """1 GB in and 1 GB out at 0.87 x 2.0 TB/s: 1.149 ms."""
    assert op_s(pointwise(1e9, 1e9), A100) == pytest.approx(2e-6 + 2e9 / 1.74e12)


@pytest.mark.parametrize("gpu", GPUS)
def test_an_unknown_op_is_never_cheaper_than_a_known_one(gpu: str) -> None:
    device = hardware(gpu).device
    unknown = op_s(Work(1e12, 1e8, 1e8, "mystery", "bfloat16"), device)
    assert op_s(Work(0, 1e8, 1e8, "mystery"), device) > 1.5 * op_s(Work(0, 1e8, 1e8, "scatter"), device)
    for kind in KINDS:
        shape = {"m": 4096, "n": 4096, "k": 128, "batch": 32}
        assert unknown >= op_s(Work(1e12, 1e8, 1e8, kind, "bfloat16", **shape), device), kind


def test_a_product_of_unknown_shape_is_not_cheap() -> None:
    """A grouped product that only tells its FLOPs pays them off the tensor cores."""
    assert op_s(Work(1e12, 1e6, 1e6, "matmul", "bfloat16"), A100) > 10 * op_s(matmul(8192, 8192, 8192), A100)


def test_launch_is_the_same_for_shard_and_whole() -> None:
    """Sharding 8 ways saves 7/8 of the bytes' time and nothing of the launch, at any size: no floor."""
    for size in (1e3, 1e5, 1e8):
        whole, shard = op_s(pointwise(size, size), A100), op_s(pointwise(size / 8, size / 8), A100)
        assert whole - shard == pytest.approx(7 / 8 * (whole - A100.kernel_launch_s))
        assert shard > A100.kernel_launch_s


def test_flash_attention_runs_at_published_rates() -> None:
    """arXiv 2307.08691 Fig. 4-6, A100, head size 128, sequence 4k, no mask: about 220 forward, 180 backward TFLOP/s."""
    forward = attention(4, 16, 4096, 4096, 128)
    backward = attention(4, 16, 4096, 4096, 128, backward=True)
    assert forward.flops == 4 * 4 * 16 * 4096**2 * 128
    assert backward.flops == 2.5 * forward.flops
    assert forward.flops / op_s(forward, A100) == pytest.approx(220e12, rel=0.1)
    assert backward.flops / op_s(backward, A100) == pytest.approx(180e12, rel=0.1)


def test_causal_attention_does_half_the_work() -> None:
    """And the other half of the 128 x 128 blocks on the diagonal."""
    full, causal = attention(4, 16, 4096, 4096, 128), attention(4, 16, 4096, 4096, 128, causal=True)
    assert op_s(causal, A100) / op_s(full, A100) == pytest.approx(0.5 + 0.5 * 128 / 4096, rel=0.01)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_moves_its_operands_once(backward: bool) -> None:
    """3 sequences of 5 heads on 1 of keys; 7 queries, 11 keys, heads of 13; 2 bytes, and 4 of each log-sum-exp."""
    q, kv, statistics = 3 * 5 * 7 * 13 * 2, 3 * 1 * 11 * 13 * 2, 3 * 5 * 7 * 4
    work = attention(3, 5, 7, 11, 13, kv_heads=1, backward=backward)
    read = q + kv + kv + (q + q + statistics if backward else 0)
    assert work.bytes_read == read
    assert work.bytes_written == (q + kv + kv if backward else q + statistics)
    assert work.flops == (5 if backward else 2) * 2 * 3 * 5 * 7 * 11 * 13


def test_attention_fills_blocks_of_rows_and_multiprocessors() -> None:
    def busy_s(batch: int, queries: int, size: int) -> float:
        work = attention(batch, 1, queries, 1 << 20, size)
        return op_s(replace(work, bytes_read=0, bytes_written=0, launches=0), A100)

    assert busy_s(1, 64, 128) == pytest.approx(busy_s(1, 128, 128))  # half a block takes as long as one
    assert busy_s(1, 128, 128) == pytest.approx(busy_s(108, 128, 128))  # and one as long as one on each of 108 SMs
    assert busy_s(109, 128, 128) == pytest.approx(2 * busy_s(108, 128, 128))
    assert busy_s(108 * 80, 128, 128) == pytest.approx(80 * busy_s(108, 128, 128))
    assert busy_s(108 * 8 + 1, 128, 128) < 8.1 * busy_s(108, 128, 128)
    assert busy_s(108, 128, 64) == pytest.approx((64 + 24) / (128 + 24) * busy_s(108, 128, 128))
    assert busy_s(108, 128, 256) == pytest.approx(2 * busy_s(108, 128, 128))


def test_a_last_wave_by_hand() -> None:
    """Tiles of 16 x 16 on 10 SMs: 11 of them take two waves, or 1.225 where `k` is deep enough to be cut."""
    device = replace(A100, tile_m=16, tile_n=16, sm_count=10, kernel_launch_s=0.0)
    many, one = (
        replace(work, bytes_read=0, bytes_written=0) for work in (matmul(16, 16, 512, batch=11), matmul(176, 16, 512))
    )
    assert op_s(many, device) == pytest.approx(op_s(one, device))
    rate = device.peak_flops_per_s["bfloat16"] * device.matmul_efficiency * device.sustained
    for tiles, k, waves in ((11, 512, 2.0), (11, 2048, 1.225), (19, 2048, 2.0), (101, 2048, 11.0), (15, 1024, 1.65)):
        work = replace(matmul(16 * tiles, 16, k), bytes_read=0, bytes_written=0)
        assert op_s(work, device) == pytest.approx(waves * 10 * 2 * 16 * 16 * (k + 8) / rate), (tiles, k)


def test_what_fits_the_cache_moves_at_its_rate() -> None:
    """1 MB of cache at 10 TB/s: 1 MB at 87% of it, the next 2 MB at 87% of 2 TB/s."""
    device = replace(A100, cache_bytes=1_000_000, cache_bytes_per_s=10e12, kernel_launch_s=0.0)
    assert op_s(pointwise(5e5, 5e5), device) == pytest.approx(1e6 / 8.7e12)
    assert op_s(pointwise(2e6, 1e6), device) == pytest.approx(1e6 / 8.7e12 + 2e6 / 1.74e12)


def test_negative_work_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        op_s(Work(-1.0, 1.0, 1.0, "pointwise"), A100)


def test_pricing_is_fast() -> None:
    """20,000 distinct products and as many repeats in well under a second."""
    works = [matmul(1 + i, 1024, 512) for i in range(20_000)]
    start = time.process_time()
    for _ in range(2):
        for work in works:
            op_s(work, A100)
    assert time.process_time() - start < 2.0


# One GPT layer of 22B parameters, by hand, as Megatron-LM ran it in arXiv 2205.05198 Table 4: fused scale-mask-softmax,
# no flash attention, tensor parallel over 8.

HIDDEN, HEADS, SEQUENCE, BATCH, RANKS, ITEM = 6144, 64, 2048, 4, 8, 2
TOKENS, HEAD = BATCH * SEQUENCE, HIDDEN // HEADS
FFN = 4 * HIDDEN // RANKS
WIDTH = HIDDEN // RANKS
FULL = TOKENS * HIDDEN * ITEM
SCORES = BATCH * HEADS // RANKS * SEQUENCE**2 * ITEM


def reduction(read: float, written: float) -> Work:
    return Work(0.0, read, written, "reduction", "bfloat16")


def scores_in_memory() -> list[Work]:
    """Scores, softmax, dropout with a byte mask, context."""
    batch = BATCH * HEADS // RANKS
    return [
        matmul(SEQUENCE, SEQUENCE, HEAD, batch=batch),
        reduction(SCORES, SCORES),
        pointwise(SCORES, SCORES * 1.5),
        matmul(SEQUENCE, HEAD, SEQUENCE, batch=batch),
    ]


def scores_backward() -> list[Work]:
    batch = BATCH * HEADS // RANKS
    long, wide = (matmul(SEQUENCE, SEQUENCE, HEAD, batch=batch), matmul(SEQUENCE, HEAD, SEQUENCE, batch=batch))
    return [long, wide, pointwise(1.5 * SCORES, SCORES), reduction(2 * SCORES, SCORES), wide, wide]


def input_gradient(n: int, k: int) -> Work:
    return matmul(TOKENS, k, n)


def weight_gradient(n: int, k: int) -> Work:
    """Added to the fp32 gradient in the product's epilogue."""
    plain = matmul(n, k, TOKENS)
    return Work(plain.flops, plain.bytes_read + 4 * n * k, 4 * n * k, "matmul", "bfloat16", n, k, TOKENS)


LINEARS = ((3 * WIDTH, HIDDEN), (HIDDEN, WIDTH), (FFN, HIDDEN), (HIDDEN, FFN))


def side_by_side_s(compute_s: float, comm_s: float, device: Device, link: Link) -> float:
    """Time until both are done, where a collective of `comm_s` on `link` starts together with compute of `compute_s`.

    The collective keeps `link.sms` SMs busy, and compute runs on the others until it ends.
    """
    share = min(1.0, link.sms / device.sm_count)
    done_s = comm_s * (1.0 - share)
    return comm_s + compute_s - done_s if compute_s > done_s else comm_s


def layer_seconds(mesh: Topology, sequence_parallel: bool, recompute: str) -> tuple[float, float]:
    """Forward and backward of one layer: sums of ops, and backward collectives beside the products they overlap."""
    device, link = mesh.device, mesh.hardware.intra_node

    def total(works: list[Work]) -> float:
        return sum(op_s(work, device) for work in works)

    def comm(kind: str) -> float:
        return collective_s(kind, FULL, (0,), mesh)

    part = FULL / RANKS if sequence_parallel else FULL
    hidden, gelu = TOKENS * WIDTH * ITEM, TOKENS * FFN * ITEM
    norm, add = reduction(part, part), pointwise(2 * part, 1.5 * part)
    products = [matmul(TOKENS, n, k) for n, k in LINEARS]
    others = [norm, norm, add, add, pointwise(hidden, hidden), pointwise(gelu, gelu)]
    forward = total([*products, *scores_in_memory(), *others])
    forward += 2 * (comm("all_gather") + comm("reduce_scatter") if sequence_parallel else comm("all_reduce"))

    # Norm: gradient and input, once for the input's gradient and once for the weights'; then the residual is added.
    norm_back = [reduction(2 * part, part), reduction(2 * part, 0), pointwise(2 * part, part)]
    add_back = [pointwise(1.5 * part, part), reduction(part, 0)]
    rest = [*norm_back, *norm_back, *add_back, *add_back, *scores_backward()]
    rest += [pointwise(2 * gelu, gelu), reduction(gelu, 0), pointwise(3 * hidden, 3 * hidden), reduction(3 * hidden, 0)]
    rest += [work(n, k) for n, k in (LINEARS[1], LINEARS[3]) for work in (input_gradient, weight_gradient)]
    backward = total(rest)
    for n, k in (LINEARS[0], LINEARS[2]):
        into, weight = op_s(input_gradient(n, k), device), op_s(weight_gradient(n, k), device)
        if sequence_parallel:  # gather the saved input behind one product, scatter its gradient behind the other
            backward += side_by_side_s(into, comm("all_gather"), device, link)
            backward += side_by_side_s(weight, comm("reduce_scatter"), device, link)
            backward += comm("all_gather")
        else:
            backward += into + side_by_side_s(weight, comm("all_reduce"), device, link)
    if recompute == "full":
        backward += forward
    elif recompute == "selective":
        backward += total(scores_in_memory())
    return forward, backward


def test_layer_times_agree_with_the_published_ones() -> None:
    """Forward within 8%, backward within 10%, all together within 8% of arXiv 2205.05198 Table 4."""
    mesh = topology(hardware("a100-80gb"), {"tp": RANKS})
    rows = list(csv.DictReader(resources.files("costmodel").joinpath("data/layer_timing.csv").read_text().splitlines()))
    assert len(rows) == 5
    for row in rows:
        forward, backward = layer_seconds(mesh, row["sequence_parallel"] == "yes", row["recompute"])
        measured = [float(row[key]) * 1e-3 for key in ("forward_ms_per_layer", "backward_ms_per_layer", "combined_ms")]
        errors = [
            mine / theirs - 1 for mine, theirs in zip((forward, backward, forward + backward), measured, strict=True)
        ]
        print(f"{row['sequence_parallel']:>4} {row['recompute']:>10}", *(f"{error:+.1%}" for error in errors))
        assert abs(errors[0]) < 0.08
        assert abs(errors[1]) < 0.10
        assert abs(errors[2]) < 0.08


@pytest.mark.parametrize("gpu", GPUS)
def test_a_shard_never_takes_longer_than_the_whole(gpu: str) -> None:
    device = hardware(gpu).device
    for m, n, k in ((8192, 4096, 4096), (2048, 14336, 4096), (512, 128256, 2048), (96, 640, 3584)):
        for ways in (2, 4, 8, 16):
            whole = op_s(matmul(m, n, k), device)
            assert op_s(matmul(m // ways, n, k), device) <= whole
            assert op_s(matmul(m, n // ways, k), device) <= whole
            assert op_s(matmul(m, n, k // ways), device) <= whole


def test_a_cpu_updates_op_by_op_and_finds_part_in_cache() -> None:
    """8 ops of 80 bytes per fp32 parameter in all: 1,000 parameters move 10,000 bytes an op, 4,000 of them in cache."""
    rates = {"memory_bytes_per_s": 1e9, "memory_efficiency": 1.0, "cache_bytes": 4_000, "cache_bytes_per_s": 4e9}
    cpu = replace(hardware("cpu").device, **rates)
    assert update_traffic_s(1_000, 4, 8, cpu) == pytest.approx(8 * (4_000 / 4e9 + 6_000 / 1e9))
    gpu = replace(hardware("h100").device, **rates)
    assert update_traffic_s(1_000, 4, 8, gpu) == pytest.approx(28 * 1_000 / 1e9)
