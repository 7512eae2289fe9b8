"""Text of data, files and other programs, made harmless for a terminal.

Control characters move the cursor, change the title, write the clipboard (OSC 52) or hide what stands before them, and
bidirectional overrides show a text in another order than it has. They are shown as what they are.
"""

import re

# C0 without tab and newline, DEL, C1; marks, embeddings, overrides and isolates of directions; separators of lines.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with every character that a terminal would obey written as its escape, such as ``\\x1b``."""
    return _ACTING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
