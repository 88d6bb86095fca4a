"""The machine that a rank is on."""

import socket


def node_name() -> str:
    """What this rank's node is called."""
    return socket.gethostname()
