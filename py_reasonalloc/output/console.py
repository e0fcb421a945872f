"""What the commands share: errors become one line and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import click

from ..engine.errors import ConfigError, LibraryError, ReasonAllocError
from ..engine.library import MAX_THREADS, load_library

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

# arguments as checks name them: "seed = x is out of range", "xtc_probability needs a temperature"
_ARGUMENT = re.compile(r"^\w+(?= = )|^\w+_\w+(?= needs | is empty)|(?<= needs )\w+(?= = )")


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
    _open_streams(name)
    try:
        code = command.main(arguments, prog_name=name, standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(code)
    except click.ClickException as error:
        _fail(name, error.format_message(), error.exit_code)
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except ConfigError as error:
        _fail(name, _as_typed(command, str(error)), EXIT_USAGE)
    except (ReasonAllocError, LibraryError) as error:
        _fail(name, str(error), EXIT_FAILURE)
    except MemoryError as error:
        _fail(name, f"not enough memory: {error}".rstrip(": "), EXIT_FAILURE)
    except BrokenPipeError:
        # nobody reads any more: that is no error of anybody's
        _drop_output()
        sys.exit(EXIT_FAILURE)
    except OSError as error:
        # files are seen to where they are read and written; what is left is standard output
        if error.filename is None:
            _drop_output()
        where = error.filename or "standard output: cannot be written"
        _fail(name, f"{where}: {error.strerror or error}", EXIT_FAILURE)


def threads_option(whose: str = "", default: str = "") -> Callable[[Any], Any]:
    """Return the option ``--threads``, bounded as ggml bounds it."""
    return click.option(
        "--threads",
        type=click.IntRange(1, MAX_THREADS),
        help=f"CPU threads{whose}, at most {MAX_THREADS}.{default}",
    )


def listen_options(port: int) -> Callable[[Any], Any]:
    """Return a decorator with the options ``--host`` and ``--port`` of a server."""

    def decorate(function: Any) -> Any:
        function = click.option(
            "--port",
            type=click.IntRange(0, 65535),
            default=port,
            show_default=True,
            help="0: any that is free.",
        )(function)
        return click.option(
            "--host", default="127.0.0.1", show_default=True, help="0.0.0.0: every interface."
        )(function)

    return decorate


def open_library() -> None:
    """Load the native library; from now on an abort inside it ends the command with one line.

    To be called before anything else needs llama_cpp: its errors say what to do.

    Raises
    ------
    LibraryError
        See `load_library`.
    """
    load_library()
    from ..engine.aborts import end_on_abort

    context = click.get_current_context(silent=True)
    end_on_abort("reasonalloc" if context is None else context.find_root().command_path)


def _open_streams(name: str) -> None:
    """See to it that the standard streams are there and take any text."""
    # a file that is opened later must not become standard error
    is_closed = [_is_closed(fd) for fd in range(3)]
    for fd in range(3):
        if is_closed[fd]:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # no debugger, which would write to standard output, where ggml gives up
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    if sys.stdout is None or is_closed[1]:
        _fail(name, "standard output is closed: there is nowhere to write to", EXIT_FAILURE)


def _is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Keep the interpreter from flushing what standard output did not take."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_typed(command: click.Command, message: str) -> str:
    """Return a message with its arguments named as the options that they were typed with."""
    typed = {
        param.name: max(param.opts, key=len)
        for param in command.params
        if isinstance(param, click.Option)
    }
    return _ARGUMENT.sub(lambda found: typed.get(found[0], found[0]), message)


def _fail(name: str, message: str, code: int) -> None:
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(code)
