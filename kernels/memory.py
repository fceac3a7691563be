"""How the Triton kernels read and write their matrices."""

import triton
import triton.language as tl

from softvq.kernels.primitives import round_to


@triton.jit
def tile_start(
    first: tl.tensor, rows: tl.tensor, ROWS: tl.constexpr, WHOLE_TILES: tl.constexpr
) -> tl.tensor:
    """Where the tile of rows begins that is due at row `first`, in 64 bits.

    With WHOLE_TILES, where there are at least ROWS rows, the last one begins early enough to be
    whole, so that no load needs a mask. It then repeats rows of the tile before, which stores them:
    another place in a tile can mean other last bits, and two programs would race for the last word.
    """
    first = first.to(tl.int64)
    if WHOLE_TILES:
        first = tl.minimum(first, rows - ROWS)
    return first


@triton.jit
def load_rows(
    pointer: tl.tensor,
    stride: tl.tensor,
    rows_left: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    LAST: tl.constexpr = False,
) -> tl.tensor:
    """Rows 0 … ROWS−1 of a matrix with unit column stride; zero past `rows_left` and past DIM.

    LAST marks the last use of rows that were loaded before: they may leave the cache. It also keeps
    the compiler from holding them, or their addresses, in registers meanwhile.
    """
    policy: tl.constexpr = "evict_first" if LAST else ""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PAD)
    mask = (rows < rows_left)[:, None]
    if PAD > DIM:
        mask = mask & (columns < DIM)[None, :]
    # [ROWS, PAD]; 64 bits, for a view may have any stride
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy=policy)


@triton.jit
def store_rows(
    pointer: tl.tensor,
    stride: tl.tensor,
    repeated: tl.tensor,
    rows_left: tl.tensor,
    x: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> None:
    """The counterpart of `load_rows`, without the first `repeated` rows."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PAD)
    mask = ((rows >= repeated) & (rows < rows_left))[:, None]
    if PAD > DIM:
        mask = mask & (columns < DIM)[None, :]
    x = round_to(x, pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], x, mask=mask)


@triton.jit
def add_rows(
    pointer: tl.tensor, stride: tl.tensor, x: tl.tensor, ROWS: tl.constexpr, PAD: tl.constexpr
) -> None:
    """Add x [ROWS, PAD] to a float32 matrix, a few columns at a time.

    The memory adds, which takes few registers, and in order, for nobody else adds to this.
    """
    if PAD > 16:
        HALF: tl.constexpr = PAD // 2
        left, right = x.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        add_rows(pointer, stride, left, ROWS, HALF)
        add_rows(pointer + HALF, stride, right, ROWS, HALF)
    else:
        offsets = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, PAD)[None, :]
        tl.atomic_add(pointer + offsets, x, sem="relaxed")


@triton.jit
def load_columns(
    pointer: tl.tensor,
    offsets: tl.tensor,
    rows_left: tl.tensor,
    first: tl.tensor,
    centre_pointer: tl.tensor | None,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """x − centre in columns first … first + WIDTH − 1 of the rows that begin at `offsets`.

    In float32; x is zero past `rows_left` and past DIM. For sums over a row that must not hold all
    of it in registers.
    """
    # [ROWS, WIDTH]
    rows = tl.arange(0, offsets.shape[0])[:, None]
    columns = (first + tl.arange(0, WIDTH))[None, :]
    mask = (rows < rows_left) & (columns < DIM)
    x = tl.load(pointer + offsets + columns, mask=mask, other=0.0).to(tl.float32)
    if centre_pointer is not None:
        x -= tl.load(centre_pointer + columns)
    return x


@triton.jit
def row_dots(
    a_pointer: tl.tensor,
    a_stride: tl.tensor,
    b_pointer: tl.tensor,
    b_stride: tl.tensor,
    centre_pointer: tl.tensor | None,
    rows_left: tl.tensor,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> tl.tensor:
    """Σ_d a·(b − centre) of each row, [ROWS], in float32."""
    WIDTH: tl.constexpr = min(PAD, 64)
    dots = tl.zeros([ROWS], tl.float32)
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None]
    for first in range(0, PAD, WIDTH):
        # [ROWS, WIDTH]
        a = load_columns(a_pointer, rows * a_stride, rows_left, first, None, DIM, WIDTH)
        b = load_columns(b_pointer, rows * b_stride, rows_left, first, centre_pointer, DIM, WIDTH)
        dots += tl.sum(a * b, 1)
    return dots


@triton.jit
def load_centre(pointer: tl.tensor, PAD: tl.constexpr, LAST: tl.constexpr = False) -> tl.tensor:
    """The codebook's centre, [1, PAD]. LAST as in `load_rows`: nobody holds it meanwhile."""
    policy: tl.constexpr = "evict_first" if LAST else ""
    return tl.load(pointer + tl.arange(0, PAD), eviction_policy=policy)[None, :]


@triton.jit
def squared_distances(
    z_pointer: tl.tensor,
    row_stride: tl.tensor,
    rows_left: tl.tensor,
    index: tl.tensor,
    high_pointer: tl.tensor,
    low_pointer: tl.tensor | None,
    centre_pointer: tl.tensor | None,
    unit: tl.tensor,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> tl.tensor:
    """‖z_n − c_index‖² of each row and some prepared codes: index and result [ROWS, some].

    From the differences: ‖z‖² − 2z·c + ‖c‖² would cancel. All codes of a row at a time, for what
    this takes is the wait for them.
    """
    ROWS: tl.constexpr = index.shape[0]
    # As many columns as take no more registers than the loop before.
    WIDTH: tl.constexpr = min(PAD, 16 if low_pointer is not None else 64 if PAD == 128 else 32)
    offsets = tl.arange(0, ROWS).to(tl.int64)[:, None] * row_stride
    distances = tl.zeros(index.shape, tl.float32)
    for first in range(0, PAD, WIDTH):
        # [ROWS, WIDTH]
        z = load_columns(z_pointer, offsets, rows_left, first, centre_pointer, DIM, WIDTH)
        # [ROWS, some, WIDTH]
        columns = (first + tl.arange(0, WIDTH))[None, None, :]
        code = tl.load(high_pointer + index[:, :, None] * PAD + columns).to(tl.float32)
        if low_pointer is not None:
            code += tl.load(low_pointer + index[:, :, None] * PAD + columns).to(tl.float32)
        difference = z[:, None, :] - code * unit
        distances += tl.sum(difference * difference, 2)
    return distances


@triton.jit
def store_with_terms(
    pointer: tl.tensor,
    stride: tl.tensor,
    repeated: tl.tensor,
    rows_left: tl.tensor,
    x: tl.tensor,
    a_factor: tl.tensor,
    a_pointer: tl.tensor,
    a_stride: tl.tensor,
    b_factor: tl.tensor,
    b_pointer: tl.tensor | None,
    b_stride: tl.tensor,
    centre_pointer: tl.tensor | None,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    WITH_A: tl.constexpr,
    WITH_B: tl.constexpr,
    ADD: tl.constexpr = False,
) -> None:
    """`store_rows`, or with ADD `add_rows`, of x + a_factor·(a − centre) + b_factor·(b − centre).

    Each term only if it is WITH: matrices like x, a and b in memory; the factors [ROWS].

    Half the columns after the other, and one matrix: there are no registers for all at a time.
    """
    if PAD > 64:
        HALF: tl.constexpr = PAD // 2
        left, right = x.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
        store_with_terms(
            *(pointer, stride, repeated, rows_left, left, a_factor, a_pointer, a_stride),
            *(b_factor, b_pointer, b_stride, centre_pointer, ROWS, DIM, HALF, WITH_A, WITH_B, ADD),
        )
        tl.debug_barrier()
        if WITH_A:
            a_pointer += HALF
        if WITH_B:
            b_pointer += HALF
        if centre_pointer is not None:
            centre_pointer += HALF
        store_with_terms(
            *(pointer + HALF, stride, repeated, rows_left, right, a_factor, a_pointer),
            *(a_stride, b_factor, b_pointer, b_stride, centre_pointer),
            *(ROWS, DIM - HALF, HALF, WITH_A, WITH_B, ADD),
        )
    else:
        if WITH_A:
            # [ROWS, PAD]
            a = load_rows(a_pointer, a_stride, rows_left, ROWS, DIM, PAD, LAST=True)
            a = a.to(tl.float32)
            if centre_pointer is not None:
                a -= load_centre(centre_pointer, PAD, LAST=True)
            x += a_factor[:, None] * a
        if WITH_B:
            tl.debug_barrier()
            b = load_rows(b_pointer, b_stride, rows_left, ROWS, DIM, PAD, LAST=True)
            b = b.to(tl.float32)
            if centre_pointer is not None:
                b -= load_centre(centre_pointer, PAD, LAST=True)
            x += b_factor[:, None] * b
        if ADD:
            add_rows(pointer, stride, x, ROWS, PAD)
        else:
            store_rows(pointer, stride, repeated, rows_left, x, ROWS, DIM, PAD)
