"""The documents run, lead somewhere, and say what code, results and settings say."""

from __future__ import annotations

import re
import shlex
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import readme
import torch

import grpo_kernels
from grpo_kernels import __main__ as command_line
from grpo_kernels import info
from grpo_kernels.backends import triton as triton_backend
from grpo_kernels.bench import command as bench
from grpo_kernels.matching import command as match
from grpo_kernels.objectives.aggregation import AGGREGATIONS
from grpo_kernels.objectives.levels import LEVELS
from grpo_kernels.objectives.metrics import REPORTED
from grpo_kernels.training import command as train
from grpo_kernels.verification import verify

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES])
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(path.read_text()) if kind == language]


def without_blocks(path: Path) -> str:
    return FENCED.sub("", path.read_text())


def section(path: Path, marker: str) -> str:
    found = re.search(rf"<!-- {re.escape(marker)}.*?-->\n(.*?)<!-- end -->", path.read_text(), re.S)
    assert found, marker
    return found[1].strip()


def rows_of(text: str) -> Iterator[list[str]]:
    """Return the cells of every row of every table but its rules."""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("| ---"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def run_blocks(path: Path) -> Iterator[tuple[str, dict]]:
    """Run a document's blocks in order, in one namespace, as a reader would paste them; yield each when it has run."""
    torch.use_deterministic_algorithms(False)
    namespace: dict = {}
    for block in blocks(path, "python"):
        exec(compile(block, name_of(path), "exec"), namespace)
        yield block, namespace


OF_THE_HUB = ROOT / "docs" / "hub.md"
"""Its blocks need a package of the peers': tests/test_hub.py runs them."""
RUNS = [path for path in (README, *PAGES) if blocks(path, "python") and path != OF_THE_HUB]


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_every_block_runs(path):
    """Each document stands alone."""
    assert list(run_blocks(path))


def test_the_documents_that_show_code_are_run():
    assert len(RUNS) >= 7
    assert README in RUNS


def test_after_is_before():
    """README's two blocks have one loss and one gradient."""
    wanted = None
    for block, namespace in run_blocks(README):
        if block.startswith("# before"):
            wanted = namespace["loss"].item(), namespace["logits"].grad.clone()
            namespace["logits"].grad = None
        if block.startswith("# after"):
            assert namespace["out"].loss.item() == pytest.approx(wanted[0], rel=1e-5, abs=1e-7)
            torch.testing.assert_close(namespace["logits"].grad, wanted[1], rtol=1e-4, atol=1e-8)
            return
    pytest.fail("no block begins with # after")


def test_what_match_says_is_what_it_prints():
    path = ROOT / "docs" / "match.md"
    shadowed = False
    for block, namespace in run_blocks(path):
        if block.startswith("from grpo_kernels import match"):
            printed = str(grpo_kernels.match(namespace["my_loss"])).splitlines()
            shown = blocks(path, "text")[0].splitlines()
            assert printed.pop(1).startswith("  on two batches, gradients differ by up to")
            assert shown.pop(1).startswith("  on two batches, gradients differ by up to")
            assert shown == printed
        if block.startswith("def adaptive"):
            assert blocks(path, "text")[1].splitlines() == [namespace["report"].strange[0]]
        if block.startswith("from grpo_kernels import shadow"):
            shadowed = True
            assert namespace["loss_fn"].history[0].gradient_difference < 1e-5
    assert shadowed


def test_readme_is_read_in_four_minutes():
    """One screen to the status, 150 lines in all, 700 words beside code, tables and addresses."""
    assert len(README.read_text().splitlines()) <= 150
    lines = without_blocks(README).splitlines()
    prose = " ".join(line for line in lines if not line.startswith(("|", "![", "<!--")))
    assert len(re.sub(r"\]\([^)]*\)", "]", prose).split()) <= 700


def test_readme_begins_with_the_status():
    """Its first table says in its first row that no GPU kernel has run on a GPU, for as long as that is true."""
    rows = rows_of(README.read_text())
    assert next(rows)[0] == "backend"
    proven = grpo_kernels.backends.get("cuda").PROVEN
    assert ("no GPU kernel has run on a GPU yet" in next(rows)[2]) == (not proven)


@pytest.mark.parametrize("path", [*PAGES, ROOT / "PUBLISHING.md", ROOT / "SECURITY.md"], ids=name_of)
def test_a_page_says_first_who_needs_it(path):
    assert re.match(r"# .+\n\nThis page is for (whoever|everyone) [^\n.]+[.,:]", path.read_text())


def test_presets_table():
    assert section(ROOT / "docs" / "objectives.md", "presets") == info.presets_table()


def test_surrogates_table():
    assert section(ROOT / "docs" / "objectives.md", "surrogates") == info.surrogates_table()


def test_metrics_table():
    assert section(ROOT / "docs" / "calls.md", "metrics") == info.metrics_table()


LOGGERS = {"Weights & Biases": "wandb", "MLflow": "mlflow", "TensorBoard": "tensorboard"}


def logger_lines() -> dict[str, str]:
    """The one-liners of docs/calls.md, by package."""
    rows = (row for row in rows_of((ROOT / "docs" / "calls.md").read_text()) if row[0] in LOGGERS)
    return {LOGGERS[name]: line.strip("`") for name, line in rows}


def logged_metrics() -> grpo_kernels.Metrics:
    logits, ids = torch.randn(2, 3, 11), torch.randint(11, (2, 3))
    return grpo_kernels.grpo_loss(logits, ids, torch.ones(2), old_log_probs=torch.full((2, 3), -2.4)).metrics


@pytest.mark.parametrize("package", LOGGERS.values())
def test_lines_for_loggers(package):
    """Their calls, as the packages have them, get every metric as a float."""
    seen = {}

    def log(data, step=None):
        seen.update(data | {"step": step})

    def log_metrics(metrics, step=None):
        log(metrics, step)

    def add_scalar(tag, scalar_value, global_step=None):
        log({tag: scalar_value}, global_step)

    calls = {"log": log, "log_metrics": log_metrics, "add_scalar": add_scalar}
    stand_in = types.SimpleNamespace(**calls)
    metrics = logged_metrics()
    exec(logger_lines()[package], {"metrics": metrics, "step": 7, "writer": stand_in, package: stand_in})
    assert seen.pop("step") == 7
    assert seen == {f"train/{name}": value.item() for name, value in metrics.as_dict().items()}
    assert all(type(value) is float for value in seen.values())


@pytest.mark.parametrize("package", LOGGERS.values())
def test_lines_for_loggers_beside_the_packages(package, tmp_path, monkeypatch):
    """What the packages keep, where they are installed."""
    pytest.importorskip(package)
    metrics = logged_metrics()
    given = {"metrics": metrics, "step": 7}
    if package == "wandb":
        import wandb

        with wandb.init(mode="offline", dir=tmp_path) as run:
            exec(logger_lines()[package], given | {"wandb": wandb})
            wandb.log({}, step=8)  # which ends step 7
            kept = {name: run.summary[name] for name in metrics.floats("train/")}
    elif package == "mlflow":
        import mlflow

        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what its part without a database keeps runs in
        mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
        with mlflow.start_run() as run:
            exec(logger_lines()[package], given | {"mlflow": mlflow})
        kept = mlflow.get_run(run.info.run_id).data.metrics
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(tmp_path) as writer:
            exec(logger_lines()[package], given | {"writer": writer})
        events = EventAccumulator(str(tmp_path)).Reload()
        kept = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    for name, value in metrics.floats("train/").items():
        assert kept[name] == pytest.approx(value, rel=1e-6), name


def test_levels_and_aggregations_have_their_rows():
    first = {row[0].strip("`") for row in rows_of((ROOT / "docs" / "objectives.md").read_text())}
    assert {*LEVELS, *AGGREGATIONS} <= first


FIGURES = {
    "training_step",
    "loss_headline",
    "loss_logits_summary",
    "loss_hidden_summary",
    "train_sort",
    "distill_sort",
    "divergence",
    "trl_step",
    "trl_functions",
    "system_steps",
    "surrogates",
    "scaling",
    "pages",
    "thread_scaling",
    "short_calls",
}


def test_every_figure_stands_somewhere():
    marked = {path: set(re.findall(r"<!-- figures: (\w+) -->", path.read_text())) for path in DOCUMENTS}
    assert set().union(*marked.values()) == FIGURES
    assert "loss_headline" in marked[README]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_figures_are_the_committed_results(path):
    """No figure by hand: the table is a results file, whole."""
    text = path.read_text()
    assert text.count("<!-- figures: ") == len(readme.SECTION.findall(text))
    assert path in readme.documents()
    assert readme.filled(text) == text


def test_names_in_the_text_exist():
    """`metrics` and public names that README and the pages mention."""
    text = "\n".join(path.read_text() for path in (README, *PAGES))
    metrics = re.findall(r"metrics\.(\w+)", text)
    assert metrics
    for name in metrics:
        assert name in REPORTED or hasattr(grpo_kernels.Metrics, name), name
    for name in grpo_kernels.__all__:
        documented = getattr(grpo_kernels, name).__doc__
        assert documented, name
    imported = re.findall(r"from grpo_kernels import (.*)", text)
    assert imported
    for name in {name.strip() for line in imported for name in line.split(",")}:
        assert name in grpo_kernels.__all__, name


def anchors(path: Path) -> set[str]:
    """Return the anchors that a site makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(path), re.M)
    plain = (re.sub(r"\]\([^)]*\)", "", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def links(path: Path) -> list[str]:
    return re.findall(r"\]\((?!http)([^)\s]+)\)", without_blocks(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    """To a file of the repository, and to a heading of it where an anchor is named."""
    for target in links(path):
        place, _, anchor = target.partition("#")
        there = (path.parent / place).resolve() if place else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


def test_every_document_is_found():
    """README leads to the index of docs/, and the index to every document."""
    index = ROOT / "docs" / "README.md"
    assert index in linked_from(README)
    assert {*DOCUMENTS} - {index} <= linked_from(index)


def linked_from(path: Path) -> set[Path]:
    return {(path.parent / target.partition("#")[0]).resolve() for target in links(path)}


def commands(path: Path) -> Iterator[list[str]]:
    """Return the words of every command in a document's shell blocks and in its text."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    lines += re.findall(r"`((?:python|make) [^`\n]*)`", without_blocks(path))
    for line in lines:
        for part in re.split(r"&& |# or: | > ", line):
            words = shlex.split(part, comments=True)
            if words and "|" not in words:
                yield words


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_exist(path, monkeypatch, capsys):
    """The parser takes each command of the package and has its options by these names; scripts, their options and
    make's targets are there."""
    for module in (info, verify, bench, match, train):
        monkeypatch.setattr(module, "main", lambda arguments: 0)
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split()
    for words in commands(path):
        words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[:3] == ["python", "-m", "grpo_kernels"] and words[3:]:
            assert exit_status(words[3:]) == 0, words
            assert exit_status([words[3], "--help"]) == 0
            options = capsys.readouterr().out.split()
            assert all(word in options or f"[{word}]" in options for word in options_of(words)), words
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            source = (ROOT / words[1]).read_text()
            if "OUTPUTS.parser(" in source:
                source += (ROOT / "benchmarks" / "outputs.py").read_text()
            assert all(f'"{word}"' in source for word in options_of(words)), words


def options_of(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("--")]


def exit_status(arguments: list[str]) -> int | str | None:
    try:
        return command_line.main(arguments)
    except SystemExit as end:
        return end.code


OUTSIDE = ("https://arxiv.org/", "https://semver.org/")
"""What documents may lead to outside: papers and standards."""
ADDRESS = re.compile(
    r"https?://[^\s)>\]\"'`|]+"
    r"|git@[\w.]+"
    r"|\b(?:[\w-]+\.)*(?:github|gitlab|pypi|readthedocs|huggingface)\.(?:com|org|io|co)\b[^\s)>\]\"'`|]*"
    r"|\b[\w.+-]+@[\w-]+\.[a-z]{2,}"
)


def published_addresses() -> tuple[str, ...]:
    """Return what a publisher has filled in."""
    values = [row[1] for row in rows_of((ROOT / "PUBLISHING.md").read_text())][1:]
    assert len(values) == 7
    return tuple(value.strip("<>`") for value in values if value != "not set")


def test_no_address_of_the_project_is_invented():
    """What only a publisher knows stands in PUBLISHING.md, and elsewhere only once it stands there."""
    allowed = (*OUTSIDE, *published_addresses())
    for path in (*DOCUMENTS, ROOT / "CITATION.cff", ROOT / "pyproject.toml", ROOT / "setup.py"):
        if path.name != "PUBLISHING.md":
            for address in ADDRESS.findall(path.read_text()):
                assert address.startswith(allowed), f"{name_of(path)}: {address}"


def test_citation_has_the_version():
    assert f"\nversion: {grpo_kernels.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def as_told(specifier: str) -> str:
    """'>=1.16,<1.17' is told as '1.16, below 1.17'."""
    least, _, below = specifier.removeprefix(">=").partition(",<")
    return f"{least}, below {below}" if below else f"{least} or later"


def test_versions_are_those_of_the_settings():
    """docs/versions.md and pyproject.toml, constraints.txt, the Triton backend."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
    ]
    needed = {
        name.replace("-", "_"): rest for name, rest in re.findall(r"^([\w-]+)(>=\S+)$", "\n".join(required), re.M)
    }
    needed |= {
        "Python": project["requires-python"],
        "triton": f">={'.'.join(map(str, triton_backend._MINIMUM_TRITON))}",
    }
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    compared = set()
    for package, least, pin, *_ in rows_of((ROOT / "docs" / "versions.md").read_text()):
        name = match_[1] if (match_ := re.search(r"`(\w+)`", package)) else package
        if name in needed:
            assert least == as_told(needed[name]), name
        if name in pinned:
            assert pin == pinned[name], name
        compared |= {name} & {*needed, *pinned}
    assert {"Python", "torch", "triton", "transformers", "trl", "liger_kernel"} <= compared


def test_variables_of_the_environment():
    """docs/devices.md has each that the package or its installation reads."""
    sources = "\n".join(path.read_text() for path in (*(ROOT / "grpo_kernels").rglob("*.py"), ROOT / "setup.py"))
    rows = {
        name for row in rows_of((ROOT / "docs" / "devices.md").read_text()) for name in re.findall(r"`(\w+)`", row[0])
    }
    assert {name for name in rows if name.startswith("GRPO_")} == set(re.findall(r"GRPO_KERNELS_[A-Z_]+", sources))


def test_architecture_names_what_is_public():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    listed = text[text.index("## 3.") : text.index("## 4.")]
    for name in grpo_kernels.__all__:
        assert re.search(rf"`{name}\b", listed), name


def test_tree_of_the_architecture():
    """Every module of the package has its place in ARCHITECTURE.md."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = list((ROOT / "grpo_kernels").glob("*.py"))
    assert paths
    for path in paths:
        assert path.name in text, path.name


def test_contributing_names_what_is_there():
    """Every file and folder of the table "to change, look at"."""
    folders = ("grpo_kernels", "csrc", "benchmarks", "tests", "docs", "release")
    every = {path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).rglob("*")}
    every |= {path.name for path in ROOT.iterdir()}
    rows = [row for row in rows_of((ROOT / "CONTRIBUTING.md").read_text()) if len(row) == 2]
    named = [name for row in rows for name in re.findall(r"`([\w/]+(?:\.(?:py|h|cpp|cu|json|md|toml)|/))`", row[1])]
    assert len(named) > 40
    for name in named:
        assert any(f"/{path}".endswith(f"/{name.rstrip('/')}") for path in every), name


@pytest.mark.peers
def test_switching_pays_no_price():
    """Every block of SWITCHING.md runs, and each "after" has the loss and the gradients of its "before"."""
    for package in ("trl", "peft", "accelerate"):
        pytest.importorskip(package)
    wanted, compared = None, 0
    for block, namespace in run_blocks(ROOT / "SWITCHING.md"):
        if not block.startswith(("# before", "# after")):
            continue
        found = {name: p.grad for name, p in namespace["model"].named_parameters() if p.grad is not None}
        if block.startswith("# before"):
            wanted = float(namespace["loss"]), found
            continue
        assert float(namespace["loss"]) == pytest.approx(wanted[0], rel=1e-5, abs=1e-7)
        assert found.keys() == wanted[1].keys()
        largest = max(float(gradient.abs().max()) for gradient in found.values())
        assert largest > 1e-5
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[1][name], rtol=1e-3, atol=1e-5 * largest, msg=name)
        compared += 1
    assert compared == 6
