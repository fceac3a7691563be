"""A CPU runs what a GPU would: the PTX of compiled kernels, thread by thread.

Triton's interpreter runs the kernels' source. This runs what the compiler made of it: for sm_80,
and for sm_86, sm_89 and sm_120, which are like it (mma.sync), sm_90 (wgmma) and sm_100 (tcgen05).
Layouts, swizzles, masks, pipelines and barriers are what was compiled. Where hardware may take
liberties, this takes all of them:

- A matrix unit cuts terms off and rounds towards zero (`matrix_unit.py`); exponentials and
  approximate divisions err by as much as PTX allows.
- What is asynchronous happens as late as it may: copies land, and products are computed, only when
  they are waited for, and what they are to overwrite is poisoned at once.
- An access out of bounds, misaligned, or not kept apart from another warp's by a barrier is a
  Fault, and so are two programs that write one word, and whatever PTX does not define.

It says nothing of speed, of registers, or of ptxas, which turns PTX into machine code (`bench
compile` looks at that).
"""

from bench.emulator.launch import emulated as emulated
from bench.emulator.memory import Fault as Fault
