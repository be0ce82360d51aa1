"""Training over NCCL, in the place of device channels: right numbers only, on one GPU also where NCCL can share it."""

from __future__ import annotations

from benchmarks.gpu import checks, devices, records

_SHARES = (2, 30)  # of NCCL: two ranks on one GPU, experimental


def main(kind: str) -> None:
    """A few schedules on 2 ranks."""
    if kind == "cuda" and not devices.nccl_serves(kind, 2):
        from benchmarks.gpu.machine import nccl_version

        if nccl_version() < _SHARES:
            found = ".".join(map(str, nccl_version()))
            raise records.NotRun(f"one GPU, and NCCL {found} does not let two ranks share it (2.30 or newer may)")
        records.note("two ranks of one GPU over NCCL (NCCL_MULTI_RANK_GPU_ENABLE=1): correctness only")
    if kind == "sim":
        records.note("simccl in the place of NCCL")
    items = ["1F1B", "GPipe", "InterleavedZeroBubble"]
    devices.run_items(checks.check, 2, kind, items, 40, transport="c10d")
