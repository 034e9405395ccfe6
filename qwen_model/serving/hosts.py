"""Tell which names and addresses are this server's own, so that no other site's name can stand for it in a browser."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Tell whether an address to listen on is reached from this machine alone."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def is_own_host(header: str, allowed: frozenset[str]) -> bool:
    """Tell whether a request with this header Host may be answered; `allowed` has names in lower case.

    A page of another site can let its own name lead to this server (DNS rebinding), and the browser then sends that
    name. It cannot do so with an address, and a browser always sends the header.
    """
    if not header:
        return True
    name = header.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or name in allowed or _address(name) is not None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
