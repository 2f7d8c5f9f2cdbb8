"""Command line: ``python -m grpo_kernels {info, verify, bench, match, train}``."""

from __future__ import annotations

import argparse
import re
import signal
import sys

from . import __version__, interrupt, streams


def main(argv: list[str] | None = None) -> int:
    """Parse, run and return the exit status."""
    if argv is None:
        streams.mend()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # a reader that is gone shows here at the latest, after --help too
    except BrokenPipeError:
        streams.drop_output()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (ValueError, TypeError) as error:
        streams.say(f"error: {error}")
        return 2
    except OSError as error:  # a disk that is full, a folder that may not be read
        streams.say(f"error: {streams.what_failed(error)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        streams.say(f"error: there is not enough memory for that. {' '.join(str(error).split())}".rstrip())
        return 2


def _is_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether there was no room: PyTorch's allocator of the CPU has no error of its own for that."""
    return isinstance(error, MemoryError) or re.search("allocate memory|out of memory", str(error)) is not None


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
