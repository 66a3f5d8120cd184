"""Text that is safe to show."""


def printable(text: str, *, keep_lines: bool = False) -> str:
    """Return a text that a terminal shows as it is: control characters and the like are written as escapes."""
    return "".join(sign if sign.isprintable() or (keep_lines and sign == "\n") else ascii(sign)[1:-1] for sign in text)
