"""Does it bite? Faults planted in a copy of csrc/cuda, each of which some case must notice."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from . import launches

KERNEL, CONSUMERS, SETTLERS, MOVES, PORT = "row_kernel.h", "consumer.h", "settler.h", "loading.h", "port.h"


class Fault(NamedTuple):
    file: str
    old: str
    new: str
    words: str
    """Of the names of the cases that are run."""


FAULTS = {
    "no proxy fence before a bulk store": Fault(CONSUMERS, "port::fence_for_bulk();\n      signal", "signal", "fused"),
    "lane 0 signals before its warp is done": Fault(
        CONSUMERS, "port::sync_warp();\n    if (first_lane_) barrier", "if (first_lane_) barrier", "fused"
    ),
    "tiles are given back too early": Fault(
        MOVES, "bulk_wait_read<kStoresInFlight>", "bulk_wait_read<kStoresInFlight + 1>", "backward"
    ),
    "sums are overwritten before they are read": Fault(
        CONSUMERS, "if (turn > 0) shared_.settled", "if (false) shared_.settled", "log_probs"
    ),
    "slots are overwritten before they are read": Fault(
        SETTLERS, "if (turn > 0) shared_.drained", "if (false) shared_.drained", "fused"
    ),
    "a warp is not together when it has read": Fault(CONSUMERS, "port::sync_warp();  // what its lanes", "//", "skew1"),
    "a message's words in another order": Fault(PORT, "{%1, %2, %3, %4}", "{%2, %1, %3, %4}", "fused"),
    "a message that names its slot as its barrier": Fault(PORT, "%3, %4}, [%5]", "%3, %4}, [%0]", "fused"),
    "too few bytes are announced": Fault(
        MOVES, "filled.expect(int(end - first))", "filled.expect(int(end - first) - 16)", "log_probs"
    ),
    "a bulk load of the row itself, not of whole vectors": Fault(MOVES, "(from) & ~intptr_t(15)", "(from)", "skew1"),
    "no cluster barrier at the start": Fault(KERNEL, "port::sync_cluster();  // nobody", ";  // nobody", "fused"),
    "nobody waits for the sums of other blocks": Fault(PORT, "{ wait_until<true>(parity); }", "{}", "fused"),
    "consumers do not wait for the loader": Fault(
        CONSUMERS, "shared_.filled[at.place].wait(at.lap);\n      sweep_sums", "sweep_sums", "log_probs"
    ),
    "a wrong parity": Fault(MOVES, "wait(cursor.lap ^ 1)", "wait(cursor.lap)", "log_probs"),
    "the tail of a tile is not copied": Fault(
        MOVES, "advanced(from, after), edges.tail, lane", "from, 0, lane", "backward skew1"
    ),
    "zeros are not fenced": Fault(
        KERNEL, "port::fence_for_bulk();\n  port::sync_block", "port::sync_block", "backward"
    ),
}


def places(name: str) -> int:
    """How often the planted fault's text occurs in its file: once, or the code has changed."""
    fault = FAULTS[name]
    return (launches.ROOT / "csrc" / "cuda" / fault.file).read_text().count(fault.old)


def noticed(name: str) -> tuple[bool, str]:
    """Whether a case that runs over the planted fault fails, and what it said."""
    fault = FAULTS[name]
    with tempfile.TemporaryDirectory(prefix="grpo_ptx_") as folder:
        sources = Path(folder, "csrc")
        shutil.copytree(launches.ROOT / "csrc", sources)
        path = sources / "cuda" / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new, 1))
        command = [sys.executable, "-m", "tests.ptx", "check", "cuda", "races", *fault.words.split()]
        command += ["--first", "--sources", str(sources)]
        result = subprocess.run(command, cwd=launches.ROOT, capture_output=True, text=True)
    said = [line.strip() for line in result.stdout.splitlines() if line.startswith("     ")]
    said = [line for line in said if not re.match(r"\w+Error ", line)]  # the executor's own
    return (True, said[0]) if said else (False, (result.stderr or result.stdout)[-2000:])


def plant(words: list[str]) -> int:
    """Plants and prints those whose names hold every word; how many are not noticed."""
    chosen, unseen = [name for name in FAULTS if all(word in name for word in words)], 0
    for name in chosen:
        seen, said = noticed(name)
        unseen += not seen
        print(f"{'noticed' if seen else 'UNSEEN '} {name}: {said[:230]}", flush=True)
    print(f"{len(chosen)} planted faults, {unseen} unseen")
    return unseen
