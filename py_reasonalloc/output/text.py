"""Text that is safe on a terminal, and sizes in bytes."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """Return text with everything that is no plain character replaced by a stand-in."""
    return "".join(map(_stand_in, text))


def _stand_in(char: str) -> str:
    if char == "\n":
        return "\u240a"
    code = ord(char)
    if code < 32:
        return chr(0x2400 + code)
    # controls, text direction and other invisible signs, surrogates, private, unassigned
    return "\ufffd" if unicodedata.category(char)[0] in "C" else char


def size(n_bytes: int) -> str:
    """Return bytes in the largest fitting unit, four digits: ``"1.234 MiB"``."""
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{n_bytes} B" if unit == "B" else f"{value:.4g} {unit}"
