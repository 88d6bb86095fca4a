"""The blocks of `gate_up_proj`: the model stores by them, and the check of a recipe counts them."""


def gate_up_block(intermediate_size: int) -> int:
    """Rows of gate (and of up) in a block of `gate_up_proj`: a function of the size alone.

    As many blocks as tensor parallelism may want to part (a power of two, 32 at most), but no block so
    narrow (under 128) that elementwise kernels over its columns lose their vector loops.
    """
    blocks = 32
    while blocks > 1 and (intermediate_size % blocks or intermediate_size // blocks < 128):
        blocks //= 2
    return intermediate_size // blocks
