"""The launches that `bench.compile_report` compiles: every launcher, with shapes that reach every tile row.

Only shapes, dtypes and strides matter: all tensors are on "meta".
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastheads.reference import PRESETS

LENGTHS = (50, 65, 77, 197, 257, 577, 730, 4096)
HEADS = {64: 12, 80: 16}  # head size → heads: ViT-B and ViT-L, ViT-H
OTHER_HEADS = {16: 8, 32: 4, 72: 16, 88: 16, 104: 16, 112: 16, 128: 8}
# Where a head size does not come with every length in OpenCLIP's own towers: images in ViT-H (80), g, G and bigG (88,
# 104, 112), texts (72, 16), none (32, 128).
OPENCLIP_LENGTHS = {80: (257, 577, 730), 88: (257,), 104: (257,), 112: (257,), 72: (77,), 16: (77,), 32: (), 128: ()}
ONE_PASS_LENGTHS = (50, 65, 77, 197, 257)


@dataclass(frozen=True)
class Case:
    """A launcher and the problem it is given. rank 0: no delta."""

    launcher: str
    head_dim: int = 64
    length: int = 197
    rank: int = 0
    gate: bool = True
    mask: str = ""  # "", "bool" or "additive"
    causal: bool = False
    pool: int | str | None = 0
    dtype: str = "bfloat16"
    base: str = "float32"  # dtype that the base's weights are stored in, and of the MMD's features
    merge: bool = True
    targets: str = "qv"
    shared: bool = False  # one down-projection for all heads
    one_head: bool = False
    preset: str = "adaptive"  # of the MMD: its bandwidths
    domains: int = 3
    backward: bool = True
    tf32: bool = False
    transposed: bool = False  # of the MMD's weights: those right of a panel's square pull on the columns

    @property
    def default(self) -> bool:
        """A row that must not spill: what OpenCLIP's models ask of an implementation that is chosen by itself.

        Not: one_pass, which is asked for by name; float32, the check against PyTorch; masks but a text tower's;
        deltas on heads wider than 80, of ranks that nobody published, of other targets than q and v or with a shared
        down-projection; lengths that no model has at that head size.
        """
        other = self.launcher == "one_pass" or self.dtype == "float32" or self.shared or self.targets != "qv"
        masked = self.mask and (self.length != 77 or self.causal)
        large = self.rank > 16 or (self.rank and self.head_dim > 80 and self.launcher.startswith("attention"))
        there = self.length in OPENCLIP_LENGTHS.get(self.head_dim, LENGTHS)
        return self.launcher.startswith("mmd") or (there and not (other or masked or large))

    @property
    def heads(self) -> int:
        return 1 if self.one_head else {**HEADS, **OTHER_HEADS}[self.head_dim]

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def parts(self) -> tuple[int, ...]:
        return tuple("qkv".index(t) for t in self.targets)

    @property
    def rows(self) -> int:
        """Samples of the MMD in one launch: the paper's batch unless `length` says another."""
        return 36 if self.length == 197 else self.length

    @property
    def batch(self) -> int:
        return max(1, 256 * 197 // self.length)

    def shape(self) -> str:
        if self.launcher == "fold":
            how = ("merged" if self.merge else "beside") + ("" if self.gate else ", no bias")
            return f"D {self.width}, rank {self.rank}, {self.base}, {how}"
        if self.launcher.startswith("mmd"):
            small = self.launcher == "mmd_small"
            words = {f"{f'12 × {self.rows}' if small else '1,024 × 4,096'} × {self.width}": True}
            words |= {"gated" if self.gate else "features": small, self.preset: self.preset != "adaptive"}
            words |= {f"{self.domains} domains": self.domains != 3, "sums only": not self.backward, "tf32": self.tf32}
            words |= {"transposed": self.transposed, self.base: self.base != "float32"}
        else:
            words = {f"head {self.head_dim}": True, f"N {self.length}": True, "one head": self.one_head}
            words |= {f"rank {self.rank}": self.rank, f"of {self.targets}": self.targets != "qv", "shared": self.shared}
            words |= {f"{self.mask} mask": self.mask, "causal": self.causal, "no gate": not self.gate}
            pools = {None: "no pool", "mean": "mean pool", "tokens": "pool per image"}
            words |= {pools.get(self.pool): self.pool != 0, self.dtype: self.dtype != "bfloat16"}
        return ", ".join(word for word, said in words.items() if said)

    def title(self) -> str:
        return f"{self.launcher}: {self.shape()}"


def meta(*shape: int, dtype: str = "float32") -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _kernels(module: str) -> Any:
    return importlib.import_module(f"fastheads.kernels.{module}")


def _columns(case: Case) -> int:
    each = len(case.parts) * (1 if case.shared else case.heads)
    return _kernels("fold").padded_rank(each * (case.rank or 2))


def _pool(case: Case) -> Any:
    return meta(case.batch, dtype="int64") if case.pool == "tokens" else case.pool


def _projected(case: Case) -> tuple[Tensor, Any]:
    """qkv and the delta as the projection's one product leaves them: views of `[B, N, 3D + columns]`."""
    # The columns of T = x Aᵀ stand beside q, k, v whether or not the delta is added on chip.
    y = meta(case.batch, case.length, 3 * case.width + _columns(case), dtype=case.dtype)
    qkv, low = y[..., : 3 * case.width], y[..., 3 * case.width :]
    if not case.rank:
        return qkv, None
    up = meta(len(case.parts), case.heads, case.head_dim, case.rank)
    return qkv, _kernels("low_rank").LowRank(low=low, up=up, parts=case.parts, scale=1.0, shared=case.shared)


def _adapters(case: Case, dtype: str = "float32") -> tuple[Tensor, Tensor]:
    T, H = len(case.parts), case.heads
    a = meta(T, 1 if case.shared else H, case.rank, case.width, dtype=dtype)
    return a, meta(T, H, case.head_dim, case.rank)


def _options(case: Case) -> dict[str, Any]:
    mask = None
    if case.mask:
        mask = meta(1, 1, case.length, case.length, dtype="bool" if case.mask == "bool" else "float32")
    gate = meta(case.heads) if case.gate else None
    gates = {"gate": gate, "gate_form": "softmax" if case.gate else ""}  # as a layer hands them on: theta
    return {"num_heads": case.heads, **gates, "mask": mask, "causal": case.causal}


def attention_fwd(case: Case, row: Any = None) -> None:
    """row: another than the table's."""
    qkv, delta = _projected(case)
    _kernels("attention_fwd").attention_fwd(qkv, delta=delta, pool=_pool(case), _row=row, **_options(case))


def attention_bwd(case: Case) -> None:
    qkv, delta = _projected(case)
    do, lse = meta(case.batch, case.length, case.width, dtype=case.dtype), meta(case.batch, case.heads, case.length)
    _kernels("attention_bwd").attention_bwd(do, qkv, lse, delta=delta, **_options(case))


def low_rank_bwd(case: Case) -> None:
    qkv, delta = _projected(case)
    d = meta(case.batch, case.length, qkv.shape[-1] + _columns(case), dtype=case.dtype)
    _kernels("low_rank").low_rank_bwd(d[..., : qkv.shape[-1]], delta, d[..., qkv.shape[-1] :])


def sums(case: Case) -> None:
    gates = meta(case.batch, case.heads) if case.gate else None
    parts = meta(18, len(case.parts), case.heads, case.head_dim, case.rank) if case.rank else None
    _kernels("sums").sums(gates, parts, gate=meta(case.heads), gate_form="softmax" if case.gate else "")


def fold(case: Case) -> None:
    options = {"shared": case.shared, "merge": case.merge, "dtype": getattr(torch, case.dtype)}
    D = case.width
    w_in, w_out = meta(3 * D, D, dtype=case.base), meta(D, D, dtype=case.base)
    # forward with the biases, backward without; out_proj too where it is not in the dtype already
    b_in, b_out = (meta(rows, dtype=case.base) if case.gate else None for rows in (3 * D, D))
    out = (w_out, b_out) if case.base != case.dtype else ()
    options |= {"num_heads": case.heads, "parts": case.parts, "scale": 1.0}
    _kernels("fold").fold(w_in, b_in, *_adapters(case), *out, **options)


def dropout(case: Case) -> None:
    x = meta(case.batch, case.length, case.width, dtype=case.dtype)
    _kernels("dropout").dropout(x, 0.1, meta(1, dtype="int64"))


def one_pass(case: Case) -> None:
    D, options = case.width, _options(case)
    shapes = ((case.batch, case.length, D), (3 * D, D), (3 * D,))
    x, w_in, b_in = (meta(*shape, dtype=case.dtype) for shape in shapes)
    low = _adapters(case, case.dtype) if case.rank else (None, None)
    _kernels("one_pass").one_pass_fwd(x, w_in, b_in, *low, parts=case.parts, scale=1.0, pool=_pool(case), **options)


def mmd_small(case: Case) -> None:
    x, dom = meta(12, case.rows, case.width), meta(case.rows, dtype="int64")
    gate = meta(12, case.heads) if case.gate else None
    options: dict[str, Any] = {"preset": case.preset, "estimator": "unbiased"}
    if case.preset == "domainbed":
        options |= {"preset": None, "gammas": meta(12, 7), "powers": PRESETS["domainbed"].powers}
    _kernels("mmd_small").mmd_small(x, dom, num_domains=case.domains, gate=gate, backward=case.backward, **options)


@contextmanager
def _products(case: Case) -> Iterator[None]:
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def _features(case: Case, samples: int) -> Any:
    x = meta(1, samples, case.width, dtype=case.base)
    return _kernels("mmd").Points(x, meta(1, samples), meta(samples, dtype="int64"))


def mmd_norms(case: Case) -> None:
    x, _, dom = _features(case, 4096)
    with _products(case):
        _kernels("mmd").mmd_norms(x, dom, meta(1, case.width), case.domains)


def mmd_tile(case: Case) -> None:
    S, powers = case.domains, PRESETS[case.preset].powers
    out = {"coeff": meta(1, S, S), "out": meta(1, 1024, 4096)} if case.backward else {}
    sets = _features(case, 1024), _features(case, 4096), meta(1, case.width)
    with _products(case):
        _kernels("mmd").mmd_tile(*sets, num_domains=S, gammas=meta(1, len(powers)), powers=powers, itself=True, **out)


def mmd_pull(case: Case) -> None:
    w, x, y = meta(1, 1024, 4096), _features(case, 1024).x, _features(case, 4096).x
    if case.transposed:
        w, x, y = w.mT, y, x
    with _products(case):
        _kernels("mmd").mmd_pull(w, x, y, meta(1, case.width), meta(*x.shape), add=case.transposed)


# Each calls its launcher on meta tensors.
EVERY = (
    attention_fwd,
    attention_bwd,
    low_rank_bwd,
    sums,
    fold,
    dropout,
    one_pass,
    mmd_small,
    mmd_norms,
    mmd_tile,
    mmd_pull,
)
LAUNCHERS = {launch.__name__: launch for launch in EVERY}


def quick_cases() -> list[Case]:
    """Each launcher, both head sizes, chunks and flash loop, every switch once: about a minute per process."""
    cases = []
    for launcher in ("attention_fwd", "attention_bwd"):
        cases += [Case(launcher, 64, n) for n in (50, 197, 257, 577)]
        cases += [Case(launcher, 64, n, rank=r) for n, r in ((197, 2), (197, 8), (257, 8), (577, 8))]
        cases += [Case(launcher, 80, n, rank=r) for n, r in ((257, 0), (257, 8))]
        cases += [Case(launcher, 64, 77, causal=True), Case(launcher, 64, 77, mask="additive")]
    cases += [Case("low_rank_bwd", 64, 197, rank=8), Case("low_rank_bwd", 80, 257, rank=2)]
    cases += [Case("sums", rank=2), Case("sums", rank=2, gate=False), Case("sums")]
    cases += [
        Case("fold", 64, rank=8),
        Case("fold", 64, rank=8, gate=False),
        Case("fold", 64, rank=8, base="bfloat16", merge=False),
        Case("dropout"),
    ]
    cases += [Case("one_pass", 64, 50, rank=2), Case("one_pass", 64, 197, rank=8)]
    # As every layer runs outside of `capture_heads`.
    cases += [Case("attention_fwd", 64, n, pool=None) for n in (197, 577)] + [Case("one_pass", 64, 50, pool=None)]
    cases += [Case("mmd_small"), Case("mmd_small", gate=False), Case("mmd_norms")]
    cases += [Case(launcher, tf32=t) for launcher in ("mmd_tile", "mmd_pull") for t in (False, True)]
    return [*cases, Case("mmd_pull", transposed=True), Case("mmd_pull", transposed=True, tf32=True)]


def all_cases() -> list[Case]:
    """Every launcher, head size, length and switch that changes the code."""
    cases = quick_cases()
    for launcher in ("attention_fwd", "attention_bwd"):
        for dh in HEADS:
            cases += [Case(launcher, dh, n, rank=r) for n in LENGTHS for r in (0, 8)]  # rank 2 has rank 8's tiles
            cases += [Case(launcher, dh, 77, causal=True, rank=r) for r in (0, 8)]
            cases += [Case(launcher, dh, 77, mask="additive", rank=8), Case(launcher, dh, 4096, causal=True)]
            cases += [Case(launcher, dh, n, mask=m) for n in (77, 197, 577) for m in ("bool", "additive")]
            cases += [Case(launcher, dh, 257, gate=False, pool=None)]
        cases += [Case(launcher, dh, n, rank=r) for dh in OTHER_HEADS for n in (257, 577) for r in (0, 8)]
        cases += [Case(launcher, dh, 197, dtype="float16") for dh in HEADS]
        cases += [Case(launcher, dh, n, dtype="float32") for dh in HEADS for n in (197, 577)]
        cases += [Case(launcher, 64, n, rank=r) for n in (197, 577) for r in (32, 64)]
    cases += [Case("attention_fwd", 64, 197, pool="mean")]
    cases += [Case("low_rank_bwd", dh, n, rank=r) for dh in (64, 80, 72, 128) for n in (197, 4096) for r in (2, 16)]
    bases = (("float32", True), ("bfloat16", False))
    for dh in HEADS:
        cases += [Case("fold", dh, rank=r, base=base, merge=merge) for r in (2, 8, 16) for base, merge in bases]
        cases += [Case("one_pass", dh, n, rank=r) for n in ONE_PASS_LENGTHS for r in (0, 8)]
        cases += [Case("one_pass", dh, 77, causal=True, rank=2)]
    return list(dict.fromkeys(cases + _corners()))


def family_cases() -> list[Case]:
    """Of the other families' chips: forms, head sizes and lengths whose rows are not those of an A100."""
    cases = [Case("attention_fwd", 64, n, rank=r) for n in (50, 197, 577) for r in (0, 8)]
    cases += [Case("attention_bwd", 64, n, rank=r) for n, r in ((50, 0), (197, 0), (197, 8), (577, 8))]
    cases += [Case("attention_fwd", 80, 257, rank=8), Case("attention_bwd", 80, 257)]
    return [*cases, Case("mmd_small"), Case("mmd_tile"), Case("mmd_pull")]


def _corners() -> list[Case]:
    """What the kernels take and no model of today asks for: one head of one token, all targets, the highest ranks."""
    cases = []
    for launcher in ("attention_fwd", "attention_bwd", "low_rank_bwd"):
        # Triton makes a constant of an argument that is 1.
        cases += [Case(launcher, 16, 1, rank=1, one_head=True)]
        cases += [Case(launcher, 64, 197, rank=8, targets="qkv", shared=True, pool="tokens")]
        cases += [Case(launcher, dh, 257, rank=64, targets=t) for dh in (64, 80) for t in ("qv", "qkv")]
        cases += [Case(launcher, 128, 197, rank=64, targets="qkv", dtype="float16")]
        cases += [Case(launcher, 128, 197, rank=r, dtype="float32") for r in (8, 64)]
        cases += [Case(launcher, 64, 77, rank=8, mask="bool", causal=True, pool="mean")]
    cases += [Case("fold", 16, rank=1, one_head=True), Case("fold", 64, rank=8, targets="vkq", shared=True)]
    cases += [
        Case("one_pass", 16, 1, rank=1, one_head=True, pool="tokens"),
        Case("one_pass", 72, 20, rank=3, mask="bool"),
    ]
    cases += [Case("one_pass", 128, 192, rank=32, targets="qkv"), Case("one_pass", 64, 272, rank=32, pool="mean")]
    cases += [Case("one_pass", dh, n, rank=32, dtype="float32") for dh, n in ((64, 192), (128, 96))]
    cases += [Case("mmd_small", length=n, gate=g) for n in (12, 128) for g in (True, False)]
    cases += [Case("mmd_small", preset=p, domains=d) for p, d in (("dan", 3), ("domainbed", 3), ("dan", 64))]
    cases += [Case("mmd_small", head_dim=72, backward=False), Case("mmd_tile", preset="domainbed")]
    cases += [Case("mmd_tile", domains=d, tf32=t) for d in (20, 64) for t in (False, True)]
    for launcher in ("mmd_norms", "mmd_tile", "mmd_pull"):
        cases += [Case(launcher, base="bfloat16", tf32=t) for t in (False, True)]
    cases += [Case("mmd_pull", base="bfloat16", transposed=True), Case("mmd_norms", tf32=True)]
    return [*cases, Case("mmd_tile", preset="domainbed", tf32=True), Case("mmd_tile", backward=False)]
