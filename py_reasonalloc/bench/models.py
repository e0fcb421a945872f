"""The model that is measured: a file, or a random one kept in the cache folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from ..engine.cache import user_cache
from ..engine.errors import ConfigError, ModelFileError
from ..engine.modelfile import check_model_file
from ..engine.tempfiles import remove_stale
from .shapes import SHAPES, check_shape_name
from .weights import FORMAT_VERSION, model_bytes, write_model

DEFAULT_WEIGHTS = "q4_0"


def bench_folder() -> Path:
    """Folder of the random models; need not exist. REASONALLOC_CACHE_DIR moves it."""
    return user_cache() / "bench"


def make_bench_folder() -> None:
    """Make the folder for temporary files of the measurements; delete what dead ones left there.

    Raises
    ------
    ModelFileError
        It cannot be made.
    """
    try:
        bench_folder().mkdir(parents=True, exist_ok=True)
        remove_stale(bench_folder())
    except OSError as error:
        raise ModelFileError(f"{bench_folder()}: cannot be made: {error.strerror}") from None


def cached_path(name: str, weights: str) -> Path:
    """Return where the random model of a known shape is kept; equal shapes share a file."""
    first = next(other for other, shape in SHAPES.items() if shape == SHAPES[name])
    return bench_folder() / f"{first}-{weights}-v{FORMAT_VERSION}.gguf"


def model_file(name: str, weights: str, progress: Callable[[int], object] | None = None) -> Path:
    """Return the file of a shape, written now if it is not in the cache folder yet.

    Parameters
    ----------
    name : str
        A key of `SHAPES`, or the path of a model, which is returned as it is.
    weights : str
        One of `WEIGHTS`; not used for a path.
    progress : callable, optional
        See `write_model`.

    Raises
    ------
    ModelFileError
        The path is not a model, or the file cannot be written.
    """
    if name not in SHAPES:
        return Path(check_model_file(name))
    path = cached_path(name, weights)
    if not path.is_file():
        write_model(path, name, SHAPES[name], weights, progress=progress)
    return path


def open_model(name: str, weights: str | None) -> Path:
    """Return the file of a shape, written now (with a progress bar) if it is not there yet.

    Parameters
    ----------
    name : str
        Of a shape, or the path of a model.
    weights : str or None
        Type of a shape's random weights; None: q4_0.

    Raises
    ------
    ConfigError
        No such shape, or `weights` with a path.
    ModelFileError
        The path is not a model, or the file cannot be written.
    """
    check_shape_name(name)
    if name not in SHAPES:
        if weights is not None:
            raise ConfigError("--weights is for the named shapes: a file has weights of its own")
        return model_file(name, DEFAULT_WEIGHTS)
    weights = weights or DEFAULT_WEIGHTS
    if cached_path(name, weights).is_file():
        return cached_path(name, weights)
    length = model_bytes(SHAPES[name], weights)
    bar = click.progressbar(length=length, label=f"writing random {name}", file=sys.stderr)
    with bar as progress:
        return model_file(name, weights, progress.update)
