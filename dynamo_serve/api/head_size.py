"""How large the head of a request may be."""

from __future__ import annotations

from dynamo_serve.errors import AddressTooLong, HeadersTooLarge

MAX_URL_BYTES = 8_192
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32_768
MAX_HEAD_BYTES = MAX_URL_BYTES + MAX_HEADER_BYTES + 1024


class HeadSize:
    """Counts one head after the other. Everything returns whether that was too much."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._num_bytes = self._header_bytes = self._num_headers = 0

    def add_bytes(self, num_bytes: int) -> bool:
        """Of what shows nothing yet: the parser shows a header when it has ended."""
        self._num_bytes += num_bytes
        return self._num_bytes > MAX_HEAD_BYTES

    def add_header(self, name: bytes, value: bytes) -> bool:
        self._num_headers += 1
        self._header_bytes += len(name) + len(value)
        return self._num_headers > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES

    def is_too_long(self, url: bytes) -> bool:
        return len(url) > MAX_URL_BYTES


def headers_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"More than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them.")


def address_too_long() -> AddressTooLong:
    return AddressTooLong(f"The address is longer than {MAX_URL_BYTES} bytes.")
