# The recipe of `parallel` and the single process that layouts are held against.
from tests.trainers.parallel.conftest import alone, base, text  # noqa: F401
