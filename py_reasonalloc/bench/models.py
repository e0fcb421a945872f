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
from .shapes import SHAPES, ModelShape, check_shape_name
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


def cached_path(name: str, weights: str, n_layer: int | None = None) -> Path:
    """Return where the random model of a known shape is kept; equal shapes share a file."""
    first = next(other for other, shape in SHAPES.items() if shape == SHAPES[name])
    part = "" if n_layer in (None, SHAPES[name].n_layer) else f"-{n_layer}-layers"
    return bench_folder() / f"{first}{part}-{weights}-v{FORMAT_VERSION}.gguf"


def model_file(
    name: str,
    weights: str,
    progress: Callable[[int], object] | None = None,
    n_layer: int | None = None,
) -> Path:
    """Return the file of a shape, written now if it is not in the cache folder yet.

    Parameters
    ----------
    name : str
        A key of `SHAPES`, or the path of a model, which is returned as it is.
    weights : str
        One of `WEIGHTS`; not used for a path.
    progress : callable, optional
        See `write_model`.
    n_layer : int or None
        Layers of the shape; None: all of them.

    Raises
    ------
    ModelFileError
        The path is not a model, or the file cannot be written.
    """
    if name not in SHAPES:
        return Path(check_model_file(name))
    path = cached_path(name, weights, n_layer)
    if not path.is_file():
        write_model(path, name, chosen_shape(name, n_layer), weights, progress=progress)
    return path


def chosen_shape(name: str, n_layer: int | None) -> ModelShape:
    """Return a shape with so many of its layers (None: all).

    Raises
    ------
    ConfigError
        See `ModelShape.with_layers`.
    """
    return SHAPES[name] if n_layer is None else SHAPES[name].with_layers(n_layer)


def open_model(name: str, weights: str | None, n_layer: int | None = None) -> Path:
    """Return the file of a shape, written now (with a progress bar) if it is not there yet.

    Parameters
    ----------
    name : str
        Of a shape, or the path of a model.
    weights : str or None
        Type of a shape's random weights; None: q4_0.
    n_layer : int or None
        Layers of the shape; None: all of them.

    Raises
    ------
    ConfigError
        No such shape, `weights` or `n_layer` with a path, or a number of layers it cannot have.
    ModelFileError
        The path is not a model, or the file cannot be written.
    """
    check_shape_name(name)
    if name not in SHAPES:
        if weights is not None:
            raise ConfigError("--weights is for the named shapes: a file has weights of its own")
        if n_layer is not None:
            raise ConfigError("--layers is for the named shapes: a file has layers of its own")
        return model_file(name, DEFAULT_WEIGHTS)
    weights = weights or DEFAULT_WEIGHTS
    shape = chosen_shape(name, n_layer)
    path = cached_path(name, weights, n_layer)
    if path.is_file():
        return path
    length = model_bytes(shape, weights)
    bar = click.progressbar(length=length, label=f"writing random {name}", file=sys.stderr)
    with bar as progress:
        return model_file(name, weights, progress.update, n_layer)
