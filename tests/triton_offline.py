"""Compile the Triton kernels for GPUs that are not here, and print what the compilers say of each, one JSON line each.

Run by test_triton.py in a process of its own: one process cannot both interpret and compile. Usage:
python triton_offline.py {plain|variants|divergences} TARGET..., with targets such as sm_90 and gfx942.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from grpo_kernels.backends.contract import Rows
from grpo_kernels.backends.triton import forward, gradient, launch, one_pass, pairs, sums
from grpo_kernels.backends.triton.blocks import blocks_for
from grpo_kernels.objectives.divergence import KINDS
from grpo_kernels.objectives.surrogates import BUILT_IN

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
POINTERS = {"token_ids": "i64", "live": "i1", "masked_in": "i1", "flags": "u8", "chunk_records": "fp64", "sums": "fp64"}
STRIDES = tuple(f"{of}{kind}_stride" for of in ("", "teacher_", "out_") for kind in ("batch", "row"))
LENGTHS = ("length", "vocab", "parts", "blocks", "spans", "rows", "count", "chunks", "sequences")
OF_LOGITS = ("logits", "teacher_logits", "out", "gradient")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TEMPERATURES = ("temperatures", "teacher_temperatures")
"""Left out of a launch where rows have no temperature of their own."""
GRPO = {"SURROGATE": 2, "KL_ESTIMATOR": 3, "KL_GRADIENT": 0, "KL_RATIO_WEIGHTED": 0, "ROLLOUT_SCHEME": 0}
GRPO |= {"ROLLOUT_KL_ESTIMATOR": 0, "ROLLOUT_KL_GRADIENT": 0, "ROLLOUT_KL_RATIO_WEIGHTED": 0}


def target_of(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


def source(kernel: Any, dtype: torch.dtype, absent: tuple[str, ...], constants: dict[str, Any]) -> ASTSource:
    """As a launch describes it; ``absent`` are tensors left out."""
    real = "fp64" if dtype == torch.float64 else "fp32"
    signature, constexprs, attributes = {}, {name: None for name in absent if name in kernel.arg_names} | constants, {}
    for i, name in enumerate(kernel.arg_names):
        aligned = [["tt.divisibility", 16]]
        if name in constexprs:
            signature[name] = "constexpr"
        elif name in STRIDES:
            signature[name] = "i64" if "batch" in name else "i32"
        elif name in LENGTHS:
            signature[name] = "i32"
        else:
            element = NAMES[dtype] if name in OF_LOGITS else POINTERS.get(name, real)
            signature[name] = "*" + element
            attributes[(i,)] = aligned
    return ASTSource(kernel, signature, constexprs, attributes)


def report(
    kernel: Any, dtype: torch.dtype, vocab: int, target: str, absent: tuple[str, ...] = (), **constants: Any
) -> None:
    warps = constants.pop("warps", 4) * 32 // target_of(target).warp_size
    what = source(kernel, dtype, absent, constants)
    line = {"kernel": kernel.__name__, "dtype": NAMES[dtype], "vocab": vocab, "target": target, "absent": absent}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    try:
        compiled = triton.compile(what, target=target_of(target), options=options)
    except RuntimeError as error:  # the assembler of AMD's compiler, on what that has written
        if "assembler rejected" not in str(error):
            raise
        line["refused"] = str(error)
    else:
        line |= {"constants": constants, **measure(compiled)}
    print(json.dumps(line), flush=True)


def measure(compiled: Any) -> dict[str, Any]:
    if "amdgcn" in compiled.asm:
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        return {"spills": sum(map(int, spills)), "sums_of": sums_of(compiled.asm["ttgir"])}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx, numbers = compiled.asm["ptx"], dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "wide_loads": len(re.findall(r"ld\.global\S*v4\.b32|ld\.global\S*v2\.b64|cp\.async\.cg\S* .*0x10", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*v4\.b32|st\.global\S*v2\.b64", ptx)),
        "pipelined": len(re.findall(r"cp\.async\.cg", ptx)),
        "of_two_bytes": len(re.findall(r"(?:ld|st)\.global\S*\.b16", ptx)),
        "sums_of": sums_of(compiled.asm["ttgir"]),
    }


def sums_of(ttgir: str) -> list[int]:
    """Of how many numbers at a time the compiler forms sums: the order is its own where these are more than two."""
    found = re.findall(r'"tt\.reduce"\(.*?<\{axis = (\d+).*?\(\{(.*?)\}\) : \(tensor<([x\d]+)xf', ttgir, re.S)
    return sorted({int(shape.split("x")[int(axis)]) for axis, body, shape in found if "arith.addf" in body})


def row_constants(
    dtype: torch.dtype, vocab: int, target: str, softcap: bool = False, shift: int = 0, one_pass: bool = False
) -> dict[str, Any]:
    """Of a launch for contiguous rows that begin ``shift`` elements off 16 bytes."""
    constants_of = launch.one_pass_constants if one_pass else launch.row_constants
    return constants_of(rows_of(dtype, vocab, softcap, shift), blocks_for(vocab, dtype, softcap, target))


def rows_of(dtype: torch.dtype, vocab: int, softcap: bool = False, shift: int = 0) -> Rows:
    logits = torch.empty(shift + 2 * 3 * vocab, dtype=dtype, device="meta")[shift:].view(2, 3, vocab)
    none = torch.empty(0)
    return Rows(logits, none, none, none, softcap)


UNALIGNED = [(32008, 0), (32004, 0), (32002, 0), (32001, 0), (32000, 1)]
"""Vocabularies and shifts whose rows begin, in bf16, on 16, 8, 4, 2 and 2 bytes."""


def plain(target: str) -> None:
    """Every kernel, dtype and size class with the settings of GRPO with KL; then rows at other addresses, and rows with
    a temperature each."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for vocab in (1000, 8192, 32000, 151936) if dtype in (torch.bfloat16, torch.float32) else (151936,):
            _kernels_of_rows(dtype, vocab, target)
        rescale = launch.vector_constants(torch.empty(1, 1, 32000, dtype=dtype, device="meta"))
        report(gradient.rescale_kernel, dtype, 32000, target, BLOCK=4096, warps=8, **rescale)
    for dtype in (torch.float32, torch.float64):
        report(sums.chunk_sums_kernel, dtype, 1, target, KL_ESTIMATOR=3, CHUNK=sums.TOKENS_PER_CHUNK)
        report(sums.merge_chunks_kernel, dtype, 1, target, AT_ONCE=sums.CHUNKS_AT_ONCE)
    for vocab, shift in UNALIGNED:
        _kernels_of_rows(torch.bfloat16, vocab, target, shift)
    for vocab in (32000, 151936):
        _kernels_of_rows(torch.bfloat16, vocab, target, per_row=True)


def _kernels_of_rows(dtype: torch.dtype, vocab: int, target: str, shift: int = 0, per_row: bool = False) -> None:
    blocks, row = blocks_for(vocab, dtype, target=target), row_constants(dtype, vocab, target, shift=shift)
    absent = () if per_row else TEMPERATURES
    report(forward.log_probs_kernel, dtype, vocab, target, absent, **row)
    held = row_constants(dtype, vocab, target, shift=shift, one_pass=True)
    nothing = (*absent, "entropy_weight", "rollout_kl_weight")
    report(one_pass.one_pass_kernel, dtype, vocab, target, nothing, **held, **GRPO)
    size = {name: value for name, value in row.items() if name not in ("SPAN", "SWEEP", "STAGES")}
    report(gradient.gradient_kernel, dtype, vocab, target, (*absent, "grad_entropy"), **size)
    if vocab > blocks.span:
        report(forward.span_sums_kernel, dtype, vocab, target, absent, **row)
        report(forward.merge_spans_kernel, dtype, vocab, target, absent, **row)


def variants(target: str) -> None:
    """Every surrogate, KL form and flag at one size, held and walked twice."""
    forms = [(0, 0, 0), *((k, 0, w) for k in (1, 2, 3, 4) for w in (0, 1)), *((3, g, 0) for g in (1, 2, 3))]
    clip = 2
    chosen = [(clip, *form, 0) for form in forms] + [(clip, 3, 0, 0, scheme) for scheme in (1, 2, 3)]
    for surrogate in (cls.kernel_id for cls in BUILT_IN):
        if surrogate not in (None, clip):
            chosen += [(surrogate, 0, 0, 0, 0), (surrogate, 3, 0, 1, 1)]
    for choices in chosen:
        surrogate, estimator, _, weighted, scheme = choices
        spec = GRPO | dict(zip(GRPO, choices, strict=False))
        absent = ("old",) if surrogate == 0 else ()
        absent += () if estimator else ("ref", "kl_weight")
        absent += () if scheme else ("rollout",)
        if weighted:  # a KL to the sampler as well
            spec |= {"ROLLOUT_KL_ESTIMATOR": 2, "ROLLOUT_KL_RATIO_WEIGHTED": 1}
        else:
            absent += ("rollout_kl_weight",)
        report(one_pass.token_terms_kernel, torch.float32, 32000, target, absent, **spec, BLOCK=256)
        _one_pass(target, 32000, absent + (() if weighted else ("entropy_weight",)), False, spec)
    for vocab in (32000, 151936):
        _one_pass(target, vocab, ("rollout_kl_weight",), True, GRPO)


def _one_pass(target: str, vocab: int, absent: tuple[str, ...], softcap: bool, spec: dict[str, int]) -> None:
    row = row_constants(torch.bfloat16, vocab, target, softcap, one_pass=True)
    report(one_pass.one_pass_kernel, torch.bfloat16, vocab, target, (*TEMPERATURES, *absent), **row, **spec)


def divergences(target: str) -> None:
    """Every kind at one size; then other sizes, dtypes and addresses, rows with a softcap and with temperatures."""
    for kind in KINDS:
        _kernels_of_pairs(target, kind)
        absent = (*TEMPERATURES, "grad_log_prob", "grad_entropy")
        _gradient_of_pairs(target, kind, absent, rows_of(torch.bfloat16, 151936))
    for dtype, vocab in ((torch.bfloat16, 1000), (torch.float32, 32000), (torch.float64, 32000)):
        _kernels_of_pairs(target, "mixed_kl", dtype, vocab)
    for vocab, shift in UNALIGNED[2:4]:
        _kernels_of_pairs(target, "reverse_kl", vocab=vocab, shift=shift)
    _kernels_of_pairs(target, "reverse_kl", softcap=True, absent=())


def _kernels_of_pairs(
    target: str,
    kind: str,
    dtype: torch.dtype = torch.bfloat16,
    vocab: int = 151936,
    shift: int = 0,
    softcap: bool = False,
    absent: tuple[str, ...] = TEMPERATURES,
) -> None:
    rows = rows_of(dtype, vocab, softcap, shift)
    constants = launch.pair_constants(rows, rows) | {"KIND": list(KINDS).index(kind)}
    report(pairs.divergence_kernel, dtype, vocab, target, absent, **constants)
    _gradient_of_pairs(target, kind, (*absent, "grad_entropy"), rows)


def _gradient_of_pairs(target: str, kind: str, absent: tuple[str, ...], rows: Rows) -> None:
    constants = launch.pair_constants(rows, rows, rows.logits) | {"KIND": list(KINDS).index(kind)}
    del constants["SWEEP"], constants["STAGES"]
    report(pairs.divergence_gradient_kernel, rows.logits.dtype, rows.vocab, target, absent, **constants)


def keys(target: str) -> None:
    """What a launch's kernel is looked up by, for several lengths of (B, T+1, V) logits and several numbers."""
    backend = make_backend(target_of(target))
    of_rows = (forward.log_probs_kernel, gradient.gradient_kernel, one_pass.one_pass_kernel)
    for kernel in (*of_rows, pairs.divergence_kernel, pairs.divergence_gradient_kernel):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        for vocab in (151936, 151944, 50257):
            found = set()
            for length in (1, 5, 16, 512, 20_000, 70_000):
                logits = torch.empty(2, length + 1, vocab, dtype=torch.bfloat16, device="meta")
                constants = launch.vector_constants(logits)
                arguments = [constants.get(name, _example(name, length, vocab)) for name in kernel.arg_names]
                found.add(str(bind(*arguments)[1:]))
            print(json.dumps({"kernel": kernel.__name__, "vocab": vocab, "keys": sorted(found)}), flush=True)


def _example(name: str, length: int, vocab: int) -> Any:
    sizes = {"length": length, "vocab": vocab, "parts": length % 7 + 1, "blocks": 3}
    strides = {"batch_stride": (length + 1) * vocab, "row_stride": vocab}
    if name in sizes:
        return sizes[name]
    if name in STRIDES:
        return strides[name.removeprefix("out_").removeprefix("teacher_")]
    if name.isupper():
        return 1
    dtype = {"token_ids": torch.int64, "live": torch.bool, "flags": torch.uint8}.get(name, torch.float32)
    return torch.empty(64, dtype=torch.bfloat16 if name in OF_LOGITS else dtype)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        {"plain": plain, "variants": variants, "divergences": divergences, "keys": keys}[sys.argv[1]](name)
