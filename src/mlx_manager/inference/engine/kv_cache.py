"""Keys and values of the running batch, in the batch caches that mlx-lm keeps for each kind of layer.

A sequence is prefilled alone in a cache of its own and joins the batch with it; the rows of the batch are decoded together.
"""
# pyright: basic

from typing import Any

from mlx_lm.models.cache import make_prompt_cache

LayerCaches = list[Any]


class BatchCache:
    """One row for each running sequence, in the order in which they joined. Owned by the device thread.

    Some architectures keep a cache that cannot be batched: for them `can_batch` is False and there is at most one row.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers: LayerCaches = []
        self.can_batch = all(hasattr(layer, "merge") for layer in self.new_row())

    def new_row(self) -> LayerCaches:
        return make_prompt_cache(self._model)

    def join(self, row: LayerCaches) -> None:
        if not self.can_batch:
            assert not self.layers, "this cache holds one row"
            self.layers = row
            return
        merged = [layer.merge([layer]) for layer in row]
        if not self.layers:
            self.layers = merged
            return
        for mine, new in zip(self.layers, merged, strict=True):
            mine.extend(new)

    def keep(self, rows: list[int]) -> None:
        """Only these rows stay, in this order."""
        if not rows:
            self.layers = []
        else:
            for layer in self.layers:
                layer.filter(rows)
