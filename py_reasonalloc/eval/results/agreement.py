"""What rows must have been made with alike, to stand in one file or in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...engine.errors import ConfigError
from ..cases.methods import profile_of
from .lines import Results, shown

#: The common layer profile, and the protected prompt tokens: not every arm has them.
PROFILE, PROTECT_PROMPT = "profile", "protect_prompt"
#: That of the program that made the file; rows name their own.
VERSION = "version"
_N_SHOWN = 3


def profiles_of(rows: Iterable[Any]) -> dict[str, str]:
    """Return the layer profiles of rows: what their methods call them -> digest, where known.

    Of rows of any format that say method and profile as `Row` does.
    """
    profiles: dict[str, str] = {}
    for row in rows:
        name = profile_of(row.method)
        if name is not None and row.profile is not None:
            profiles.setdefault(name, row.profile)
    return profiles


def versions_of(results: Results) -> Counter[str]:
    """Return the versions of ReasonAlloc that made a file's rows, and how many each made."""
    of_file = results.settings.get(VERSION)
    versions = (row.version or of_file for row in results.rows)
    return Counter(str(version) for version in versions if version is not None)


def notes_of(results: Sequence[Results], versions: Counter[str]) -> list[str]:
    """Return what a reader must know of files: lines that were broken, rows of several versions.

    Parameters
    ----------
    versions : Counter
        `versions_of` all files together.
    """
    notes = [f"{r.path}: its last line was broken and is left out" for r in results if r.n_dropped]
    if len(versions) > 1:
        counts = ", ".join(f"{versions[name]} of {name}" for name in sorted(versions))
        notes.append(f"rows are of several versions of reasonalloc: {counts}")
    return notes


def check_same(
    settings: dict[str, Any],
    other: Results,
    methods: Iterable[str],
    profiles: Mapping[str, str],
    mix_versions: bool = False,
) -> None:
    """Raise ConfigError unless rows can stand beside those of a file: it names what differs.

    The common profile must be the same only where an arm uses it. Protected prompt tokens are only
    of arms with a budget: None where there is none yet, and then the rows are asked.

    Parameters
    ----------
    settings : dict
        What the new rows are made with.
    other : Results
        The file.
    methods : iterable of str
        Labels of the new rows' methods.
    profiles : mapping
        Their profiles; see `profiles_of`. What is not known on one side is not compared.
    mix_versions : bool
        Let rows of other versions of ReasonAlloc stand beside them.
    """
    missing = object()
    differing = [
        name
        for name in dict.fromkeys([*settings, *other.settings])
        if name != VERSION and settings.get(name, missing) != other.settings.get(name, missing)
    ]
    all_methods = {*methods, *(row.method for row in other.rows)}
    if PROFILE in differing and not any(profile_of(method) == "" for method in all_methods):
        differing.remove(PROFILE)
    if PROTECT_PROMPT in differing and _is_protection_the_same(settings, other):
        differing.remove(PROTECT_PROMPT)
    if differing:
        parts = [
            f"{name} = {_value(other.settings, name)} there, {_value(settings, name)} here"
            for name in differing[:_N_SHOWN]
        ]
        n_more = len(differing) - _N_SHOWN
        parts += [f"and {n_more} more"] if n_more > 0 else []
        raise ConfigError(f"{other.path}: made with other settings: {'; '.join(parts)}")
    _check_profiles(other, profiles)
    strange = [version for version in versions_of(other) if version != settings.get(VERSION)]
    if strange and not mix_versions:
        raise ConfigError(
            f"{other.path}: has rows of reasonalloc {strange[0]}, these are of "
            f"{settings.get(VERSION, 'an unknown version')}: use one version, or one file for "
            "each, or pass --mix-versions (rows name theirs)"
        )


def _check_profiles(other: Results, profiles: Mapping[str, str]) -> None:
    for row in other.rows:
        name = profile_of(row.method)
        if name is None or row.profile is None or profiles.get(name, row.profile) == row.profile:
            continue
        if name == "":
            raise ConfigError(
                f"{other.path}: {row.method} there has another layer profile than here: pass that "
                "one (--profile FILE), or another results file"
            )
        raise ConfigError(
            f"{other.path}: {row.method} there was made before {name} changed: give the new "
            "profile another name, or pass another results file"
        )


def _is_protection_the_same(settings: dict[str, Any], other: Results) -> bool:
    """Tell whether settings that differ in their protected prompt tokens can be compared still."""
    if PROTECT_PROMPT not in settings or PROTECT_PROMPT not in other.settings:
        return False
    here, there = settings[PROTECT_PROMPT], other.settings[PROTECT_PROMPT]
    if here is None:
        return True
    return there is None and all(
        row.n_protect == min(here, row.n_prompt)
        for row in other.rows
        if row.budget > 0 and row.n_protect is not None
    )


def protection_there(other: Results) -> int | None:
    """Return how many prompt tokens at most are protected in a file; None: it does not say."""
    value = other.settings.get(PROTECT_PROMPT)
    if value is not None:
        return int(value)
    known = [row.n_protect for row in other.rows if row.budget > 0 and row.n_protect is not None]
    return max(known, default=None)


def _value(settings: dict[str, Any], name: str) -> str:
    return shown(settings[name]) if name in settings else "nothing"
