"""The page of verdicts: python -m tests.architectures > docs/architectures.md

Words after the command choose classes by their names: ``python -m tests.architectures gemma bart``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers

import tests.architectures as package
from grpo_kernels.verification.progress import progress_bar

from .judge import NO_BUILD, REFUSED, SERVED, WRONG, Verdict, verdict_of
from .tiny import NOT_TEXT, class_names


@dataclass(frozen=True)
class Row:
    name: str
    model_type: str
    verdict: Verdict
    head: str


def row_of(name: str) -> Row:
    verdict, head = verdict_of(name)
    return Row(name, getattr(transformers, name).config_class.model_type, verdict, head)


HEAD = """# Architectures

This page is for whoever has a Hugging Face model, and wants to know whether `attach` serves it without logits.

Every public class of transformers {version} that generates text, by its name or its auto class: a tiny model of it,
with noise on every parameter and every scale, softcap and bias off its identity, in fp32 on a CPU. *Hidden states*
means that log-probs (within 1e-4 nats), loss and the gradient of every parameter are those of `grpo_loss` on the
model's own logits, that the layer which makes these was never applied to their rows, and that without `grpo=` the
model's logits stay as they were, bit for bit. Written by `python -m tests.architectures > docs/architectures.md`;
`tests/test_architectures.py` runs each row again.
"""
COLUMNS = "| class | model type | verdict | head, as measured in the model's own forward |\n| --- | --- | --- | --- |"
NOT_TRIED = "## Not tried"
REASONS = "## Reasons"


def page(rows: Sequence[Row]) -> str:
    """Return the page of these rows. A reason is written once, whatever class and model type it names."""
    reasons = list(dict.fromkeys(_general(row) for row in rows if row.verdict.reason))

    def cell(row: Row) -> str:
        return f"{row.verdict.kind} ({1 + reasons.index(_general(row))})" if row.verdict.reason else row.verdict.kind

    lines = [HEAD.format(version=transformers.__version__), counts(rows), "", COLUMNS]
    lines += [f"| {row.name} | {row.model_type} | {cell(row)} | {row.head} |" for row in rows]
    if reasons:
        lines += ["", REASONS, "", "`CLASS` and `TYPE` stand for those of the row.", ""]
        lines += [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    lines += ["", NOT_TRIED, "", "Classes that have such a name, and give no text:", ""]
    lines += [f"- {name}: {why}" for name, why in NOT_TEXT.items()]
    return "\n".join(lines) + "\n"


def counts(rows: Sequence[Row]) -> str:
    """Return a list of how many rows have each verdict, and their share of those that were built."""
    built = [row for row in rows if row.verdict.kind != NO_BUILD]

    def line(text: str, kind: str) -> str:
        count = sum(row.verdict.kind == kind for row in built)
        return f"- {text}: {count} ({100 * count / max(len(built), 1):.1f} %)"

    return "\n".join(
        (
            f"- built: {len(built)} of {len(rows)} ({100 * len(built) / max(len(rows), 1):.1f} %)",
            line("served from hidden states", SERVED),
            line("refused with a reason", REFUSED),
            line("wrong", WRONG),
        )
    )


def _general(row: Row) -> str:
    """Return a reason without the names of the row."""
    reason = row.verdict.reason.replace("a global forward hook (architectures.heads._call)", "nothing known by name")
    return reason.replace(f"{row.model_type} ({row.name})", "TYPE (CLASS)").replace(row.name, "CLASS")


LINE = re.compile(r"^\| (\w+) \| ([^|]*) \| ([\w ]+?)(?: \((\d+)\))? \| (.*) \|$", re.M)


def read(text: str) -> list[Row]:
    """Return the rows of a page; their reasons are as they are written there."""
    section = text.partition(REASONS)[2].partition(NOT_TRIED)[0]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", section, re.M))
    return [
        Row(name, model_type, Verdict(kind, reasons.get(number, "")), head)
        for name, model_type, kind, number, head in LINE.findall(text)
        if name != "class"
    ]


def main() -> None:
    """Try the chosen classes, every one without words, and print the page."""
    parser = argparse.ArgumentParser("python -m tests.architectures", description=package.__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of the classes, in any case")
    words = [word.lower() for word in parser.parse_args().words]
    torch.set_num_threads(1)
    names = [name for name in class_names() if not words or any(word in name.lower() for word in words)]
    bar, rows = progress_bar(len(names), "architectures", "model"), []
    for name in names:
        rows.append(row_of(name))
        bar.update()
    bar.close()
    sys.stdout.write(page(rows))
