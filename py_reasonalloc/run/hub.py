"""Models from the Hugging Face hub, downloaded once by huggingface_hub, as the bindings do it."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import sys
from pathlib import Path, PurePosixPath

from ..engine.errors import ConfigError, ModelFileError

#: What is taken where nothing is asked for, as llama.cpp does.
PREFERRED = "Q4_K_M"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def check_hub(spec: str) -> tuple[str, str]:
    """Return repository and file pattern of ``REPO[:FILE]``; the pattern may be empty.

    Raises
    ------
    ConfigError
        It is no name of a repository, or huggingface_hub is not installed.
    """
    repo, _, pattern = spec.partition(":")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            "--hf needs huggingface_hub: pip install '.[hub]' in the checkout, or pip install "
            "huggingface_hub"
        )
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = ""
    if repo.count("/") != 1:
        raise ConfigError(f"--hf = {spec!r} is not REPO[:FILE], such as owner/name:*Q8_0.gguf")
    return repo, pattern


def choose_file(names: list[str], pattern: str) -> list[str]:
    """Return the file that a pattern means, and what else belongs to it: the parts of a split one.

    Parameters
    ----------
    names : list of str
        Files of the repository.
    pattern : str
        Of a name, or of a name with its folders, upper or lower case; may have ``*`` in it. Empty:
        the file with `PREFERRED` in its name, or else the only one.

    Raises
    ------
    ModelFileError
        None is meant, or several are.
    """
    models = [name for name in names if name.lower().endswith(".gguf")]
    firsts = [name for name in models if _part(name) in (None, 1)]
    if pattern:
        firsts = [name for name in firsts if _matches(name, pattern)]
    elif len(firsts) > 1:
        firsts = [name for name in firsts if PREFERRED.lower() in name.lower()]
    if len(firsts) != 1:
        if not models:
            raise ModelFileError("the repository has no GGUF file")
        found = ", ".join(sorted(firsts or models)[:12])
        if not pattern:
            raise ModelFileError(f"REPO:FILE must say which file: {found}")
        several = "several files" if firsts else "no GGUF file of the repository"
        raise ModelFileError(f"FILE = {pattern!r} means {several}: {found}")
    (first,) = firsts
    part = _PART.search(first)
    if part is None:
        return [first]
    stem, n = first[: part.start()], int(part[2])
    parts = [f"{stem}-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]
    missing = [name for name in parts if name not in models]
    if missing:
        raise ModelFileError(f"{missing[0]} is not in the repository, but {first} needs it")
    return parts


def _part(name: str) -> int | None:
    found = _PART.search(name)
    return None if found is None else int(found[1])


def _matches(name: str, pattern: str) -> bool:
    names = (name, PurePosixPath(name).name)
    return any(fnmatch.fnmatchcase(n.lower(), pattern.lower()) for n in names)


def hub_model(spec: str) -> Path:
    """Return the model file of ``REPO[:FILE]``, downloaded if it is not in the hub's cache.

    Without a network, what the cache has is taken where FILE is a whole name.

    Raises
    ------
    ConfigError
        See `check_hub`.
    ModelFileError
        The repository has no such file, or cannot be reached.
    """
    repo, pattern = check_hub(spec)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()  # what goes wrong is said once, by us
    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        try:
            files = choose_file(HfApi().list_repo_files(repo), pattern)
        except Exception:  # noqa: BLE001 - no network, in the words of whatever client there is
            if not pattern.lower().endswith(".gguf") or "*" in pattern:
                raise
            files = [pattern]
        paths = [hf_hub_download(repo, name) for name in files]
    except ModelFileError as error:
        raise ModelFileError(f"{repo}: {error}") from None
    except Exception as error:  # noqa: BLE001 - of the hub, of its HTTP client, of the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelFileError(f"{repo}: cannot be taken from the hub: {reason}") from None
    return Path(paths[0])
