"""The reader of machine code: how long a step is, and which products still read what other instructions write."""

import pytest
from triton_sass import instructions, overwritten_operands, product_steps, written

# one step of a loop as Triton 3.6 makes it: two products in flight, then the next step's prologue
STEP = """
.L_x_0:
        /*0000*/                   DEPBAR.LE SB0, 0x4 ;
        /*0010*/                   F2FP.BF16.F32.PACK_AB R96, R4, R5 ;
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R96, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   {second} R100, R8, R9 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, {between} ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, {after} ;
        /*0080*/              @!P1 BRA `(.L_x_0) ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/                   {last} R24, R100, R24 ;
        /*00b0*/                   EXIT ;
"""


def step(second="F2FP.BF16.F32.PACK_AB", between="0x1", after="0x0", last="FADD"):
    return STEP.format(second=second, between=between, after=after, last=last)


def test_a_step_that_waits_for_its_products_is_clean():
    assert overwritten_operands(step()) == []


def test_the_next_step_writes_the_second_product_s_operand():
    (found,) = overwritten_operands(step(after="0x1"))
    assert "R24, R100, gdesc" in found and found.endswith("F2FP.BF16.F32.PACK_AB R100, R8, R9")


def test_both_products_are_in_flight():
    found = overwritten_operands(step(between="0x3", after="0x3"))
    assert any("R24, R96, gdesc" in pair for pair in found) and any(
        "R24, R100, gdesc" in pair for pair in found
    )


def test_a_predicated_or_wide_write_counts():
    code = step(after="0x1").replace("F2FP.BF16.F32.PACK_AB R100, R8, R9", "@P2 LDS.128 R98, [R2]")
    assert any("@P2 LDS.128" in pair for pair in overwritten_operands(code))


def test_sums_are_not_touched_before_the_wait():
    code = step().replace("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n        /*00a0*/", "NOP ;\n        /*00a0*/")
    assert overwritten_operands(code) == [], "the loop's own wait covers what follows it"
    code = code.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1")
    assert any(pair.endswith("FADD R24, R100, R24") for pair in overwritten_operands(code))


def test_a_product_of_shared_memory_has_no_operand_in_registers():
    code = step(after="0x1").replace("R100, gdesc", "gdesc")
    assert overwritten_operands(code) == []


def test_a_step_is_what_lies_between_a_label_and_the_jump_back():
    assert product_steps(step()) == [[9, 2]] and instructions(step()) == 12
    assert product_steps(step().replace("@!P1 BRA", "@!P1 NOP")) == [], "unrolled"
    assert product_steps(step().replace("HGMMA", "FFMA")) == [], "no product"


def test_loops_around_a_step_are_left_out():
    code = step() + "        /*00c0*/              @!P2 BRA `(.L_x_0) ;\n"
    waiting = ".L_x_1:\n        /*0068*/              @!P3 BRA `(.L_x_1) ;\n        /*0070*/"
    assert product_steps(code) == [[9, 2]]
    assert product_steps(code.replace("        /*0070*/", waiting)) == [[10, 2]], (
        "a wait is no product's loop"
    )
    behind = (
        ".L_x_2:\n        /*00d0*/                   NOP ;\n        /*00e0*/              BRA `(.L_x_3) ;\n"
    )
    waits = (
        step().replace("        /*0030*/", ".L_x_3:\n        /*0030*/").replace("@!P1 BRA", "@!P1 NOP")
        + behind
    )
    assert product_steps(waits) == [], "a wait behind the end"
    assert instructions(waits) == 12 + 1


@pytest.mark.parametrize(
    "name", ["HMMA.16816.F32.BF16 R4, R8, R12, R4", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]"]
)
def test_products_of_every_architecture_count(name):
    assert product_steps(step().replace("F2FP.BF16.F32.PACK_AB R96, R4, R5", name)) == [[9, 3]]


@pytest.mark.parametrize(
    ("instruction", "registers"),
    [
        ("FADD R4, R5, R6", {4}),
        ("@!P3 FADD R4, R5, R6", {4}),
        ("LDSM.16.MT88.4 R8, [R2+UR4]", {8, 9, 10, 11}),
        ("LDG.E.64 R8, desc[UR4][R2.64]", {8, 9}),
        ("IMAD.WIDE.U32 R8, R2, 0x10, R4", {8, 9}),
        ("F2F.F64.F32 R8, R2", {8, 9}),
        ("F2F.F32.F64 R8, R2", {8}),
        ("DFMA R8, R2, R4, R6", {8, 9}),
        ("CS2R R8, SRZ", {8, 9}),
        ("SHFL.BFLY PT, R8, R9, 0x1, 0x1f", {8}),
        ("ISETP.GE.AND P0, PT, R8, R9, PT", set()),
        ("STS.128 [R8+UR4], R12", set()),
        ("LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64], P1", set()),
        ("R2UR UR4, R8", set()),
        ("EXIT", set()),
    ],
)
def test_registers_written(instruction, registers):
    assert written(instruction) == registers
