"""Which conversations came before, in about 22 bytes each."""

LINE = 6
BUCKETS = 1 << 16


class Seen:
    """First line of each digest: a dictionary of 16-byte digests to numbers, without an object for either."""

    def __init__(self) -> None:
        self._buckets: list[bytearray | None] = [None] * BUCKETS

    def setdefault(self, digest: bytes, line: int) -> int:
        """The line noted for a digest; ``line`` is noted where there is none.

        Args:
            digest: 16 bytes.
            line: from 0 to 2**48 - 1.
        """
        number, rest = int.from_bytes(digest[:2]), digest[2:]
        bucket = self._buckets[number]
        if bucket is None:
            bucket = self._buckets[number] = bytearray()
        entry = len(rest) + LINE
        at = bucket.find(rest)
        while at >= 0 and at % entry:
            at = bucket.find(rest, at + 1)
        if at >= 0:
            return int.from_bytes(bucket[at + len(rest) : at + entry])
        bucket += rest + line.to_bytes(LINE)
        return line
