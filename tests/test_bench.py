"""python -m grpo_kernels bench, its engine, and the peers' adapters: what is timed is the right thing."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from grpo_kernels import files
from grpo_kernels.__main__ import main
from grpo_kernels.backends import eager
from grpo_kernels.bench import command, measure, plot, providers, report
from grpo_kernels.bench.models import MODELS
from grpo_kernels.bench.workload import DTYPES, KINDS, Spec, Workload
from grpo_kernels.verification import reference


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes ten seconds a shape; its provider is then the same maths, uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda body: body)


def exact(work):
    logits = work.kept if work.spec.hidden is None else torch.nn.functional.linear(work.hidden, work.weight)
    known = {name: value.double() for name, value in work.known().items()}
    arguments = (work.ids, work.advantages.double(), work.mask)
    return float(reference.grpo_loss(logits.double(), *arguments, config=work.config, **known).loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [None, 16])
def test_every_provider_computes_the_same(uncompiled, kind, hidden):
    """A baseline that computes something else is no baseline."""
    work = Workload(Spec(32, 97, "fp32", hidden, kind))
    wanted = exact(work)
    gradients = []
    for provider in providers.providers(work.spec):
        work.restore()
        loss = measure.step(provider, work)
        assert float(loss.detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-6), provider.name
        gradients.append(work.gradients[0].clone())
        assert len(work.gradients) == (1 if hidden is None else 2)
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=1e-3, atol=1e-7, msg=provider.name)
    assert gradients[0].abs().max() > 1e-4


@pytest.mark.peers
@pytest.mark.parametrize("hidden", [None, 32])
def test_every_peer_computes_the_same(uncompiled, hidden):
    import peers

    work = Workload(Spec(64, 1000, "fp32", hidden))
    wanted = exact(work)
    names = []
    for provider in peers.providers(work.spec):
        work.restore()
        loss = measure.step(provider, work)
        names.append(provider.name)
        assert float(loss.detach()) == pytest.approx(wanted, rel=1e-3, abs=1e-5), provider.name
        if len(names) == 1:
            gradient = work.gradients[0].clone()
        torch.testing.assert_close(work.gradients[0], gradient, rtol=1e-2, atol=1e-6, msg=provider.name)
    expected = {name for name, (_, takes, devices, *_) in peers.PEERS.items() if "cpu" in devices and (takes == "logits") == (hidden is None)}  # fmt: skip  # noqa: E501
    assert expected <= set(names)
    assert peers.missing("cpu") == []
    assert "quack cross_entropy (yardstick)" in peers.missing("cuda")


def test_workloads():
    """Old log-probs near the policy's, so that some ratios are clipped; sequences without advantage, tokens masked."""
    work = Workload(Spec(64, 500, "fp32"))
    ratio = (torch.log_softmax(work.kept, -1).gather(-1, work.ids[..., None]).squeeze(-1) - work.old).exp()
    clipped = ((ratio > 1.2) | (ratio < 0.8)).double().mean()
    assert 0.1 < clipped < 0.6
    assert 0.3 < Workload(Spec(64, 500, "fp32", kind="half masked")).mask.double().mean() < 0.7
    zero = Workload(Spec(64, 500, "fp32", kind="30 % A = 0"))
    assert (zero.advantages == 0).sum() == 2
    assert zero.config.kl.coef == 0
    shorter = work.shortened()
    assert shorter.ids.shape == (8, 7)
    assert shorter.kept.shape == (8, 7, 500)


def test_rows_of_the_engine(uncompiled):
    spec = Spec(32, 300, "bf16", upstream=0.25)
    row = next(measure.run([spec], providers.providers, rounds=2))
    assert set(row["providers"]) == {p.name for p in providers.providers(spec)}
    ours = row["providers"]["ours, in place"]
    for name in ("forward_ms", "loss_ms", "backward_ms", "step_ms", "step_p20_ms", "step_p80_ms"):
        assert ours[name] > 0
    assert ours["step_ms"] == pytest.approx(ours["loss_ms"] + ours["backward_ms"], rel=0.05)
    assert ours["repeatable"] is True
    assert ours["gradient_error"] < 5e-3
    assert ours["loss_error"] < 1e-4
    assert row["providers"]["ours"]["extra_bytes"] >= spec.logits_bytes
    assert row["yardstick_ms"] > 0
    json.dumps(row)


def test_errors_are_seen(uncompiled):
    """A provider that is wrong shows: gradient x 0.99, and a loss off by one per cent."""

    def wrong(work):
        loss = providers.from_logits(work.spec)[0].loss(work)
        return 0.99 * loss

    made = [*providers.from_logits(Spec(32, 300, "fp32"))[:1], providers.Provider("wrong", wrong, lambda s: 0)]
    row = next(measure.run([Spec(32, 300, "fp32")], lambda spec: made, rounds=1))
    assert row["providers"]["wrong"]["gradient_error"] == pytest.approx(0.01, rel=0.01)
    assert row["providers"]["wrong"]["loss_error"] == pytest.approx(0.01, rel=0.01)
    assert row["providers"]["ours"]["gradient_error"] < 1e-5


def test_failures_and_what_does_not_fit(uncompiled):
    """A provider that raises, and one that would not fit, are named; the others go on."""

    def failing(work):
        raise RuntimeError("no kernel image")

    spec = Spec(32, 300, "fp32")
    made = [
        *providers.from_logits(spec)[:1],
        providers.Provider("failing", failing, lambda s: 0),
        providers.Provider("huge", failing, lambda s: 1e15),
    ]
    row = next(measure.run([spec], lambda _: made, rounds=1))
    assert row["providers"]["failing"]["failed"] == "RuntimeError: no kernel image"
    assert row["providers"]["huge"]["skipped"].startswith("needs about 1000000.0 GB")
    text = report.text([row])
    assert "failing: RuntimeError: no kernel image" in text
    assert "step_ms" in row["providers"]["ours"]
    assert report.markdown([row], report.environment("cpu")).count("\n| 32×300 fp32 |") == 3


def test_command(uncompiled, tmp_path, capsys):
    arguments = ["--shapes", "16x64,32x64,16x128", "--dtype", "fp32", "--rounds", "1", "--out", str(tmp_path / "new")]
    assert main(["bench", *arguments]) == 0
    text = capsys.readouterr().out
    assert re.search(r"32×64 fp32: ours takes [\d.]+ ms \([\d.]+ in place\); .* outputs, [\d.]+x as long", text)
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert len(found["rows"]) == 3
    lines = list(csv.DictReader((tmp_path / "new" / "bench.csv").open()))
    assert len(lines) == 15
    assert float(lines[0]["step_ms"]) > 0
    assert (tmp_path / "new" / "bench.md").read_text().count("| ours, in place |") == 3
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "bench.png" in text


def test_memory_alone(uncompiled, capsys):
    assert main(["bench", "--shapes", "16x64", "--memory"]) == 0
    assert "extra memory" in capsys.readouterr().out


def test_models_and_hidden_states(uncompiled, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "tiny", type(MODELS["phi-4"])(97, 16))
    assert main(["bench", "--model", "tiny", "--lengths", "16,32", "--linear", "--dtype", "fp32", "--rounds", "1"]) == 0
    assert "32×16×97 fp32" in capsys.readouterr().out
    assert main(["bench", "--models"]) == 0
    assert "qwen2.5-7b" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupted(number, uncompiled, monkeypatch, tmp_path, capsys):
    """What was measured is kept, and written, also by a scheduler's SIGTERM."""
    original = measure._row
    seen = []

    def row(spec, *rest):
        if seen:
            signal.raise_signal(number)
        seen.append(spec)
        return original(spec, *rest)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores
    monkeypatch.setattr(measure, "_row", row)
    assert main(["bench", "--shapes", "16x64,32x64", "--rounds", "1", "--out", str(tmp_path)]) == 130
    out = capsys.readouterr()
    assert "interrupted after 1 of 2 workloads" in out.err
    assert "16×64 bf16" in out.out
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 1


@pytest.mark.parametrize("whole", [0, 1])
def test_interrupted_while_it_writes(whole, uncompiled, monkeypatch, tmp_path):
    """No file is half there: it is the one before, or none."""
    original, written = Path.write_text, []

    def write_text(path, text):
        written.append(path.name)
        original(path, text[: len(text) // 2])
        if written.count("bench.json") > whole:
            raise KeyboardInterrupt
        return original(path, text)

    monkeypatch.setattr(Path, "write_text", write_text)
    assert main(["bench", "--shapes", "16x64,32x64", "--rounds", "1", "--out", str(tmp_path)]) == 130
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == (["bench.csv", "bench.json", "bench.md", "bench.png"] if whole else [])
    assert not whole or len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 1


def unwritable(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    return str(path / "folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen2.5-8b"], r"--model must be one of .*Did you mean 'qwen2.5-[37]b'"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16"),
        (["--kind", "masked"], "--kind must be one of .*Did you mean 'half masked'"),
        (["--shapes", "512"], "TOKENSxVOCABULARY, separated by commas; got '512'"),
        (["--shapes", ""], "TOKENSxVOCABULARY, separated by commas; got ''"),
        (["--shapes", "x"], "TOKENSxVOCABULARY, separated by commas; got 'x'"),
        (["--shapes", "5x5x5"], "TOKENSxVOCABULARY, separated by commas; got '5x5x5'"),
        (["--shapes", "²x10"], "'²' is no positive number"),
        (["--shapes", "64x50,127x50", "--kind", "30 % A = 0"], "a batch of 30 % A = 0 needs tokens .*; got 127"),
        (["--shapes", "999999999999999999kx8"], "'999999999999999999k' is no positive number"),
        (["--model", ""], "--model must be one of"),
        (["--shapes", "0x512"], "'0' is no positive number"),
        (["--lengths", "4k"], "--lengths needs --model"),
        (["--linear"], "--linear needs --model"),
        (["--model", "phi-4", "--shapes", "1x2"], "exclude each other"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--shapes", "10000000x151936"], r"needs about .* GB are free on cpu: fewer tokens \(\d+ would fit\)\."),
        (["--shapes", "10000000x151936", "--dtype", "fp16"], r"fewer tokens \(\d+ would fit\)\."),
        (["--shapes", "10000000x151936", "--dtype", "fp32"], r"fewer tokens \(\d+ would fit\) or --dtype bf16\."),
        (["--shapes", "8x99999999999999"], r"GB are free on cpu: fewer columns\."),
        (["--device", "foo"], "--device foo cannot be used here"),
        (["--backend", "gpu"], "--backend must be one of cpu, cuda, triton, torch; got 'gpu'"),
        (["--out", "UNWRITABLE"], "--out .* cannot be written: "),
    ],
)
def test_bad_arguments(capsys, tmp_path, arguments, message):
    arguments = [unwritable(tmp_path) if a == "UNWRITABLE" else a for a in arguments]
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


@pytest.mark.parametrize("full", ["bench.json", "bench.csv"])
def test_a_disk_that_fills_while_it_measures(monkeypatch, tmp_path, capsys, full):
    """What was measured is shown all the same, with the file that everything can be drawn from."""

    def write(path, text):
        if path.name == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(text)

    sinks = command.Files(tmp_path, "bench", report.environment("cpu", None))
    monkeypatch.setattr(files, "write_text", write)
    monkeypatch.setattr(command.measure, "run", lambda *_, **__: iter([row_of({"ours": 1.0, "eager": 2.0})]))
    rows, status = command.collect([None], None, 1, sinks)
    assert (len(rows), status) == (1, 2)
    assert f"note: --out {tmp_path} cannot be written: No space left on device\n" in capsys.readouterr().err
    written = [] if full == "bench.json" else ["bench.json"]
    assert [path.name for path in sinks.written] == written


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no fonts")])
def test_no_picture_fails_a_measurement(monkeypatch, tmp_path, capsys, error):
    def plot(*_):
        raise error

    sinks = command.Files(tmp_path, "bench", report.environment("cpu", None))
    monkeypatch.setattr(command, "plot", plot)
    monkeypatch.setattr(command.measure, "run", lambda *_, **__: iter([row_of({"ours": 1.0, "eager": 2.0})]))
    rows, status = command.collect([None], None, 1, sinks)
    assert (len(rows), status) == (1, 0)
    assert f"note: {tmp_path}/bench.png cannot be drawn: {error}\n" in capsys.readouterr().err
    assert [path.name for path in sinks.written] == ["bench.json", "bench.csv", "bench.md"]


def test_lengths():
    assert command.number("4k", "--lengths") == 4096
    assert command.number(" 512", "--lengths") == 512
    assert set(DTYPES) == {"fp32", "bf16", "fp16"}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def row_of(times, vocab=1000, **changes):
    """A row of the engine with these milliseconds by provider, whose memory is its place among them."""
    measured = {"forward_ms": 1.0, "backward_ms": 1.0, "loss_error": 0.0, "gradient_error": 0.0}
    measured |= {"repeatable": True, "same_outputs": True}
    found = {
        name: {**measured, "step_ms": ms, "extra_bytes": 2000 * place, "ours": name.startswith("ours")}
        for place, (name, ms) in enumerate(times.items())
    }
    spec = {
        "tokens": 2,
        "vocab": vocab,
        "dtype": "bf16",
        "hidden": None,
        "kind": "all",
        "upstream": 1.0,
        "device": "cpu",
    }
    return {**spec, "logits_bytes": 4 * vocab, "yardstick_ms": 2.0, "providers": found} | changes


EAGER, COMPILED = "eager, fp32 upcast", "torch.compile, fp32 upcast"
SLOWER = {"ours, in place": 4.0, "ours": 20.0, EAGER: 30.0, COMPILED: 12.0}
"""Compiled code beats the default call here, which takes five times as long as the one in place."""


def test_figures_are_of_the_default_call():
    """Where a peer is faster than the call that is pasted, the number is below 1; in place stands beside it."""
    rows = [row_of(SLOWER), row_of(SLOWER | {"ours": 10.0})]
    text = report.summary(rows, report.environment("cpu"), [EAGER, COMPILED, "Liger"])
    heads, _, first, second = (line.split(" | ") for line in text.splitlines()[2:])
    assert heads[1:3] == ["ours: ms", "ours, in place: ms"]
    assert first[1:7] == ["20.00", "4.00", "10 %", "1.5x", "0.6x", "–"]
    assert second[1:7] == ["10.00", "4.00", "20 %", "3.0x", "1.2x", "–"]
    assert first[7].startswith("0.50 × / 0.00 × / 1.00 ×")
    said = report.headline(rows, [COMPILED, EAGER])
    assert "torch.compile (fp32 upcast) takes **0.6-1.2x** the time of the default call" in said
    assert "eager (fp32 upcast) takes **1.5-3.0x**; of the time with `inplace=True` 3.0x and 7.5x." in said
    assert "0.5 for the default call, 0.0 in place, 1.5 for torch.compile (fp32 upcast), 1.0 for eager" in said
    assert report.headline(rows, ["Liger"]) == ""
    assert report.cells(rows[0], "ours, in place")[report.COLUMNS.index("× ours")] == "0.20"
    line = report.sentences(rows)[0]
    assert re.search(rf"20.00 ms \(4.00 in place\); {COMPILED}, the fastest of the others .*, 0.6x as long$", line)


@pytest.mark.parametrize(("sizes", "drawn"), [((1000, 2000, 3000), "bars"), ((1000, 2000, 4000, 8000), "lines")])
def test_what_is_drawn(monkeypatch, tmp_path, sizes, drawn):
    """Lines of four points and more; a provider has the same colour everywhere, and its own marker and dash."""
    kept = []
    monkeypatch.setattr(plot, "head", lambda figure, *rest: kept.append(figure))
    rows = [row_of(SLOWER, vocab) for vocab in sizes]
    assert plot.plot(rows, tmp_path / "bench.png", "") == tmp_path / "bench.png"
    panels = kept[0].get_axes()
    drawings = {
        line.get_label(): (line.get_color(), line.get_marker(), line.get_linestyle()) for line in panels[0].lines
    }
    if drawn == "bars":
        assert [len(panel.patches) for panel in panels] == [4] * 6
        assert not drawings
        return
    assert list(drawings) == list(SLOWER)
    assert len({(marker, dash) for _, marker, dash in drawings.values()}) == 4
    assert [bar.get_width() for bar in panels[-1].patches] == [2000 * place / 32000 for place in range(4)]
    ticks = [label.get_text() for label in panels[0].get_yticklabels()]
    assert {"5", "10", "20"} <= set(ticks)
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["1,000", "2,000", "4,000", "8,000"]


@pytest.mark.nightly
def test_backend_by_name(uncompiled, tmp_path, capsys, monkeypatch):
    """Ours runs on it, and every caption says so."""
    seen = []
    original = eager.log_probs
    monkeypatch.setattr(eager, "log_probs", lambda *rest: seen.append(1) or original(*rest))
    given = ["bench", "--shapes", "16x64", "--rounds", "1", "--memory"]
    assert main(given) == 0
    assert not seen
    assert main([*given, "--backend", "torch", "--out", str(tmp_path)]) == 0
    assert seen
    assert "ours on backend='torch'" in capsys.readouterr().out
    assert "ours on backend='torch'" in (tmp_path / "bench.md").read_text()
    monkeypatch.setenv("GRPO_KERNELS_BACKEND", "torch")
    assert report.environment("cpu")["backend"] == "torch"
    assert main([*given, "--backend", "cpu"]) == 2
    assert "GRPO_KERNELS_BACKEND=torch" in capsys.readouterr().err
    monkeypatch.delenv("GRPO_KERNELS_BACKEND")
    monkeypatch.setattr(eager, "unsupported", lambda request: "no such kernels")
    assert main([*given, "--backend", "torch"]) == 2
    assert "--backend torch cannot serve cpu: no such kernels" in capsys.readouterr().err


RESULTS = sorted((Path(__file__).resolve().parent.parent / "benchmarks" / "results").glob("*/"))


@pytest.mark.peers
@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_tables_are_the_committed_data(folder, tmp_path):
    """Redrawn from its .json files, a folder's texts are those that stand there."""
    import redraw

    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    redraw.redraw(tmp_path)
    texts = [*tmp_path.glob("*.md"), *tmp_path.glob("*.csv")]
    assert texts
    for path in texts:
        assert path.read_text() == (folder / path.name).read_text(), path.name


@pytest.mark.parametrize("inplace", [False, True])
def test_surrogates_table(inplace):
    """Every surrogate beside the clip of the same call."""
    import surrogates

    names = [surrogates.label(name, way) for name in surrogates.CHANGES for way in (False, True)]
    times = dict.fromkeys(names, 3.0) | {"Clip()": 6.0, "Clip(), in place": 2.0}
    text = surrogates.table({"environment": report.environment("cpu"), "rows": [row_of(times)]})
    line = next(line for line in text.splitlines() if line.startswith("| `Reinforce()`")).split(" | ")
    assert line[1 + inplace].strip(" |") == ("3.00 (1.50x)" if inplace else "3.00 (0.50x)")


def test_a_benchmark_ends_with_its_table_and_files(tmp_path, capsys):
    """The table is printed; with ``--out`` a new folder gets numbers, table and plot, and without it nothing is
    written."""
    from outputs import Outputs

    ends = Outputs(
        "sums", lambda found: f"{found['sum']}\n", lambda found, path: path.write_bytes(b"plot"), indent=None
    )
    out = ends.parser("Sums.").parse_args(["--out", str(tmp_path / "new" / "folder")]).out
    for folder in (None, out):
        ends.finish({"sum": 3}, folder)
        assert capsys.readouterr().out == "3\n\n"
        assert (folder is not None) == out.is_dir()
    files = {path.name: path.read_text() for path in out.iterdir()}
    assert files == {"sums.json": '{"sum": 3}\n', "sums.md": "3\n", "sums.png": "plot"}


def test_threads_are_set_and_told(tmp_path, monkeypatch):
    """Each provider runs on its own number of threads; the table has speed-ups, and from four numbers on there is a
    plot."""
    import thread_scaling

    monkeypatch.setattr(thread_scaling, "thread_counts", lambda: [1, 2, 4, 8])
    work = Workload(Spec(16, 100, "fp32"))
    made = thread_scaling.providers(work.spec)
    assert [provider.name for provider in made[:3]] == ["ours, 1 thread", "ours, in place, 1 thread", "ours, 2 threads"]
    for provider, count in zip(made, (1, 1, 2, 2, 4, 4, 8, 8), strict=True):
        work.restore()
        measure.step(provider, work)
        assert torch.get_num_threads() == count
    times = {provider.name: 24.0 / (1 + i // 2) for i, provider in enumerate(made)}
    slower = {name: 3 * ms for name, ms in times.items()}
    found = {"environment": report.environment("cpu"), "threads": [1, 2, 4, 8], "rows": [row_of(times)]}
    thread_scaling.OUTPUTS.write(tmp_path, found | {"beside": [row_of(slower)]})
    lines = (tmp_path / "thread_scaling.md").read_text().splitlines()
    assert lines[4] == "| 1 | 24.00 (1.0x, 3.0x) | 24.00 (1.0x, 3.0x) |"
    assert lines[7] == "| 8 | 6.00 (4.0x, 3.0x) | 6.00 (4.0x, 3.0x) |"
    assert (tmp_path / "thread_scaling.png").stat().st_size > 10_000


def test_pages_are_told_by_call_and_state(tmp_path):
    """First and later calls beside those in place, as the system's memory is and fragmented."""
    import pages

    work = Workload(Spec(16, 100, "fp32"))
    made = pages.providers(work.spec)
    assert [provider.name for provider in made] == [*pages.NAMES]
    times = dict(zip(pages.NAMES, (12.0, 10.0, 30.0, 50.0), strict=True))
    row = row_of(times)
    for provider in row["providers"].values():
        provider["first_call_s"] = provider["step_ms"] / 100
    states = {"as it is": [row], "fragmented": [row, row]}
    free = {"as it is": 4321, "fragmented": 7}
    pages.OUTPUTS.write(tmp_path, {"environment": report.environment("cpu"), "states": states, "free_huge_pages": free})
    text = (tmp_path / "pages.md").read_text()
    assert "Free pages of 2 MB: 4,321 as it is, 7 fragmented." in text
    assert f"| {pages.WITHOUT} | {' | '.join(['300 / 30.0 (3.00x)'] * 3)} |" in text


def test_memory_can_be_fragmented(monkeypatch):
    """In small: pages stay spread over all of it."""
    import pages

    monkeypatch.setattr(pages.records, "free_memory", lambda device: 64 << 20)
    before = resident_bytes()
    with pages.fragmented() as left:
        assert left >= 0
        assert resident_bytes() - before < 8 << 20
    assert pages.free_huge_pages() >= 0


def test_the_cost_model_of_ranks():
    """Computed numbers are those of the formulas, and the table has them; what was measured is a share of V's time."""
    import scaling

    for ranks, wire in ((2, "NVLink"), (8, "IB"), (64, "NVLink")):
        bandwidth = scaling.value(wire)
        part = 2 / 3 * (ranks - 1) * scaling.value("F") / (scaling.value("V") * bandwidth)
        assert scaling.hidden_seconds(ranks, wire) / scaling.gemm_seconds(ranks) == pytest.approx(part)
        assert scaling.statistics_seconds(ranks, wire, 1) == pytest.approx(8192 * 16 * (ranks - 1) / bandwidth)
        assert scaling.statistics_seconds(2, wire, 1) == scaling.statistics_seconds(2, wire, 2)
    assert scaling.gemm_seconds(2) == pytest.approx(6 * 8192 * 4096 * 151936 / 2 / 790e12)
    rows = [{"ranks": p, "columns": scaling.VOCAB // p, "ms": [30.0, 90.0 / p + 5, 1e6]} for p in scaling.RANKS]
    gloo = [{"processes": p, "collective": "all-gather", "payload": 128 << 10, "received": 1e6, "seconds": 2e-3}
            for p in scaling.PROCESSES]  # fmt: skip
    found = {"environment": report.environment("cpu"), "gloo": gloo, "load": 3.0}
    text = scaling.text({**found, "compute": {"tokens": 3, "hidden": 5, "rows": rows}})
    line = next(line for line in text.splitlines() if line.startswith("| 2 | 75,968 |")).split(" | ")
    assert line[2:5] == ["52.6 (50.0)", "19.36", "0.15 / 1.34"]
    assert "| 4 | all-gather | 131,072 | 2,000 | 0.50 |" in text
    assert "On GPUs: not yet measured." in text


@pytest.mark.ranks
def test_collectives_are_timed_between_processes():
    """Both collectives, of every size, by as many processes as are asked for."""
    import scaling

    found = scaling.collectives(2)
    assert [(row["collective"], row["payload"]) for row in found] == [
        (name, payload) for payload in scaling.PAYLOADS for name in ("all-gather", "all-to-all")
    ]
    assert all(row["processes"] == 2 and row["seconds"] > 0 for row in found)
    assert [row["received"] / row["payload"] for row in found] == [1.0, 0.5] * 3


def workload_of(tokens: int, kind: str, upstream: float = 1.0) -> dict:
    spec = dataclasses.asdict(Spec(tokens, 64, "fp32", kind=kind, upstream=upstream))
    return spec | {"logits_bytes": 1, "providers": {"a": {"step_ms": 1.0}}}


def test_a_line_is_of_one_kind_of_workload():
    """Two at each place would be a zigzag under one name; what is drawn says which it is."""
    rows = [workload_of(2**i, kind) for i in range(5, 9) for kind in ("half masked", "30 % A = 0")]
    drawn = plot._along(rows, "tokens")
    assert [row["tokens"] for row in drawn] == [32, 64, 128, 256]
    assert len({row["kind"] for row in drawn}) == 1
    assert plot._workload(rows[0]).endswith("fp32, half masked")
    assert plot._workload(workload_of(32, "all", 2.0)).endswith("fp32, upstream 2")
    assert plot._workload(workload_of(32, "all")).endswith("fp32")


def test_what_a_peer_raises_stays_in_its_cell():
    """Of its message the first line, and no bar that parts it."""
    row = workload_of(32, "all") | {"yardstick_ms": None, "hidden": None}
    row["providers"] = {"a": {"failed": "RuntimeError: a | b", "ours": True, "call": ""}}
    (line,) = (
        line
        for line in report.markdown([row], {"machine": "here", "torch": "2", "grpo_kernels": "0"}).splitlines()
        if "RuntimeError" in line
    )
    assert line.replace("\\|", "").count("|") == len(report.COLUMNS) + 1
