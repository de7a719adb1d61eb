"""Where a server listens: its address for those who use it, and whether something else is there."""

import socket


def address_of(host: str, port: int) -> str:
    """The `http://` address of a server on this computer that listens at `host`, which may be all networks."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def check_free(host: str, port: int) -> None:
    """`OSError` if a server cannot listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"{host} is no address of this computer ({error.strerror}): give another --host.") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended is no obstacle
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(
                f"{host}, port {port}: {error.strerror}. Give another --port (or --host), or end what is there."
            ) from error
