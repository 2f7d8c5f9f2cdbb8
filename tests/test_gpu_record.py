"""benchmarks/gpu_record.py and gpu_cards.py: what is kept, what proves the kernels, and the table."""

from __future__ import annotations

from pathlib import Path

import gpu_commands
import pytest
from gpu_cards import as_predicted, computed_ms
from gpu_record import PROOF, Record, markdown, proves_cuda
from test_gpu_check import H200, recorded

MADE = {"gpu": "NVIDIA H200", "commit": "abc", "library": "sources"}
GREEN = {
    "environment": {**H200, **MADE, "driver": "580"},
    **{name: {"passed": True, "backends": ["cuda", "triton"], "made_with": MADE, "rows": []} for name in PROOF},
}
GREEN["sanitizer"]["rows"] = [{"name": check, "passed": True} for check in gpu_commands.CHECKS]


def test_what_proves_the_cuda_kernels():
    """Every part of the proof, on these kernels, all with one card, commit and library."""
    assert proves_cuda(GREEN)
    assert proves_cuda({**GREEN, "timing": {"passed": False}})
    for name in PROOF:
        for other in ({"passed": False}, {"passed": None, "skipped": "not here"}, {"backends": ["triton"]},
                      {"made_with": {**MADE, "commit": "def"}}):  # fmt: skip
            assert not proves_cuda({**GREEN, name: {**GREEN[name], **other}}), (name, other)
        assert not proves_cuda({key: part for key, part in GREEN.items() if key != name})
    for commit in (None, "", "abc-dirty"):
        made = {name: {**GREEN[name], "made_with": {**MADE, "commit": commit}} for name in PROOF}
        assert not proves_cuda({**GREEN, **made}), commit
    for rows in ([], GREEN["sanitizer"]["rows"][:2], [{**row, "passed": False} for row in GREEN["sanitizer"]["rows"]]):
        assert not proves_cuda({**GREEN, "sanitizer": {**GREEN["sanitizer"], "rows": rows}})


def test_a_check_that_is_no_gate():
    """It must have run to its end; what it found is in the record."""
    others = [row for row in GREEN["sanitizer"]["rows"] if row["name"] != "racecheck"]
    old = {"name": "racecheck", "passed": False, "gates": False, "tool": "2025.3.1", "how": "exit status 9"}
    slow, wrong = {**old, "how": "stopped at its deadline, after 80 s"}, {**old, "how": "exit status 1"}
    for rows, proven in (
        ([*others, old], True),
        (others, False),
        ([*others, slow], False),
        ([*others, wrong], False),
        ([*others, {**old, "gates": True}], False),
    ):
        assert proves_cuda({**GREEN, "sanitizer": {**GREEN["sanitizer"], "rows": rows}}) is proven


def test_predictions():
    """By the bytes and the card's own bandwidth; a card that nothing was computed for has none."""
    logits = 8192 * 151936 * 2
    assert computed_ms(logits, "NVIDIA H200") == pytest.approx(1.158, abs=1e-3)
    assert computed_ms(logits, "NVIDIA H100 80GB HBM3") == pytest.approx(1.660, abs=1e-3)
    assert computed_ms(logits, "NVIDIA H100 PCIe") is None
    assert as_predicted(1.25, logits, "NVIDIA H200") == "yes"
    assert as_predicted(1.39, logits, "NVIDIA H200") == "1.20 times it"
    assert as_predicted(1.76, logits, "NVIDIA H100 80GB HBM3") == "1.06 times it"
    assert as_predicted(1.25, logits, "NVIDIA B200") == ""


def test_table():
    """Computed and measured side by side."""
    times = {"name": "8192x151936 bfloat16, k3 KL", "logits_bytes": 8192 * 151936 * 2, "of_copy": 0.9}
    times |= {"one_pass_ms": 1.3, "in_place_ms": 1.25, "log_probs_ms": 0.7, "us_per_row_and_cluster": 5.03}
    smoke = {**GREEN["smoke"], "seconds": 61.0, "rows": [{"name": "copy", "copy_gb_per_s": 4290.0}, times]}
    ours = {"step_ms": 1.3, "gradient_error": 2e-3, "ours": True}
    row = {"name": "8192×151936 bf16", "hidden": None, "kind": "all", "logits_bytes": times["logits_bytes"]}
    row |= {"yardstick_ms": 1.2, "missing": ["Liger"], "providers": {"ours": ours, "TRL": {"skipped": "too large"}}}
    row["providers"]["peer"] = {**ours, "ours": False, "gradient_error": None}  # NaN, which JSON has not
    text = markdown({**GREEN, "smoke": smoke, "timing": {**GREEN["smoke"], "rows": [row]}})
    assert text.startswith("NVIDIA H200, driver 580, torch 2.11.0, triton 3.6.0, commit abc, library sources\n")
    assert "| smoke | passed | 61 |" in text
    assert "The CUDA kernels are proven here." in text
    lacking = markdown({"environment": GREEN["environment"], "smoke": smoke})
    assert "not proven here: verify was left out; suite was left out; large was left out; sanitizer was " in lacking
    assert "GB/s: copy 4290, assumed 4300." in text
    assert "| 8192x151936 bfloat16, k3 KL | 1.158 | 1.250 | 90% | yes | 1.300 | 0.700 | 5.03 |" in text
    assert "| 8192×151936 bf16 | ours | 1.300 | 1.158 | 1.200 | 92% | 2e-03 |" in text
    assert "| 8192×151936 bf16 | peer | 1.300 |  | 1.200 | 92% |  |" in text
    assert "| 8192×151936 bf16 | TRL | too large | | | | |" in text
    assert "Not installed: Liger." in text


def test_a_half_written_record_is_none(tmp_path, monkeypatch):
    """Killed while it writes, the file of before is there."""
    record = Record(tmp_path, GREEN["environment"])
    record.begin("smoke", ("cuda",))
    record.save()
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record.add("smoke", {"name": "a row"})
    assert recorded(tmp_path)["smoke"]["rows"] == []
