"""Refuses every connection and name lookup that leaves this computer, in whichever process imports it.

Python imports a module of this name at start-up when its folder is on PYTHONPATH, so the processes that a test starts
are as closed as the test itself.
"""

import ipaddress
import socket

_connect, _connect_ex, _getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


def _refuse_unless_loopback(host) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        allowed = ipaddress.ip_address(name).is_loopback
    except ValueError:
        allowed = False
    if not allowed:
        raise OSError(f"A test tried to reach {name!r}; tests may only talk to this computer.")


def _refuse_unless_local(sock: socket.socket, address) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        _refuse_unless_loopback(address[0])


def connect(self, address):
    _refuse_unless_local(self, address)
    return _connect(self, address)


def connect_ex(self, address):
    _refuse_unless_local(self, address)
    return _connect_ex(self, address)


def getaddrinfo(host, *args, **kwargs):
    _refuse_unless_loopback(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect = connect
socket.socket.connect_ex = connect_ex
socket.getaddrinfo = getaddrinfo
