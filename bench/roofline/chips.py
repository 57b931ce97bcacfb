"""What a chip can do: its datasheet's peaks, and the rates that well-made kernels reach.

Peaks: NVIDIA's datasheets. A100 80GB SXM: 312 TFLOP/s dense in 16 bits, 2,039 GB/s; H100 SXM: 989 and 3,350; H200 SXM:
989 and 4,800.
Exponentials: 16 special-function results per SM and clock (CUDA C++ Programming Guide, arithmetic throughput, 8.0 and
9.0), times SMs and boost clock: 108 × 1.41 GHz, 132 × 1.98 GHz; three quarters of it are taken as reached.
GEMM and HBM as reached: A100 235 TFLOP/s and 1.7 TB/s, Hopper 680 TFLOP/s and 85 % of the datasheet's bandwidth. These
are assumptions, within ± 25 %. A reading of one chip each, not of these kernels: 8192³ in bf16 at 798 (H100) and 788
TFLOP/s (H200), a copy at 3.0 and 4.3 TB/s; smaller products reach less.
Attention as reached: 55 % of the A100's and 35 % of Hopper's peak. FlashAttention-2 (arXiv 2307.08691) reports up to
73 % on an A100 and 335 TFLOP/s on an H100, at long sequences; short ones at head size 64 reach less.
L2: 64 bytes read per SM and clock; two thirds of it are taken as reached.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Operations and bytes per second."""

    gemm: float  # 16-bit products in cuBLAS
    attention: float  # 16-bit products inside an attention kernel
    exp: float
    hbm: float
    l2: float


@dataclass(frozen=True)
class Chip:
    """A GPU: `peak` is the datasheet's, `reached` what good kernels get."""

    name: str
    arch: int
    peak: Rates
    reached: Rates


def _chip(name: str, arch: int, sms: int, ghz: float, peak: tuple[float, float], reached: tuple[float, ...]) -> Chip:
    """peak: TFLOP/s, GB/s. reached: TFLOP/s of products and inside attention, TB/s."""
    exp, l2 = 16 * sms * ghz * 1e9, 64 * sms * ghz * 1e9
    tflops, gemm, attention = peak[0] * 1e12, reached[0] * 1e12, reached[1] * 1e12
    datasheet = Rates(tflops, tflops, exp, hbm=peak[1] * 1e9, l2=l2)
    return Chip(name, arch, datasheet, Rates(gemm, attention, 0.75 * exp, hbm=reached[2] * 1e12, l2=2 / 3 * l2))


CHIPS = {
    "A100": _chip("A100", 80, 108, 1.41, (312, 2039), (235, 0.55 * 312, 1.7)),
    "H100": _chip("H100", 90, 132, 1.98, (989, 3350), (680, 0.35 * 989, 2.85)),
    "H200": _chip("H200", 90, 132, 1.98, (989, 4800), (680, 0.35 * 989, 4.1)),
}


def chip_of(device_name: str) -> Chip | None:
    """The chip in torch's name of a device ("NVIDIA H100 80GB HBM3"), or None for one that isn't listed."""
    return next((chip for name, chip in CHIPS.items() if name in device_name), None)
