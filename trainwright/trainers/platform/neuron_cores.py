"""The devices and cores of a node, as neuron-ls lists them. No torch: the supervisor counts them, too."""

import json
import os
from typing import Any

from trainwright.errors import BadRequest
from trainwright.trainers.platform.tools import Unavailable, output_of

TIMEOUT = 20.0  # seconds
LNC, DEFAULT_LNC = "NEURON_LOGICAL_NC_CONFIG", "2"


def neuron_cores() -> int:
    """How many logical cores the node has, each of which a rank can have.

    Raises:
        Unavailable: neuron-ls doesn't say.
    """
    return sum(number_at(device, "nc_count") for device in listed_devices())


def ranks_by_cores() -> int:
    """The same, of a node that is to run ranks.

    Raises:
        BadRequest: there are none, or they can't be counted.
    """
    cores_in_one()
    try:
        count = neuron_cores()
    except Unavailable as error:
        raise BadRequest(
            f"neuron-ls can't count this node's cores ({error}): install aws-neuronx-tools, or give "
            "launch.procs_per_node"
        ) from None
    if count == 0:
        raise BadRequest(
            "neuron-ls lists no core of this node: load its driver (aws-neuronx-dkms), or give "
            "launch.procs_per_node"
        )
    return count


def cores_in_one() -> int:
    """How many physical cores a logical one is.

    Raises:
        BadRequest: the environment says what is no such number.
    """
    said = os.environ.get(LNC, DEFAULT_LNC)
    if said not in ("1", "2"):
        raise BadRequest(f"{LNC}={said} in the environment must be 1 or 2: unset it, or make it so")
    return int(said)


def listed_devices() -> list[dict[str, Any]]:
    """What neuron-ls says of each device.

    Raises:
        Unavailable: nothing that can be read.
    """
    try:
        said = json.loads(output_of("neuron-ls", "--json-output", timeout=TIMEOUT))
    except ValueError:
        raise Unavailable("its report can't be read") from None
    return [device for device in said if isinstance(device, dict)] if isinstance(said, list) else []


def number_at(of: dict[str, Any], key: str) -> int:
    """The number there; 0 where none is."""
    value = of.get(key)
    return value if isinstance(value, int) else 0
