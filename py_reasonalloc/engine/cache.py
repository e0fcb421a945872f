"""Where things are kept from one run to the next."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Folder of what is kept from one run to the next; need not exist.

    ``$REASONALLOC_CACHE_DIR``, else inside the user's cache folder. Builds keep their download
    there, too (native/cmake/llama_source.py).
    """
    override = os.environ.get("REASONALLOC_CACHE_DIR")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("reasonalloc", appauthor=False, opinion=False))
