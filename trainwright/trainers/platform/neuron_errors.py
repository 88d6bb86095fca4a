"""The Neuron runtime's failures, by its codes and by the lines of its log.

Codes, meanings and lines are those of the Neuron SDK 2.32's documents (libnrt's return codes; the runtime's
troubleshooting guide, "Hardware Errors"). None was seen on a device.
"""

from collections.abc import Sequence

from trainwright.trainers.platform.device_errors import Asks, Known

# What may go before a bare number: the forms in which the runtime's log gives one.
CODE = r"(?:NRT_STATUS\D{1,3}|(?:execute|inference)\b[^\n]{0,300} with (?:err: ?|status )|devices, error: ?)"


def _code(number: int, name: str, *said: str) -> tuple[str, str]:
    """A failure's name with its number, and the pattern of either or of a line of the log."""
    patterns = (rf"\b{name}\b", rf"{CODE}{number}\b", *said)
    return f"{name}, {number}", "|".join(patterns)


# What broke first, then what may only follow from that: a timeout is of the rank that waits, too.
NEURON_ERRORS: Sequence[Known] = (
    Known(
        *_code(
            1205,
            "NRT_EXEC_HW_ERR_REPAIRABLE_HBM_UE",
            r"Uncorrectable HBM memory error[\s\S]{0,120}reload the neuron driver",
        ),
        "the device's memory had an error that a restart of its driver repairs",
        Asks.REBOOT,
    ),
    Known(
        *_code(
            1201, "NRT_EXEC_HW_ERR_HBM_UE", r"Uncorrectable HBM memory error", r"\bHBM_UNCORRECTABLE_ERROR\b"
        ),
        "the device's memory had an error that nothing corrects",
        Asks.REPLACE,
    ),
    Known(
        *_code(
            1202,
            "NRT_EXEC_HW_ERR_NC_UE",
            r"Uncorrectable memory error is detected",
            r"\bSRAM_UNCORRECTABLE_ERROR\b",
        ),
        "a core's own memory had an error that nothing corrects",
        Asks.REPLACE,
    ),
    Known(
        *_code(1203, "NRT_EXEC_HW_ERR_DMA_ABORT", r"DMA [RT]X engine \d+ is in an abort state"),
        "a DMA engine stopped",
        Asks.REPLACE,
    ),
    Known(
        *_code(1004, "NRT_EXEC_COMPLETED_WITH_ERR"),
        "a graph ended with an error, of a core's memory by the vendor's table",
        Asks.REPLACE,
    ),
    Known(*_code(6, "NRT_HW_ERROR"), "the device has failed", Asks.REPLACE),
    Known(
        *_code(4, "NRT_RESOURCE", r"\bNCC_EOOM\d+\b", r"Failed to allocate [\d.]+ ?[KMG]?B\b[^\n]* on ND"),
        "the device's memory is too small for this run",
        Asks.REDUCE,
    ),
    Known(
        *_code(10, "NRT_UNSUPPORTED_NEFF_VERSION", r"NEFF version mismatch"),
        "the runtime can't read what the compiler made",
        Asks.REINSTALL,
        "install compiler and runtime of one release, and empty compile_cache.dir",
    ),
    Known(
        *_code(1003, "NRT_EXEC_COMPLETED_WITH_NUM_ERR", r"\bINFER_ERROR_SUBTYPE_NUMERICAL\b"),
        "a graph made a NaN; the device may go on to tell of it until the process ends",
        Asks.NUMBERS,
        "lower optim.lr or raise optim.warmup_steps, or leave the batch out with "
        "resilience.pass_over_batch=true",
    ),
    Known(
        *_code(9, "NRT_LOAD_NOT_ENOUGH_NC", r"NeuronCore\(s\) not available", r"\bNC (?:is )?in use\b"),
        "another process has the cores",
        Asks.RESTART,
        "end it (neuron-ls names it), and start again",
    ),
    Known(
        *_code(1005, "NRT_EXEC_NC_BUSY"),
        "another process has the core",
        Asks.RESTART,
        "end it (neuron-ls names it), and start again",
    ),
    Known(
        *_code(1204, "NRT_EXEC_SW_NQ_OVERFLOW", r"caused by DGE notifications"),
        "the runtime's queue of notifications was too short",
        Asks.RESTART,
        "start again; if it comes back, with NEURON_RT_ENABLE_DGE_NOTIFICATIONS=0",
    ),
    Known(*_code(1206, "NRT_NETWORK_PROXY_FAILURE"), "the network between the nodes failed", Asks.RESTART),
    Known(*_code(7, "NRT_QUEUE_FULL"), "the device's queue was full", Asks.RESTART),
    Known(*_code(101, "NRT_EXEC_UNIT_UNRECOVERABLE"), "the core takes no more work", Asks.RESTART),
    Known(
        *_code(1200, "NRT_EXEC_HW_ERR_COLLECTIVES", r"suspected hang in collectives"),
        "a collective hung, by another rank's fault as likely as by this one's",
        Asks.RESTART,
    ),
    Known(
        *_code(5, "NRT_TIMEOUT", r"(?:execution|inference) timeout \(\d+ ms\)"),
        "a graph took longer than NEURON_RT_EXEC_TIMEOUT, which a rank that waits for another does",
        Asks.RESTART,
    ),
)
