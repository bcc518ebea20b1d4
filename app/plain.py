"""Text of strangers, made harmless to look at."""

import unicodedata

_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def plain(text: object) -> str:
    """Return untrusted text without controls, for places that take no markup: titles, labels, choices, charts."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _controls(char) else char for char in str(text))


def _controls(char: str) -> bool:
    """Return whether a character moves or turns what stands around it."""
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in _TURNING
