"""The emulator of bench: small PTX by hand, right, and wrong in the ways that it must notice."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from bench.emulator import Fault
from bench.emulator.machine import Launch, run
from bench.emulator.matrix_unit import multiply_add
from bench.emulator.memory import GlobalMemory
from bench.emulator.program import parse

THREADS = 128
# %r1 is the thread, %rd1 and %rd2 where x and y have a number for each thread of each program.
OPENING = """
    ld.param.b64 %rd1, [x];
    ld.param.b64 %rd2, [y];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, 128, %r1;
    mul.wide.s32 %rd3, %r3, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
    shl.b32 %r4, %r1, 2;
"""


def launch(
    body: str, x: torch.Tensor, programs: int = 1, architecture: int = 90, at_once: int = 64
) -> torch.Tensor:
    """y (programs · THREADS), like x, as these instructions leave it."""
    y = torch.zeros_like(x)
    head = f".entry kernel(\n.param .u64 x,\n.param .u64 y\n)\n.reqntid {THREADS}\n"
    program = parse(f"{head}{{\n{OPENING}{body}\nret;\n}}")
    arguments = {"x": x.data_ptr(), "y": y.data_ptr()}
    shared = 4096
    grid = (programs, 1, 1)
    machines = Launch(program, arguments, grid, GlobalMemory([x, y]), shared, architecture)
    for some in np.split(np.arange(programs), range(at_once, programs, at_once)):
        run(machines, some)
    return y


def numbers(programs: int = 1) -> torch.Tensor:
    return torch.randn(programs * THREADS)


def test_every_thread_of_every_program_computes_its_own():
    x = numbers(3)
    y = launch(
        """
        ld.global.b32 {%r5}, [%rd1 + 0];
        fma.rn.f32 %r6, %r5, 0f40000000, 0f3F800000;
        st.global.b32 [%rd2 + 0], {%r6};
        """,
        x,
        programs=3,
    )
    assert torch.equal(y, 2 * x + 1)


def test_threads_part_ways_and_meet():
    y = launch(
        """
        mov.b32 %r5, 0;
        setp.lt.s32 %p1, %r1, 50;
        @%p1 bra $L_small;
        mov.b32 %r5, 7;
        $L_small:
        bar.sync 0;
        add.s32 %r5, %r5, 1;
        st.global.b32 [%rd2], %r5;
        """.replace("$L_small:", "\n$L_small:\n"),
        torch.zeros(THREADS, dtype=torch.int32),
    )
    assert y.tolist() == [1] * 50 + [8] * 78


def test_programs_leave_a_loop_at_their_own_time():
    y = launch(
        """
        mov.b32 %r5, 0;
$L_again:
        add.s32 %r5, %r5, 1;
        setp.le.s32 %p1, %r5, %r2;
        @%p1 bra $L_again;
        st.global.b32 [%rd2], %r5;
        """,
        torch.zeros(3 * THREADS, dtype=torch.int32),
        programs=3,
    )
    assert y.view(3, -1).float().mean(1).tolist() == [1, 2, 3]


@pytest.mark.parametrize("together", [True, False])
def test_two_programs_that_write_one_word_are_a_fault(together):
    body = """
        ld.param.b64 %rd4, [y];
        setp.eq.s32 %p1, %r1, 0;
        @%p1 st.global.b32 [%rd4], %r1;
    """
    with pytest.raises(Fault, match="two programs write the same word"):
        launch(body, numbers(2), programs=2, at_once=2 if together else 1)


def test_programs_that_part_ways_add_once():
    """Those that a matrix unit serves are then run apart, from the start."""
    y = launch(
        """
        mov.b32 %r5, 0;
        mov.b32 %r6, 0f3F800000;
        wgmma.fence.sync.aligned;
$L_again:
        red.global.add.f32 [%rd2], %r6;
        add.s32 %r5, %r5, 1;
        setp.le.s32 %p1, %r5, %r2;
        @%p1 bra $L_again;
        """,
        torch.zeros(3 * THREADS),
        programs=3,
    )
    assert y.view(3, -1).mean(1).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ("ld.global.b32 {%r5}, [%rd1 + 4];", "out of bounds"),
        ("ld.global.b32 {%r5}, [%rd1 + 2];", "misaligned"),
        ("st.global.b32 [%rd2 + -4], {%r1};", "out of bounds"),
        ("st.shared.b32 [%r4+4000], %r1;", "out of bounds"),
        ("ld.shared.v2.b32 {%r5, %r6}, [%r4+4];", "misaligned"),
    ],
)
def test_accesses_that_miss(access, message):
    with pytest.raises(Fault, match=message) as fault:
        launch(access, numbers())
    assert access.rstrip(";") in fault.value.__notes__


def test_what_could_not_be_compiled():
    """Triton 3.6 leaves a trap of a kernel that wants more tensor memory than there is."""
    with pytest.raises(Fault, match="trap"):
        launch("trap;", numbers())


EXCHANGE = """
    ld.global.b32 {%r5}, [%rd1 + 0];
    st.shared.b32 [%r4], %r5;
    BARRIER
    xor.b32 %r6, %r4, 508;
    ld.shared.b32 %r7, [%r6];
    st.global.b32 [%rd2 + 0], {%r7};
"""


def test_warps_exchange_numbers_behind_a_barrier():
    x = numbers()
    assert torch.equal(launch(EXCHANGE.replace("BARRIER", "bar.sync 0;"), x), x.flip(0))
    with pytest.raises(Fault, match="without a barrier"):
        launch(EXCHANGE.replace("BARRIER", ""), x)


def test_a_barrier_is_needed_before_what_others_read_is_written():
    again = "st.shared.b32 [%r4], %r1;"
    launch(EXCHANGE.replace("BARRIER", "bar.sync 0;") + "bar.sync 0;" + again, numbers())
    with pytest.raises(Fault, match="without a barrier"):
        launch(EXCHANGE.replace("BARRIER", "bar.sync 0;") + again, numbers())


COPY = """
    cp.async.ca.shared.global [%r4 + 0], [%rd1 + 0], 0x4, 0x4;
    cp.async.commit_group;
    WAIT
    ld.shared.b32 %r5, [%r4];
    st.global.b32 [%rd2 + 0], {%r5};
"""


def test_a_copy_is_there_once_it_is_waited_for():
    x = numbers()
    assert torch.equal(launch(COPY.replace("WAIT", "cp.async.wait_group 0;"), x), x)
    assert launch(COPY.replace("WAIT", "cp.async.wait_group 1;"), x).isnan().all()


# Sixteen float16 ones in 64 rows: 32 bytes a row, eight rows every 256 bytes, swizzled by 32 bytes.
PRODUCT = """
    mov.b32 %r5, 1006648320;
    shl.b32 %r6, %r1, 4;
    st.shared.v4.b32 [%r6], {%r5, %r5, %r5, %r5};
    bar.sync 0;
    mov.b32 %r10, 1;
    mov.b32 %r11, 1;
    mov.b32 %r12, 1;
    mov.b32 %r13, 1;
    mov.b64 %rd5, 13835058124276957184;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10,%r11,%r12,%r13}, %rd5, %rd5, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    BEFORE
    wgmma.wait_group.sync.aligned 0;
    st.global.b32 [%rd2 + 0], {%r10};
"""  # noqa: E501


def test_a_product_is_there_once_it_is_waited_for():
    assert (launch(PRODUCT.replace("BEFORE", ""), numbers()) == 16).all()
    early = "st.global.b32 [%rd2 + 0], {%r10};\nret;"
    assert launch(PRODUCT.replace("BEFORE", early), numbers()).isnan().all()


def test_what_a_product_under_way_reads_may_not_be_written():
    with pytest.raises(Fault, match="under way"):
        launch(PRODUCT.replace("BEFORE", "st.shared.b32 [%r4], %r1;"), numbers())


def test_nobody_waits_for_ever():
    with pytest.raises(Fault, match="for ever"):
        launch(
            """
            setp.eq.s32 %p1, %r1, 0;
            @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;
            bar.sync 0;
            mov.b32 %r5, 0;
$L_wait:
            mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0;
            @!%p2 bra $L_wait;
            """,
            numbers(),
            architecture=100,
        )


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_a_matrix_unit_cuts_off(architecture):
    def plus_one(*terms: float) -> float:
        a = np.zeros((1, 16))
        a[0, : len(terms)] = terms
        one = np.ones((1, 1), np.float32)
        return multiply_add(a, np.ones((1, 16)), one, architecture).item()

    # Beside 1, a float32 has steps of 2^-23.
    assert plus_one(*[2.0**-26] * 16) == 1  # 2^-22 together, but each is lost
    assert plus_one(*[2.0**-22] * 16) == 1 + 2**-18
    assert plus_one(3 * 2.0**-24) == 1 + 2**-23  # to the nearest it would be 2^-22
    assert plus_one(-(2.0**-24)) == 1 - 2**-24
    assert plus_one(2.0**40, -(2.0**40)) == 0
    assert np.isnan(plus_one(np.nan)) and plus_one(np.inf) == np.inf
