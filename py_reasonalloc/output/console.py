"""What the commands share: errors become one line and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys

import click

from ..engine.errors import ConfigError, LibraryError, ReasonAllocError

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def run_command(command: click.Command, name: str, arguments: list[str] | None = None) -> None:
    """Run a command and exit.

    Parameters
    ----------
    command : click.Command
        Returns its exit code.
    name : str
        What messages start with.
    arguments : list of str, optional
        Default: those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(command.main(arguments, prog_name=name, standalone_mode=False) or 0)
    except click.ClickException as error:
        _fail(name, error.format_message(), error.exit_code)
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except ConfigError as error:
        _fail(name, str(error), EXIT_USAGE)
    except (ReasonAllocError, LibraryError, MemoryError) as error:
        _fail(name, str(error) or "out of memory", EXIT_FAILURE)
    except BrokenPipeError:
        # nobody reads any more: keep the interpreter from flushing into the closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILURE)


def _fail(name: str, message: str, code: int) -> None:
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(code)
