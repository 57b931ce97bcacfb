"""The model of an SM by machine code: what it reads of a kernel, worked out by hand."""

import json

import pytest

from bench.base.checkout import ROOT
from bench.machine_code import LONG, PUBLISHED, Pace, inner_loops, loop_of, main, pace_of

# A loop within a loop, as cuobjdump prints them; the last line is how every kernel ends.
CODE = """
        /*0000*/                   S2R R2, SR_TID.X ;                       /* 0x0000000000027919 */
        /*0010*/                   LDSM.16.M88.4 R4, [R8] ;                 /* 0x000000000804783b */
        /*0020*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;   /* 0x000000080414723c */
        /*0030*/              @!P0 MUFU.EX2 R3, R3 ;                        /* 0x0000000300038308 */
        /*0040*/                   FFMA R3, R3, R5, R6 ;                    /* 0x0000000503037223 */
        /*0050*/                   FMNMX R3, R3, R5, !PT ;                  /* 0x0000000503037209 */
        /*0060*/               @P0 BRA 0x20 ;                               /* 0xfffffffc00000947 */
        /*0070*/                   IADD3 R2, R2, 0x1, RZ ;                  /* 0x0000000102027810 */
        /*0080*/               @P1 BRA 0x10 ;                               /* 0xfffffff800001947 */
        /*0090*/                   EXIT ;                                   /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                                /* 0xfffffff000007947 */
"""


def test_an_inner_loop_keeps_each_unit_busy_for_as_long_as_the_programming_guide_says():
    (loop,) = inner_loops(CODE, 80)
    assert loop.instructions == 5
    # 2,048 multiply-adds at 256 a cycle; 4 exponentials, 16 float32 and 16 integer operations a cycle
    cycles = {"tensor cores": 8, "exponentials": 8, "float32": 2, "integers": 2, "shared memory": 0}
    assert loop.cycles == cycles
    assert loop.alone == 20
    assert loop.multiplied == 4 * 2 * 2048
    (hopper,) = inner_loops(CODE, 90)
    assert hopper.cycles["tensor cores"] == pytest.approx(4 / 0.629)
    assert hopper.cycles["float32"] == 1


@pytest.mark.parametrize(
    ("op", "shared", "alone"),
    [
        ("LDSM.16.MT88.4", 16, 4),  # 512 bytes, and the other three parts' too
        ("LDS.64", 8, 2),
        ("STS", 4, 1),
        ("LDGSTS.E.BYPASS.LTC128B.128.ZFILL", 16, 4),
        ("SHFL.BFLY", 4, 1),
    ],
)
def test_shared_memory_serves_four_parts(op, shared, alone):
    loop = loop_of([(op, " R1, [R2] ")], 80)
    assert (loop.cycles["shared memory"], loop.alone) == (shared, alone)


def test_a_warpgroups_product_reads_its_operands_from_shared_memory():
    registers = loop_of([("HGMMA.64x64x16.F32.BF16", " R24, R20, gdesc[UR4].tnspB, R24 ")], 90)
    assert registers.cycles["tensor cores"] == 64 * 64 * 16 / (4 * 512)
    assert registers.cycles["shared memory"] == 64 * 16 * 2 / 128
    both = loop_of([("HGMMA.64x64x16.F32.BF16", " R24, gdesc[UR4], RZ, !UPT ")], 90)
    assert both.cycles["shared memory"] == 2 * registers.cycles["shared memory"]
    assert both.multiplied == 2 * 64 * 64 * 16


def test_few_warps_have_nothing_to_overlap():
    (loop,) = inner_loops(CODE, 80)
    assert pace_of([loop], 1, 128) == Pace(
        128, 1, 20, {**{u: c / 20 for u, c in loop.cycles.items()}, "issue": 0.25}, 0.4
    )
    many = pace_of([loop], 4, 128)
    assert many.cycles == 8 and many.products == 1 and many.limit == "tensor cores"
    assert pace_of([loop], 1, 128).limit == "too few warps (tensor cores 40%)"


def test_tails_do_not_count():
    (loop,) = inner_loops(CODE, 80)
    tail = loop._replace(multiplied=loop.multiplied / 4, alone=100)
    assert pace_of([loop, tail], 4, 128) == pace_of([loop], 4, 128)


def test_the_model_is_held_against_published_rates(capsys):
    file = ROOT / "bench" / "results" / "machine_code.json"
    rows = {row["chip"]: row for row in json.loads(file.read_text())["rows"] if row["case"] == LONG.title()}
    assert rows.keys() == PUBLISHED.keys()
    for chip, known in PUBLISHED.items():
        assert rows[chip]["rate"] == pytest.approx(known, rel=0.1), chip
    assert main(["--from", str(file)]) == 0
    assert "published 161" in capsys.readouterr().out
