"""Image files from the web, in bounded time and memory, and never from the machine that asks.

An address may come from a stranger's data set. Only http and https are followed, each connection of each redirect is
made to an address of the public internet, and an answer may take so long and be so large. Whoever wants images from a
server of their own sets the environment variable SEGCOMPASS_LOCAL_URLS=1. Knows nothing about images.
"""

import http.client
import ipaddress
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

MAX_BYTES = 100_000_000
SECONDS = 20.0
"""Longest wait for a connection or for the next part of an answer."""
TOTAL_SECONDS = 60.0
"""Longest time for a whole file."""
LOCAL_URLS = "SEGCOMPASS_LOCAL_URLS"


def fetch(address: str, max_bytes: int = MAX_BYTES, seconds: float = SECONDS, total: float = TOTAL_SECONDS) -> bytes:
    """The file at an address.

    Args:
        address: begins with http:// or https://.
        max_bytes: a larger file is refused.
        seconds: longest wait for a connection or for the next part of the answer.
        total: longest time for the whole file.

    Returns:
        The file's content.

    Raises:
        ValueError: another kind of address, one in a local network, or too large a file.
        OSError: no answer, or none in time.

    Example:
        >>> fetch("file:///etc/hostname")
        Traceback (most recent call last):
        ValueError: the address 'file:///etc/hostname' is not http or https; download the file and give its path.
    """
    _check_scheme(address)
    proxied = urllib.parse.urlsplit(address).scheme in urllib.request.getproxies()
    if proxied:  # the proxy is what is connected to; what it may reach is its own rule, but for addresses in plain view
        _check_plain(address)
    handlers: list[Any] = [_Redirects()] if proxied else [_Redirects(), _Http(), _Https()]
    opener = urllib.request.build_opener(*handlers)
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (segcompass)"})
    end = time.monotonic() + total
    try:
        with opener.open(request, timeout=min(seconds, total)) as answer:
            content = bytearray()
            while part := answer.read1(1 << 16):
                content += part
                if len(content) > max_bytes:
                    raise ValueError(f"the file at {address[:200]!r} has more than {max_bytes:,} bytes; use a smaller.")
                if time.monotonic() > end:
                    raise TimeoutError(
                        f"the file at {address[:200]!r} took longer than {total:g} s; download it first."
                    )
    except urllib.error.URLError as error:
        if isinstance(error.reason, ValueError):
            raise error.reason from None
        raise
    except http.client.HTTPException as error:
        raise OSError(f"the answer of {address[:200]!r} is broken: {error!r}") from error
    return bytes(content)


def _check_scheme(address: str) -> None:
    """Raises ValueError for anything but http and https."""
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"the address {address[:200]!r} is not http or https; download the file and give its path.")


def _check_plain(address: str) -> None:
    """Raises ValueError when the host of an address is written as one of a local network."""
    host = urllib.parse.urlsplit(address).hostname or ""
    try:
        _check_public(ipaddress.ip_address(host), host)
    except ValueError as error:
        if "network" in str(error) or host.lower().split(".")[-1] in ("localhost", "local", "internal"):
            raise ValueError(_refusal(host)) from None


def _check_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, host: str) -> None:
    """Raises ValueError for an address that is not of the public internet."""
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    if not mapped.is_global or mapped.is_multicast:
        raise ValueError(_refusal(host))


def _refusal(host: str) -> str:
    return (
        f"the host {host[:200]!r} lies in a local network, which addresses of images may not name; set {LOCAL_URLS}=1 "
        "if it is a server of your own."
    )


def _connect(address: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
    """As `socket.create_connection`, to public addresses alone: what was checked is what is connected to."""
    host, port = address
    failure: OSError = OSError(f"the host {host[:200]!r} has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        if os.environ.get(LOCAL_URLS) != "1":
            _check_public(ipaddress.ip_address(str(place[0]).split("%")[0]), host)
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            if source_address:
                connection.bind(source_address)
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https alone (urllib itself would also follow ftp)."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_scheme(newurl)
        if newurl and urllib.parse.urlsplit(newurl).scheme in urllib.request.getproxies():
            _check_plain(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _checked(kind: type) -> Any:
    """A connection of http.client that is made by `_connect`."""

    def make(*args, **kwargs):
        connection = kind(*args, **kwargs)
        connection._create_connection = _connect
        return connection

    return make


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req):
        return self.do_open(_checked(http.client.HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req):
        return self.do_open(_checked(http.client.HTTPSConnection), req)
