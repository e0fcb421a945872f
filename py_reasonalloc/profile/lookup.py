"""Which profile a model gets: an explicit file, one calibrated here, or a shipped one.

Order of ``"auto"``: the user's cache folder, by the model file's fingerprint; then the shipped
profiles, by family and architecture. A profile whose layer count differs is never taken.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..engine.cache import user_cache
from ..engine.errors import ProfileError
from ..engine.identity import ModelIdentity, read_identity
from .files import FORMAT_VERSION, Profile, load_profile, profiles_folder

AUTO = "auto"


def cache_folder() -> Path:
    """Folder of the profiles that were calibrated here; need not exist."""
    return user_cache() / f"profiles-{FORMAT_VERSION}"


def cached_path(identity: ModelIdentity) -> Path:
    """Return where the profile of this very model file is kept."""
    return cache_folder() / (identity.fingerprint.partition(":")[2] + ".json")


def save_to_cache(profile: Profile, identity: ModelIdentity) -> Path:
    """Keep a profile for this model file; returns where.

    Raises
    ------
    ProfileError
        The cache cannot be written.
    """
    path = cached_path(identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfileError(
            f"{path.parent}: cannot be made: {error.strerror} (REASONALLOC_CACHE_DIR names another)"
        ) from None
    profile.save(path)
    return path


def shipped_profiles() -> tuple[Profile, ...]:
    """Return the profiles that come with the package, by name."""
    files = sorted(profiles_folder().glob("*.json"))
    return tuple(load_profile(file, source=file.stem) for file in files)


def find_profile(model_path: str | os.PathLike[str], with_curves: bool = False) -> Profile | None:
    """Return the profile that fits a model file best, None if none does; see `find_profiles`.

    Parameters
    ----------
    with_curves : bool
        Take only one that has error curves.
    """
    fitting = find_profiles(model_path)
    return next((p for p in fitting if p.head_error is not None or not with_curves), None)


def find_profiles(model_path: str | os.PathLike[str]) -> list[Profile]:
    """Return all profiles that fit a model file, the best first.

    Raises
    ------
    ModelFileError
        The model file cannot be read.
    ProfileError
        A file in the cache or among the shipped profiles is damaged.
    """
    identity = read_identity(model_path)
    cached = cached_path(identity)
    own = [load_profile(cached)] if cached.is_file() else []
    own = [profile for profile in own if profile.n_layer == identity.n_layer]
    fitting = [
        profile
        for profile in shipped_profiles()
        if profile.family in identity.families
        and profile.architecture == identity.architecture
        and profile.n_layer == identity.n_layer
        and _same_heads(profile, identity)
    ]
    # the most telling name first; of several profiles of a family one with a horizon, the newest
    fitting.sort(key=lambda p: (p.horizon > 0, p.date), reverse=True)
    fitting.sort(key=lambda p: identity.families.index(p.family))
    return own + fitting


def resolve_profile(
    model_path: str | os.PathLike[str],
    wanted: str | os.PathLike[str] | Profile | None,
    with_curves: bool = False,
) -> Profile | None:
    """Return the profile that somebody asked for.

    Parameters
    ----------
    wanted : "auto", path, Profile or None
        "auto" looks for one; a path is read; a Profile is checked; None stays None.
    with_curves : bool
        "auto" takes only one that has error curves.

    Raises
    ------
    ProfileError
        The profile is not valid, or is for another number of layers.
    """
    if wanted is None:
        return None
    if wanted == AUTO:
        return find_profile(model_path, with_curves)
    profile = wanted if isinstance(wanted, Profile) else load_profile(wanted)
    n_layer = read_identity(model_path).n_layer
    if profile.n_layer != n_layer:
        raise ProfileError(
            f"{profile.source or profile.name}: n_layer: {profile.n_layer}, but {model_path} has "
            f"{n_layer} layers"
        )
    return profile


def _same_heads(profile: Profile, identity: ModelIdentity) -> bool:
    """Whether the KV heads are those of the file, but for layers that have no budget (0)."""
    sides = [
        [heads] * profile.n_layer if isinstance(heads, int) else list(heads)
        for heads in (profile.n_head_kv, identity.n_head_kv)
    ]
    return len(sides[0]) == len(sides[1]) and all(a in (0, b) for a, b in zip(*sides))
