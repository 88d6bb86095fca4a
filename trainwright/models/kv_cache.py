"""The keys and values of tokens already seen, kept for decoding."""

from torch import Tensor


class LayerCache:
    """One layer's keys and values in memory taken once for `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep `k` and `v` (batch, kv_heads, new, head_dim); return all kept so far in the same shape."""
        if self._k is None or self._v is None:
            batch, heads, _, dim = k.shape
            self._k, self._v = k.new_empty(2, batch, heads, self.capacity, dim).unbind(0)
        end = self.length + k.shape[2]
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        self._k[:, :, self.length : end], self._v[:, :, self.length : end] = k, v
        self.length = end
        return self._k[:, :, :end], self._v[:, :, :end]
