"""Command line: ``python -m grpo_kernels {info, verify, bench, match, train}``."""

from __future__ import annotations

import argparse
import os
import signal
import sys


def main(argv: list[str] | None = None) -> int:
    """Parse, run and return the exit status."""
    from . import info
    from .bench import command as bench
    from .matching import command as match
    from .training import loop
    from .verification import verify

    parser = argparse.ArgumentParser(prog="python -m grpo_kernels", description="Fused GRPO-family policy losses.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module, help_ in (
        ("info", info, "versions, and each backend usable or the reason why not"),
        ("verify", verify, "every backend x preset x dtype against the float64 reference, on this machine"),
        ("bench", bench, "time and memory beside eager PyTorch and torch.compile, on this machine"),
        ("match", match, "name the LossConfig that a loss of your own is, or its fault"),
        ("train", loop, "a minimal GRPO loop on a small task"),
    ):
        sub = commands.add_parser(name, help=help_, description=module.__doc__, formatter_class=_Formatter)
        module.add_arguments(sub)
        sub.set_defaults(run=module.main)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()  # a reader that is gone shows here at the latest
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return 128 + signal.SIGPIPE
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main())
