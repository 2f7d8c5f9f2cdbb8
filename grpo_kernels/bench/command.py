"""Measures time and memory of the loss step on this machine, ours beside eager PyTorch and torch.compile.

    python -m grpo_kernels bench                                   # three shapes, about a minute on two cores
    python -m grpo_kernels bench --model qwen2.5-7b --lengths 256,1k --dtype bf16 --out results
    python -m grpo_kernels bench --shapes 512x32000,512x151936     # tokens x vocabulary
    python -m grpo_kernels bench --model qwen3-0.6b --lengths 128 --linear      # from hidden states
    python -m grpo_kernels bench --backend torch                   # ours on the backend of that name

Providers take turns inside each round; figures are medians. Peers' packages (TRL, Liger, ...) are timed beside ours by
benchmarks/loss.py of the repository.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends, files
from ..objectives.settings import check_name, first_line, read_device, read_folder
from ..streams import say
from ..verification.progress import progress_bar
from . import measure, report
from .models import MODELS
from .plot import plot
from .providers import Provider, providers
from .workload import DTYPES, KINDS, Spec

DEFAULT_SHAPES = {"cpu": "128x32000,512x32000,128x151936", "cuda": "4096x32000,16384x32000,4096x151936"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", help=f"one of {', '.join(DTYPES)}; repeatable (default: bf16)")
    parser.add_argument("--shapes", help="tokens x vocabulary, separated by commas: 512x32000,256x151936")
    parser.add_argument("--model", help="vocabulary and hidden size of a model, e.g. qwen2.5-7b (see --models)")
    parser.add_argument("--models", action="store_true", help="list the models that --model knows")
    parser.add_argument("--lengths", help="tokens, with --model: 256,1k,4k (default: 256,1k; on a GPU 4k,16k)")
    parser.add_argument("--linear", action="store_true", help="from hidden states, with --model")
    kinds = ", ".join(repr(kind) for kind in KINDS).replace("%", "%%")
    parser.add_argument("--kind", action="append", help=f"one of {kinds}; repeatable (default: 'all')")
    names = ", ".join(backends.names())
    parser.add_argument("--backend", help=f"what ours runs on, one of {names} (default: the automatic choice)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="peak memory alone, one call of each")
    parser.add_argument("--out", type=read_folder, metavar="DIR", help="write bench.json, .csv, .md and .png there")


def main(arguments: argparse.Namespace) -> int:
    if arguments.models:
        print("\n".join(f"{name:<18} vocabulary {m.vocab:>7,}  hidden {m.hidden:>5,}" for name, m in MODELS.items()))
        return 0
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {arguments.rounds}.")
    read_device("--device", arguments.device)
    check_backend(arguments.backend, arguments.device)
    specs = specs_of(arguments)
    environment = report.environment(arguments.device, arguments.backend)
    sinks = Files(arguments.out, "bench", environment)
    chosen = functools.partial(providers, backend=arguments.backend)
    rows, status = collect(specs, chosen, arguments.rounds, sinks, timed=not arguments.memory)
    print(report.caption(environment))
    print(report.text(rows))
    if sinks.written:
        print(f"\nwritten: {', '.join(str(path) for path in sinks.written)}")
    return status


def check_backend(name: str | None, device: str) -> None:
    """Raise a ValueError where ``name`` is no backend, cannot serve the device, or is not what the calls would take."""
    if name is None:
        return
    check_name("--backend", name, backends.names())
    backends.check_not_switched(f"--backend {name} names a backend")
    backends.check_serves("--backend", name, device)


def collect(
    specs: Sequence[Spec],
    providers: Callable[[Spec], Sequence[Provider]],
    rounds: int,
    sinks: Files,
    *,
    timed: bool = True,
) -> tuple[list[dict[str, Any]], int]:
    """Measure, and return the rows and the exit status.

    The status is 130 when it was interrupted; what was measured until then is kept and written. It is 2 where that was
    measured and could not be written.
    """
    rows: list[dict[str, Any]] = []
    bar = progress_bar(len(specs), "bench", "workload")
    try:
        for row in measure.run(specs, providers, rounds, timed=timed, progress=bar.set_description):
            rows.append(row)
            sinks.write(rows)
            bar.update()
    except KeyboardInterrupt:
        bar.close()
        say(f"interrupted after {len(rows)} of {len(specs)} workloads")
        return rows, 130
    bar.close()
    return rows, 2 if sinks.failed else 0


class Files:
    """Writes a folder's NAME.json, .csv, .md and .png anew after each workload."""

    def __init__(self, folder: Path | None, name: str, environment: dict[str, Any]) -> None:
        self.folder, self.name, self.environment = folder, name, environment
        self.written: list[Path] = []
        self.failed = False
        """Whether the last rows could not be written."""
        if folder is None:
            return
        try:  # now, not after minutes of measuring
            folder.mkdir(parents=True, exist_ok=True)
            files.write_text(folder / f"{name}.probe", "")
            (folder / f"{name}.probe").unlink()
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be written: {error.strerror or error}.") from error

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write what there is, where a folder was given. What was measured is worth more than its file: of a full disk
        there is a note."""
        if self.folder is None:
            return
        found = {"environment": self.environment, "rows": rows}
        path = self.folder / f"{self.name}.json"
        self.written = []
        try:
            files.write_text(path, json.dumps(found, indent=1) + "\n")
            self.written = [path]
            self.written += redraw(self.folder, self.name, found)
            self.failed = False
        except OSError as error:
            self.failed = True
            say(f"note: --out {self.folder} cannot be written: {error.strerror or error}")


def redraw(folder: Path, name: str, found: dict[str, Any]) -> list[Path]:
    """Write NAME.csv, .md and .png of what NAME.json holds, and return their paths; no plot without matplotlib."""
    rows, environment = found["rows"], found["environment"]
    texts = {"csv": report.comma_separated(rows), "md": report.markdown(rows, environment)}
    written = []
    for ending, text in texts.items():
        written.append(folder / f"{name}.{ending}")
        files.write_text(written[-1], text)
    picture = folder / f"{name}.png"
    try:
        drawn = plot(rows, picture, report.caption(environment))
    except ImportError:
        return written
    except Exception as error:  # of the disk, or of what matplotlib cannot do here
        say(f"note: {picture} cannot be drawn: {first_line(error)}")
        return written
    return written if drawn is None else [*written, drawn]


def specs_of(arguments: argparse.Namespace) -> list[Spec]:
    """Return the workloads that the options name. Raise a ValueError where they name none, or contradict each other."""
    dtypes, kinds = arguments.dtype or ["bf16"], arguments.kind or ["all"]
    for dtype in dtypes:
        check_name("--dtype", dtype, DTYPES)
    for kind in kinds:
        check_name("--kind", kind, KINDS)
    hidden = None
    device = torch.device(arguments.device).type
    if arguments.model is not None:
        check_name("--model", arguments.model, MODELS)
        if arguments.shapes is not None:
            raise ValueError("--shapes and --model exclude each other: a model has its vocabulary, give --lengths.")
        default = "4k,16k" if device == "cuda" else "256,1k"
        lengths = [
            number(text, "--lengths")
            for text in (default if arguments.lengths is None else arguments.lengths).split(",")
        ]
        shapes = [(length, MODELS[arguments.model].vocab) for length in lengths]
        hidden = MODELS[arguments.model].hidden if arguments.linear else None
    else:
        for name in ("lengths", "linear"):
            if getattr(arguments, name):
                raise ValueError(f"--{name} needs --model NAME (see --models).")
        given = DEFAULT_SHAPES.get(device, DEFAULT_SHAPES["cpu"]) if arguments.shapes is None else arguments.shapes
        shapes = [shape(text) for text in given.split(",")]
    specs = [
        Spec(tokens, vocab, dtype, hidden, kind, device=arguments.device)
        for dtype in dtypes
        for tokens, vocab in shapes
        for kind in kinds
    ]
    for spec in specs:
        spec.check()
    return specs


def shape(text: str) -> tuple[int, int]:
    """Read "512x32000" as tokens and vocabulary. Raise a ValueError of --shapes where it is something else."""
    tokens, _, vocab = text.lower().partition("x")
    if text.lower().count("x") != 1 or not tokens or not vocab:
        raise ValueError(f"--shapes must be TOKENSxVOCABULARY, separated by commas; got {text!r}.")
    return number(tokens, "--shapes"), number(vocab, "--shapes")


def number(text: str, what: str) -> int:
    """Read "4096" or "4k"; k is 1024. Raise a ValueError of the option ``what`` where it is no positive number."""
    digits, factor = (text[:-1], 1024) if text.lower().endswith("k") else (text, 1)
    digits = digits.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 15 and int(digits) >= 1):
        raise ValueError(f"{what}: {text!r} is no positive number such as 512 or 4k.")
    return int(digits) * factor
