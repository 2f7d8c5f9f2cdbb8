"""Executes on a CPU the PTX that nvcc and Triton make of the kernels: their instructions, not another compiler's.

What it cannot see: ptxas' own work (registers, spills, the order of SASS), the scopes of fences, data races on global
memory (those on shared memory it does see), and times: it counts instructions and accesses, and estimates one chain of
them. Memory is otherwise sequentially consistent. A message between blocks orders its own bytes and nothing that its
sender did before.

    python -m tests.ptx check [quick] [WORD...]    kernels against fp64, of the cases whose names hold every word
    python -m tests.ptx counts                     instructions, wavefronts, sectors, bytes; the settler's chain
    python -m tests.ptx faults [WORD...]           faults planted in csrc/cuda, each of which some case must notice

parser.py reads PTX; segments.py makes Python functions of straight-line code, over arrays of 32 lanes (arithmetic.py);
machine.py runs blocks and clusters, warps (warp.py, accesses.py, copies.py) and asynchronous copies in an order drawn
from a seed; races.py keeps a clock for each thread; launches.py catches what the backends launch; cases.py, sweep.py
and faults.py say what is run; stats.py and counters.py count.

Shared memory starts as NaN. Findings, which end no launch: bytes read that a copy is still writing or written that one
still reads, bulk stores of writes without a proxy fence by their thread, lanes that have ended and are waited for,
races. Faults, which do: anything out of bounds or misaligned, too many arrivals or bytes at a barrier, a deadlock.
"""
