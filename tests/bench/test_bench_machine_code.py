"""What bench compile reads from machine code: the loop that it counts."""

import pytest

pytest.importorskip("triton")

from bench.machine_code import inner_loop


def numbered(*texts: str) -> list[tuple[int, str]]:
    """Instructions at 0x0, 0x10, 0x20, …"""
    return [(16 * place, text) for place, text in enumerate(texts)]


def test_the_innermost_loop_with_a_product():
    outer = numbered(
        "MOV R0, R1",
        "IADD3 R0, R0, 1",  # 0x10: of the outer loop
        "HMMA.16816.F32 R4, R8, R12, R4",  # 0x20: of the inner one
        "@P0 BRA 0x20",
        "FADD R1, R1, R2",  # 0x40: a loop without a product
        "@P1 BRA 0x40",
        "@P2 BRA 0x10",
        "EXIT",
    )
    assert inner_loop(outer) == ["HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA 0x20"]


def test_what_waits_behind_the_end_leads_into_a_loop_and_is_none():
    """sm_100: one try in the loop, further ones behind the kernel, from where it goes on."""
    loop = numbered(
        "MOV R0, R1",
        "MUFU.EX2 R3, R3",  # 0x10
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3",
        "@!P1 BRA 0x80",
        "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8]",  # 0x40
        "BRA.U UP0, 0x10",
        "STG.E desc[UR4][R2.64], R5",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3",  # 0x80
        "@!P1 BRA 0x80",
        "BRA 0x40",
        "BRA 0xb0",
    )
    body = [text for address, text in loop if 0x10 <= address <= 0x50 or 0x80 <= address <= 0xA0]
    assert inner_loop(loop) == body


def test_a_loop_without_a_product_is_none():
    assert inner_loop(numbered("FADD R1, R1, R2", "@P1 BRA 0x0", "HMMA R0, R0, R0", "EXIT")) == []
