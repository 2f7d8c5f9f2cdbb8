"""Command line: ``python -m grpo_kernels {info, verify, bench, match, train}``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from pathlib import Path

from . import __version__, interrupt


def main(argv: list[str] | None = None) -> int:
    """Parse, run and return the exit status."""
    if argv is None:
        _mend_streams()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # a reader that is gone shows here at the latest, after --help too
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, TypeError) as error:
        _say(f"error: {error}")
        return 2
    except OSError as error:  # a disk that is full, a folder that may not be read
        _say(f"error: {_what_failed(error)}")
        return 2


def _mend_streams() -> None:
    """Put something in the place of streams that the process was started without, before a file of ours gets their
    number; and let none fail for a letter that its encoding lacks."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            null = Path(os.devnull).open("w", encoding="utf-8", errors="replace")  # noqa: SIM115 (until the end)
            setattr(sys, name, null)
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _what_failed(error: OSError) -> str:
    """Return the error, and that it is of standard output where it is: what it writes has no name, and it may have
    more to write."""
    unnamed = error.filename is None and error.errno in (errno.ENOSPC, errno.EIO)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        unnamed = True
    return f"standard output cannot be written: {error.strerror}" if unnamed else str(error)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # of a full disk there is nowhere to tell
        print(text, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """What the interpreter flushes at its end goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str] | None) -> int:
    parser = _parser()
    interrupt.raise_again()  # everything is imported: commands keep what they have
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    with interrupt.sigterm_raises():
        status: int = arguments.run(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, each with the function that runs it as ``run``."""
    from . import info
    from .bench import command as bench
    from .matching import command as match
    from .training import command as train
    from .verification import verify

    parser = argparse.ArgumentParser(
        prog="python -m grpo_kernels",
        description="Fused GRPO-family policy losses.",
        epilog="Begin with info: is the compiled library in use? Then verify: are its gradients right here?",
    )
    parser.add_argument("--version", action="version", version=f"grpo_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module, help_ in (
        ("info", info, "versions, and each backend usable or the reason why not"),
        ("verify", verify, "every backend x preset x dtype against the float64 reference, on this machine"),
        ("bench", bench, "time and memory beside eager PyTorch and torch.compile, on this machine"),
        ("match", match, "name the LossConfig that a loss of your own is, or its fault"),
        ("train", train, "a minimal GRPO loop on a small task"),
    ):
        form = argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=help_, description=module.__doc__, formatter_class=form)
        module.add_arguments(sub)
        sub.set_defaults(run=module.main)
    return parser


if __name__ == "__main__":
    sys.exit(main())
