"""Whether a text is speech at all: words, and not the same ones over and over."""

REPEATS = 8  # of one phrase, from which on it is a loop: people say something three times
LEAST = 24  # characters of a loop; shorter ones are a number or an interjection
WINDOW = 200  # words at the end of a text, which a loop would fill
FEWEST, DISTINCT = 40, 0.1  # words from which on they are judged, and the share of them that must differ
EXAMINED = 20_000  # characters at the end: a model that falls into a loop stays in it


def problem(text: str) -> str:
    """What is wrong with a text in words, empty if nothing is; an empty text is for others to judge."""
    said = " ".join(text.split())[-EXAMINED:]
    if not said:
        return ""
    if not any(character.isalnum() for character in said):
        return f"neither letter nor digit: {said[:40]!r}"
    looped, phrase = _loop(said)
    if 2 * looped >= len(said):
        return f"the same over and over: {phrase[:60]!r}"
    words = said.split()[-WINDOW:]
    if len(words) >= FEWEST and len(set(words)) < DISTINCT * len(words):
        return f"{len(set(words))} different words among the last {len(words)}: {' '.join(words[:8])!r}"
    return ""


def _loop(text: str) -> tuple[int, str]:
    """Length and phrase of the longest end of a text that is one phrase, repeated; 0 where there is none.

    By the prefix function of Knuth, Morris and Pratt on the text reversed: a prefix of length n whose longest border
    has length b repeats its first n - b characters.
    """
    backwards = text[::-1]
    borders, longest, phrase = [0] * len(backwards), 0, 0
    for end in range(1, len(backwards)):
        border = borders[end - 1]
        while border and backwards[border] != backwards[end]:
            border = borders[border - 1]
        borders[end] = border + (backwards[border] == backwards[end])
        length, period = end + 1, end + 1 - borders[end]
        if length >= LEAST and length >= REPEATS * period:
            longest, phrase = length, period
    return longest, text[len(text) - phrase :] if phrase else ""
