"""Keeps what a run of gpu_check.py has found: gpu_check.json, written after every row, and gpu_check.md, its tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_rows
from gpu_cards import as_predicted, card_of, computed_ms
from gpu_commands import CHECKS, FOUND, PARTS, RACECHECK
from gpu_rows import Row

Results = dict[str, dict[str, Any]]
FILE = "gpu_check.json"
PROOF = ("smoke", "verify", "suite", "large", "sanitizer")


def proves_cuda(results: Results) -> bool:
    """Return whether a run lets the CUDA kernels be the automatic choice on its GPU (PROVEN of backends/cuda.py)."""
    return not lacking(results)


def lacking(results: Results) -> list[str]:
    """Say what a run lacks of that proof: every part of it, on these kernels, of one card, commit and library.
    A sanitizer's check that was no gate (racecheck of an old one) must have run to its end, whatever it found."""
    lacks = {name: _unproven(results.get(name)) for name in PROOF}
    rows = results.get("sanitizer", {}).get("rows", [])
    ended = {"", f"exit status {FOUND}"}
    clean = {row["name"] for row in rows if row.get("passed") or (row.get("gates") is False and row["how"] in ended)}
    if lacks["sanitizer"] is None and not clean >= set(CHECKS):
        lacks["sanitizer"] = f"without {', '.join(check for check in CHECKS if check not in clean)}"
    words = [f"{name} {why}" for name, why in lacks.items() if why is not None]
    if not words and any(results[name]["made_with"] != results[PROOF[0]]["made_with"] for name in PROOF):
        words.append("one card, commit and library")
    if not words and not names_the_code(commit := results[PROOF[0]]["made_with"]["commit"]):
        words.append(f"a commit that names the code (it is {commit})")
    return words


def verdict(rows: Sequence[Row]) -> dict[str, Any]:
    """Of a part, by its rows: passed, failed, or skipped where a tool cannot look at this device and no row failed."""
    failed = [row for row in rows if not row.get("passed", True) and row.get("gates", True)]
    if failed and all("skip" in row for row in failed):
        return {"passed": None, "skipped": failed[0]["skip"]}
    return {"passed": not failed}


def names_the_code(commit: str | None) -> bool:
    """Return whether two runs of this commit measured the same: a tree that differs from it may do so twice."""
    return bool(commit) and not str(commit).endswith("-dirty")


def proven(results: Results) -> str:
    """Say in a sentence whether the CUDA kernels are proven, and what lacks."""
    lacks = lacking(results)
    return (
        f"The CUDA kernels are not proven here: {'; '.join(lacks)}." if lacks else "The CUDA kernels are proven here."
    )


def _unproven(part: dict[str, Any] | None) -> str | None:
    if part is None:
        return "was left out"
    if part.get("passed") is not True:
        return "was skipped" if "skipped" in part else "failed"
    return None if "cuda" in part["backends"] else "was without the CUDA kernels"


class Record:
    """Holds the results of a run, and of the one that it resumes, in a folder."""

    def __init__(self, folder: Path, environment: dict[str, Any]) -> None:
        self.folder = folder
        self.unsaved: str | None = None
        self.results: Results = {"environment": environment}
        self.made_with = {name: environment[name] for name in ("gpu", "commit", "library")}

    def resume(self, earlier: Results) -> list[str]:
        """Take over what was made with this card, commit and library; name the parts that had another."""
        other = []
        for name in PARTS:
            if (part := earlier.get(name)) is None:
                continue
            if part.get("made_with") == self.made_with and names_the_code(self.made_with["commit"]):
                self.results[name] = part
            else:
                other.append(name)
        return other

    def passed(self, name: str, backends: tuple[str, ...]) -> bool:
        """Return whether a part has passed on all of these backends."""
        part = self.results.get(name, {})
        return part.get("passed") is True and set(backends) <= set(part["backends"])

    def failed(self, name: str) -> bool:
        return self.results.get(name, {}).get("passed") is False

    def unproven(self, names: Sequence[str]) -> list[str]:
        """Those of the proof that were left out, skipped or failed, with the reason; on Triton alone is no reason."""
        found = {name: self.results.get(name) for name in names if name in PROOF}
        return [f"{name} {_unproven(part)}" for name, part in found.items() if part is None or not part.get("passed")]

    def begin(self, name: str, backends: tuple[str, ...]) -> dict[str, Any]:
        """A part that has not passed until it ends; rows of it that had are kept."""
        rows = [row for row in self.results.get(name, {}).get("rows", []) if row.get("passed", True)]
        part = {"passed": False, "backends": list(backends), "made_with": self.made_with, "rows": rows}
        self.results[name] = {**part, "stopped": "before its end"}
        return self.results[name]

    def add(self, name: str, row: Row) -> None:
        """Add a row, in place of an earlier one of that name; it is on the disk when this returns."""
        rows = self.results[name]["rows"]
        rows[:] = [old for old in rows if old["name"] != row["name"]] + [row]
        self.save()

    def save(self) -> None:
        """``unsaved`` says why this failed, if it did: a later one may not, and what is measured meanwhile is kept."""
        try:
            _write(self.folder / FILE, json.dumps(gpu_rows.finite(self.results), indent=1) + "\n")
            _write(self.folder / "gpu_check.md", markdown(self.results))
        except OSError as error:
            self.unsaved = str(error)
        else:
            self.unsaved = None


def _write(path: Path, text: str) -> None:
    """Write a file, never half of it, whenever this is killed."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def read(folder: Path) -> Results:
    """Read an earlier run. Raises OSError where there are none, ValueError where they are not a run's."""
    found = json.loads((folder / FILE).read_text())
    if not isinstance(found, dict) or not all(_is_part(part) for name, part in found.items() if name in PARTS):
        raise ValueError("it is not the record of a run")
    return found


def _is_part(part: object) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("backends"), list):
        return False
    rows = part.get("rows")
    return "passed" in part and isinstance(rows, list) and all(gpu_rows.is_row(row) for row in rows)


# The table


def markdown(results: Results) -> str:
    found = results["environment"]
    versions = ", ".join(f"{name} {found.get(name)}" for name in ("driver", "torch", "triton", "commit", "library"))
    lines = [f"{found['gpu']}, {versions}", "", "| part | outcome | seconds |", "| --- | --- | --- |"]
    for name, part in results.items():
        if name in PARTS:
            seconds = f"{part['seconds']:.0f}" if "seconds" in part else ""
            lines.append(f"| {name} | {outcome(part)} | {seconds} |")
    lines += ["", proven(results), ""]
    lines += _no_gates(results) + _bandwidths(results) + _kernels(results) + _traffic(results)
    for name in ("timing", "linear"):
        lines += _timing(results.get(name, {}))
    lines += _pairs(results)
    return "\n".join(lines).rstrip() + "\n"


def outcome(part: dict[str, Any]) -> str:
    """Say in one cell: passed, or what did not hold."""
    if "skipped" in part:
        return f"skipped: {part['skipped']}"
    if part["passed"]:
        return "passed"
    broken = [f"{row['name']}{': ' * bool(row.get('how'))}{row.get('how', '')}" for row in part.get("rows", [])
              if not row.get("passed", True)]  # fmt: skip
    return f"**failed**{', stopped ' * bool(part.get('stopped'))}{part.get('stopped', '')}: {'; '.join(broken)}"


def _no_gates(results: Results) -> list[str]:
    rows = [row for row in results.get("sanitizer", {}).get("rows", []) if row.get("gates") is False]
    first = ".".join(map(str, RACECHECK))
    return [
        f"{row['name']} of compute-sanitizer {row.get('tool')} {'passed' if row['passed'] else 'failed'}: "
        f"it is no gate before {first}.\n"
        for row in rows
    ]


def _copy(results: Results) -> float | None:
    """Return GB/s, as this run measured it."""
    for name, key in (("limits", "gb_per_s"), ("smoke", "copy_gb_per_s")):
        for row in results.get(name, {}).get("rows", []):
            if row["name"] == "copy":
                return float(row[key])
    return None


def _bandwidths(results: Results) -> list[str]:
    card, copy = card_of(results["environment"]["gpu"]), _copy(results)
    if copy is None:
        return []
    assumed = f", assumed {card.copy / 1e9:.0f}" if card else ""
    others = [row for row in results.get("limits", {}).get("rows", []) if "gb_per_s" in row and row["name"] != "copy"]
    text = "; ".join(f"{row['name']} {row['gb_per_s']:.0f}" for row in others)
    return [f"GB/s: copy {copy:.0f}{assumed}{'; ' * bool(text)}{text}.", ""]


def _kernels(results: Results) -> list[str]:
    """Tabulate the CUDA kernels alone: what was computed beside what was measured."""
    rows = [row for row in results.get("smoke", {}).get("rows", []) if "in_place_ms" in row]
    if not rows:
        return []
    heads = ["CUDA kernels alone", "computed ms", "in place ms", "of the measured copy", "as computed", "one pass ms",
             "log-probs ms", "µs a row and cluster"]  # fmt: skip
    lines = _head(heads)
    gpu = results["smoke"]["made_with"]["gpu"]
    for row in rows:
        cells = [row["name"], _number(computed_ms(row["logits_bytes"], gpu)), _number(row["in_place_ms"])]
        cells += [f"{row['of_copy']:.0%}", as_predicted(row["in_place_ms"], row["logits_bytes"], gpu)]
        cells += [_number(row["one_pass_ms"]), _number(row["log_probs_ms"]), f"{row['us_per_row_and_cluster']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Computed: the logits read and written once at the card's assumed bandwidth.", ""]


def _traffic(results: Results) -> list[str]:
    lines = []
    for row in results.get("traffic", {}).get("rows", []):
        for kernel, moved in row.get("units", {}).items():
            units = ", ".join(f"{what} {count:.2f}" for what, count in moved.items())
            lines.append(f"- {row['name']}, {kernel}: {units} times the logits")
    return [*lines, ""] if lines else []


def _timing(part: dict[str, Any]) -> list[str]:
    """Tabulate every provider of every workload; the bound is of the same rounds."""
    rows = [row for row in part.get("rows", []) if "providers" in row]
    if not rows:
        return []
    lines = _head(["workload", "provider", "step ms", "computed ms", "the bound ms", "of the bound", "gradient error"])
    for row in rows:
        whole = row["hidden"] is None and row["kind"] == "all"
        computed = computed_ms(row["logits_bytes"], part["made_with"]["gpu"]) if whole else None
        for name, found in row["providers"].items():
            if "step_ms" not in found:
                why = found.get("skipped") or found.get("failed") or "not timed"
                lines.append(f"| {row['name']} | {name} | {why} | | | | |")
                continue
            bound = row["yardstick_ms"]
            cells = [row["name"], name, _number(found["step_ms"]), _number(computed if found["ours"] else None)]
            cells += [_number(bound), f"{bound / found['step_ms']:.0%}", _number(found["gradient_error"], ".0e")]
            lines.append(f"| {' | '.join(cells)} |")
    missing = sorted({name for row in rows for name in row["missing"]})
    return [*lines, "", *([f"Not installed: {', '.join(missing)}.", ""] if missing else [])]


def _pairs(results: Results) -> list[str]:
    """Tabulate divergences: errors of those that were compared, times of the others."""
    rows = [row for row in results.get("pairs", {}).get("rows", []) if "error" in row or "ms" in row]
    if not rows:
        return []
    lines = _head(["divergence", "error of D", "gradient error", "loss and gradient ms"])
    for row in rows:
        cells = [_number(row.get(key), ".0e") for key in ("error", "gradient_error")]
        lines.append(f"| {' | '.join([row['name'], *cells, _number(row.get('ms'))])} |")
    return [*lines, ""]


def _head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def _number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)
