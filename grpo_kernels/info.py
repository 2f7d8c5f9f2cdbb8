"""What is installed and usable here: paste it into a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from . import __version__, backends
from .backends import blocks, cpu, cuda, native
from .calls.head import cpu_instructions
from .objectives.config import LossConfig
from .objectives.metrics import REPORTED
from .objectives.surrogates import BUILT_IN
from .verification import records

PACKAGES = ("torch", "triton", "transformers", "numpy", "trl", "liger-kernel")


def collect() -> dict[str, Any]:
    """Return versions, devices, and each backend's state: "usable" or the reason why not."""
    devices = [f"cpu ({records.device_kind('cpu')})"] + [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    return {
        "grpo_kernels": __version__,
        "folder": str(native.FOLDER.parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},  # with its build
        "devices": devices,
        "threads": torch.get_num_threads(),
        "backends": {name: _state(name) for name in backends.names()},
        "switched_to": backends.switched(),
        "verified": records.read(),
        "cpu_library": _cpu_library(),
        "cuda_library": _cuda_library(),
        "cpu_memory": {"keeps": blocks.keeps(), "kept_bytes": blocks.count().kept},
        "cpu_bf16_instructions": list(cpu_instructions(torch.bfloat16)),
        "cpu_fp16_instructions": list(cpu_instructions(torch.float16)),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _state(name: str) -> str:
    """Return whether a backend is usable on some device here, or why not on the best of them."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    reasons = {}
    for by_name in (False, True):
        requests = [backends.Request(torch.device(device), by_name=by_name) for device in devices]
        reasons[by_name] = [backends.get(name).unsupported(request) for request in requests]
    if None in reasons[False]:
        return "usable"
    return f"{'usable by name; ' if None in reasons[True] else ''}{reasons[False][0]}"


def _cuda_library() -> dict[str, Any]:
    """Return path and build; and on each NVIDIA GPU what the library found: capability, clusters that run at once,
    driver."""
    path = cuda.library_path()
    found: dict[str, Any] = {"path": str(path), "build": native.build_record(path) or None, "devices": {}}
    found["triton_below_bytes"] = cuda.SHORT_ROW_BYTES
    try:
        cuda.library()
        for i in range(torch.cuda.device_count()):
            offered = cuda.device(i)
            clusters = dict(zip(cuda.CLUSTERS, offered.clusters, strict=True))
            found["devices"][f"cuda:{i}"] = {
                "capability": f"{offered.major}.{offered.minor}",
                "driver": offered.driver,
                "clusters_at_once": {size: count for size, count in clusters.items() if count},
            }
    except native.Unavailable as error:
        found["unusable"] = str(error)
    return found


def _cpu_library() -> dict[str, Any]:
    record: dict[str, Any] = {"path": str(cpu.LIBRARY), "build": native.build_record(cpu.LIBRARY) or None}
    try:
        record["instruction_sets"] = list(cpu.available_instruction_sets())
        record["in_use"] = cpu.instruction_set()
    except native.Unavailable as error:
        record["unusable"] = str(error)
    return record


def _place(name: str, library: dict[str, Any]) -> str:
    """Return a library's path, and whose it is where it is not the imported folder's own."""
    path, found = library["path"], native.library_path(name)
    borrowed = path == str(found) and found.parent != native.FOLDER
    return f"{path}{' (of the installation, built from the sources here)' if borrowed else ''}"


def presets_table() -> str:
    """Return every preset of the registry, a row of a Markdown table each."""
    lines = ["| preset | f | level | aggregation | paper | the paper's coefficients |", "| --- |" + " --- |" * 5]
    for name, preset in LossConfig.presets().items():
        config = preset.config
        cells = [f"`{name}`", f"`{config.policy_term!r}`", config.level, config.weighting.name, preset.paper]
        lines.append("| " + " | ".join([*cells, preset.coefficients]) + " |")
    return "\n".join(lines)


def surrogates_table() -> str:
    """Return every surrogate, a row of a Markdown table each."""
    lines = [
        "| surrogate | f | ∂f/∂ℓ of a token | passes | presets | paper | as others have it |",
        "| --- |" + " --- |" * 6,
    ]
    for cls in BUILT_IN:
        presets = (name for name, preset in LossConfig.presets().items() if type(preset.config.policy_term) is cls)
        names = ", ".join(f"`{name}`" for name in presets)
        passes = "two" if cls.kernel_id is None else "one"
        cells = [f"`{cls.__name__}`", cls.equation, cls.slope_equation, passes, names, cls.paper, cls.found_in]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def metrics_table() -> str:
    """Return every metric that a loss reports, a row of a Markdown table each."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in REPORTED.items()]
    return "\n".join(["| metric | meaning |", "| --- | --- |", *rows])


def verified(found: list[dict[str, Any]]) -> list[str]:
    """Return a line for each remembered run of verify, and one for a GPU that has none. Of a device that is here it
    says what is another one by now: a run is of the code, the library's bytes and the versions that it ran with."""
    lines = []
    gpus = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    for record in found:
        held = f"{record['checks'] - record['broken']} of {record['checks']} checks hold"
        changed = records.changed(record) if record["kind"] in gpus | {records.device_kind("cpu")} else []
        lines.append(
            f"{record['kind']}: {', '.join(record['backends'])}; {held} ({record.get('date')}, grpo_kernels "
            f"{record.get('grpo_kernels')}, torch {record.get('torch')})"
            + (f"; not what is here, which has another {', '.join(changed)}: verify it" if changed else "")
        )
    kinds = {record["kind"] for record in found}
    lines += [f"{name}: never; python -m grpo_kernels verify --device cuda" for name in sorted(gpus - kinds)]
    return lines or ["nothing yet: python -m grpo_kernels verify"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--presets", action="store_true", help="the table of presets, as Markdown")
    parser.add_argument("--surrogates", action="store_true", help="the table of surrogates, as Markdown")
    parser.add_argument("--metrics", action="store_true", help="the table of metrics, as Markdown")


def main(arguments: argparse.Namespace) -> int:
    makers = {"presets": presets_table, "surrogates": surrogates_table, "metrics": metrics_table}
    wanted = [name for name in makers if getattr(arguments, name)]
    if wanted and arguments.json:
        raise ValueError(f"--json has no effect with --{wanted[0]}: leave one of them out.")
    if wanted:
        print("\n\n".join(makers[name]() for name in wanted))
        return 0
    report = collect()
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"grpo_kernels {report['grpo_kernels']}, Python {report['python']}, {report['platform']}")
    print(f"folder     {report['folder']}")
    print("packages   " + ", ".join(f"{name} {version or '-'}" for name, version in report["packages"].items()))
    print(f"devices    {', '.join(report['devices'])}; {report['threads']} CPU threads")
    for name, state in report["backends"].items():
        print(f"backend    {name:<6} {state}")
    if report["switched_to"]:
        print(f"backend    {report['switched_to']} alone: GRPO_KERNELS_BACKEND takes the place of every other")
    for line in verified(report["verified"]):
        print(f"verified   {line}")
    for name in ("bf16", "fp16"):
        found = ", ".join(report[f"cpu_{name}_instructions"])
        gemm = f"{name} ({found})" if found else f"fp32, slice by slice of the weight: no {name} instructions here"
        print(f"CPU GEMMs  of {name} heads run in {gemm}")
    memory = report["cpu_memory"]
    kept = f"is kept for the next: {memory['kept_bytes'] / 1e6:.0f} MB of this process ({blocks.SWITCH}=0 keeps none)"
    print(f"memory     of large gradients on CPUs {kept if memory['keeps'] else f'is not kept: {blocks.SWITCH}=0'}")
    library = report["cpu_library"]
    print(f"library    {_place('cpu', library)}")
    if "unusable" in library:
        print(f"           unusable: {library['unusable']}")
    else:
        print(f"           instruction sets: {', '.join(library['instruction_sets'])}; in use: {library['in_use']}")
    if library["build"] and "error" not in library["build"]:
        print(f"           built by {library['build']['compiler']}; OpenMP: {library['build']['openmp']}")
    library = report["cuda_library"]
    print(f"library    {_place('cuda', library)}")
    if "unusable" in library:
        print(f"           unusable: {library['unusable']}")
    elif library["build"]:
        targets = ", ".join(f"sm_{name}" for name in library["build"]["architectures"].split())
        print(f"           for {targets}, PTX for newer ones; built by nvcc: {library['build']['compiler']}")
    print(f"           rows below {library['triton_below_bytes']} bytes: triton's, unless it is asked for by name")
    for name, offered in library["devices"].items():
        counts = ", ".join(f"{n} of {size}" for size, n in offered["clusters_at_once"].items())
        print(f"           {name}: capability {offered['capability']}, clusters at once: {counts or 'none'}")
    return 0
