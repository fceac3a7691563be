"""The time that each limit of a card implies for a kernel, from what its machine code holds.

Four limits: the matrix unit, exponentials, instructions issued, memory. A kernel cannot be faster
than the largest of the four times, and without overlap takes their sum.
"""

from typing import NamedTuple

from softvq.kernels import tiles

# Per multiprocessor and clock, from sm_80 to sm_120 alike: 4 schedulers of 32 threads, and 16
# results of base-2 exponential (NVIDIA, CUDA C++ Programming Guide, "Arithmetic Instructions").
ISSUE_PER_CLOCK = 128
EXP_PER_CLOCK = 16


class Card(NamedTuple):
    """What a card can do at best, per second."""

    name: str
    architecture: int  # 90: sm_90
    operations: float  # dense floating-point operations of the matrix unit, 16-bit operands
    exponentials: float
    instructions: float  # of single threads
    bytes: float


def _card(name: str, architecture: int, processors: int, hertz: float, **sheet: float) -> Card:
    """A card whose issue and exponential rates follow from its clock."""
    clocks = processors * hertz
    rates = {"exponentials": EXP_PER_CLOCK * clocks, "instructions": ISSUE_PER_CLOCK * clocks}
    return Card(name, architecture, **rates, **sheet)


# Looked up on 2026-11-21, GeForce on 2026-11-27. Data sheets print the matrix unit's rate with
# sparsity, twice the dense one. The clock is the one behind the sheet's float32 rate, 2 · cores ·
# clock: 19.5e12 for A100 (6912 cores), 67e12 for H100 and H200 (16896), 75e12 for B200 (18944).
_CARDS = (
    # NVIDIA A100 data sheet, 80GB SXM: BF16 312 TFLOPS, 2,039 GB/s
    _card(
        *("A100", 80, 108, 1.410e9),
        operations=312e12,
        bytes=2.039e12,
    ),
    # NVIDIA GA102 whitepaper: BF16 with FP32 accumulate 71 TFLOPS, 936 GB/s
    _card(
        *("RTX 3090", 86, 82, 1.695e9),
        operations=71e12,
        bytes=0.936e12,
    ),
    # NVIDIA Ada whitepaper: BF16 with FP32 accumulate 165.2 TFLOPS, 1,008 GB/s
    _card(
        *("RTX 4090", 89, 128, 2.520e9),
        operations=165.2e12,
        bytes=1.008e12,
    ),
    # NVIDIA H100 data sheet, SXM: BF16 1,979 TFLOPS with sparsity, 3.35 TB/s
    _card(
        *("H100", 90, 132, 1.980e9),
        operations=989.5e12,
        bytes=3.35e12,
    ),
    # NVIDIA H200 data sheet, SXM: BF16 1,979 TFLOPS with sparsity, 4.8 TB/s
    _card(
        *("H200", 90, 132, 1.980e9),
        operations=989.5e12,
        bytes=4.8e12,
    ),
    # NVIDIA HGX B200 data sheet, one GPU: BF16 4.5 PFLOPS with sparsity, up to 8 TB/s
    _card(
        *("B200", 100, 148, 1.980e9),
        operations=2250e12,
        bytes=8.0e12,
    ),
    # NVIDIA RTX Blackwell whitepaper: BF16, FP32 accumulate 209.5 TFLOPS, 1,792 GB/s
    _card(
        *("RTX 5090", 120, 170, 2.407e9),
        operations=209.5e12,
        bytes=1.792e12,
    ),
)
CARDS = {card.name: card for card in _CARDS}


class Work(NamedTuple):
    """What a kernel does."""

    pairs: float  # N·K, padding included
    operations: float  # of the matrix unit per pair, in 16-bit operations
    exponentials: float  # per pair
    instructions: float  # of single threads per pair
    bytes: float  # read and written in all


class Times(NamedTuple):
    """Seconds that each limit alone would take."""

    tensor: float
    exp: float
    issue: float
    memory: float

    @property
    def bound(self) -> str:
        """The limit that decides."""
        return self._fields[self.index(max(self))]


def times(card: Card, work: Work) -> Times:
    """The four times of a kernel on a card."""
    return Times(
        work.pairs * work.operations / card.operations,
        work.pairs * work.exponentials / card.exponentials,
        work.pairs * work.instructions / card.instructions,
        work.bytes / card.bytes,
    )


class Products(NamedTuple):
    """Matrix products of one arithmetic, each in units of one with 16-bit operands."""

    scores: int  # three where both operands are split
    others: int
    nearest: int


PRODUCTS = {
    "bf16": Products(1, 1, 1),
    "fp16": Products(1, 1, 1),
    "bf16/fp32": Products(2, 1, 3),
    "fp16/fp32": Products(2, 1, 3),
    "fp32 highest": Products(3, 3, 3),
    "fp32 high": Products(3, 1, 3),
    "fp32 medium": Products(1, 1, 1),
}
# Products beside the scores, and exponentials, per kernel; the usage sweep is a code_sweep
# without them.
OTHERS = {"forward": 1, "row_gradients": 2, "code_sweep": 3, "usage": 0}
# Those of them that are the output, of which a launch for one part has only that.
OUTPUTS = {"forward": 1, "row_gradients": 1, "code_sweep": 2, "usage": 0}


def kernel_work(
    kernel: str,
    inputs: str,
    rows: int,
    codes: int,
    dim: int,
    instructions: float,
    parts: int = 1,
) -> Work:
    """The work of a kernel of `bench compile` over `rows` latents and `codes` codes.

    `kernel` and `inputs` are that table's words ("usage": code_sweep in the call "usage"),
    `instructions` its instructions per pair, `dim` is padded as the kernels pad it. With `parts` it
    is the work of one launch of so many. Bytes are those of the rows' and codes' whole vectors,
    once each: the codebook stays in the cache.
    """
    padded = tiles.padded_dim(dim)
    of = PRODUCTS[inputs]
    products = of.nearest
    if kernel != "nearest":
        others = OTHERS[kernel] - OUTPUTS[kernel] * (1 - 1 / parts)
        products = of.scores + others * of.others
    size = 4 if inputs.startswith("fp32") else 2
    # Row vectors: z and q; z, q, dq and dz; z and dq; z. A float32 sum for every code.
    vectors = {"forward": 2, "row_gradients": 4, "code_sweep": 2, "usage": 1, "nearest": 1}[kernel]
    sums = 4 * codes * dim if kernel == "code_sweep" else 0
    return Work(
        pairs=rows * codes,
        operations=2 * padded * products,
        exponentials=0 if kernel == "nearest" else 1,
        instructions=instructions,
        bytes=size * dim * (vectors * rows + codes) + sums,
    )
