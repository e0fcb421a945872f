"""Which policies work by a profile's query centres, and what the library is given of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..engine.errors import ProfileError
from ..profile.files import Profile


def needs_centres(policy: str) -> bool:
    """Whether a policy works by query centres; one that there is not does not."""
    from ..engine import bindings as c

    return any(
        c.ra_policy_name(i) == policy.encode() and c.ra_policy_needs_centres(i)
        for i in range(c.ra_policy_count())
    )


def check_centres(policy: str, profile: object) -> None:
    """Check that a profile, if there is one, has what a policy needs.

    Raises
    ------
    ProfileError
        It holds no query centres.
    """
    if isinstance(profile, Profile) and not profile.centres and needs_centres(policy):
        raise ProfileError(
            f"policy = {policy!r} needs query centres, which the profile "
            f"{profile.source or profile.name} does not hold: measure it anew with "
            "reasonalloc-profile"
        )


def centre_table(profile: Profile) -> npt.NDArray[np.float32]:
    """Return ra_config.centres."""
    return np.frombuffer(profile.centres, "<f4")
