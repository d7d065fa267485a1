"""A model of mlx-vlm as the engine's caches call it: tokens, or stretches of a prompt with pictures in it, and a cache → logits.

The language half runs like any other model. A picture is put through the vision half once, whatever chunks its prompt is computed in,
and what comes of it takes the place of the embeddings of its tokens; some models add more of it after each of their first layers. Where a
model counts positions of pictures in height and width, they are found once for a whole prompt; what follows is shifted by one number.
"""
# pyright: basic

from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_manager.inference.engine.attention import AttendingCache, Sight
from mlx_manager.inference.engine.cache_layout import both_ways_mask
from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec
from mlx_manager.inference.picture import Picture

_MAX_FEATURE_BYTES = 256 << 20


class UnsupportedPictures(Exception):
    """This architecture does more with a picture than to put embeddings in its place and to add to what its first layers make of it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What the vision half makes of a picture of N tokens: their embeddings [1, N, D], and what is `added` [N, D] after each of the first
    layers, zeros where a token is only a mark beside the picture."""

    embeddings: mx.array
    added: tuple[mx.array, ...]

    @property
    def nbytes(self) -> int:
        return self.embeddings.nbytes + sum(array.nbytes for array in self.added)


@dataclass(frozen=True, slots=True)
class Shown:
    """Tokens [1, L] with their embeddings [1, L, D] (None: those of the tokens) and positions [3, 1, L] (None: in order). Of the P
    tokens `of_pictures` [1, L], what is `added` [P, D] after each of the first layers. `both_ways` [L, L]: who sees whom beside those
    before it."""

    tokens: mx.array
    embeddings: mx.array | None
    positions: mx.array | None
    of_pictures: mx.array | None = None
    added: tuple[mx.array, ...] = ()
    both_ways: mx.array | None = None


class BothWays(AttendingCache):
    """One layer's cache in a pass in which some tokens see each other `both_ways` [L, L]."""

    def __init__(self, cache: Any, both_ways: mx.array) -> None:
        self._cache = cache
        self._attends = isinstance(cache, AttendingCache)
        self._both_ways = both_ways
        self._kept: tuple[mx.array, mx.array] | None = None

    @property
    def offset(self) -> Any:
        return self._cache.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = self._cache.update_and_fetch(keys, values)
        self._kept = keys, values
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> mx.array | Sight:
        if self._attends:
            return replace(self._cache.make_mask(N, window_size=window_size), both_ways=self._both_ways)
        mask = self._cache.make_mask(N, return_array=True, window_size=window_size)
        return mx.concatenate([mask[:, :-N], mask[:, -N:] | self._both_ways], axis=1)

    def attend(self, queries: mx.array, scale: float, mask: Any, sinks: mx.array | None) -> mx.array:
        if self._attends:
            return self._cache.attend(queries, scale, mask, sinks)
        assert self._kept is not None
        keys, values = self._kept
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


class PictureModel:
    """Owned by the device thread. `looks_both_ways`: the tokens of one picture see each other, so all of them have to be computed in one
    pass or have been before."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._language = model.language_model
        self._counts_in_space = hasattr(self._language, "get_rope_index")
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()
        self._positions: dict[Sequence, np.ndarray] = {}  # [3, prompt]
        self.args = getattr(self._language, "args", None)
        self.looks_both_ways = getattr(getattr(model, "config", None), "model_type", None) in _LOOK_BOTH_WAYS

    @property
    def layers(self) -> Any:
        return self._language.layers

    def make_cache(self) -> Any:
        from mlx_vlm.models.cache import make_prompt_cache  # noqa: PLC0415 - takes a second, and only models that see need it

        return make_prompt_cache(self._language)

    def parameters(self) -> Any:
        return self._model.parameters()

    def named_modules(self) -> Any:
        """Those that text goes through."""
        return self._language.named_modules()

    def __call__(self, inputs: mx.array | Shown, cache: Any = None) -> mx.array:
        """`inputs` [B, L] or `Shown` → logits [B, L, V]."""
        given = inputs if isinstance(inputs, Shown) else Shown(inputs, None, self._in_order(inputs, cache))
        more: dict[str, Any] = {} if given.positions is None else {"position_ids": given.positions}
        if given.added:
            more |= {"visual_pos_masks": given.of_pictures, "deepstack_visual_embeds": list(given.added)}
        if given.both_ways is not None:
            cache = [BothWays(layer, given.both_ways) for layer in cache]
        return self._language(given.tokens, inputs_embeds=given.embeddings, cache=cache, **more).logits

    def place(self, sequence: Sequence) -> None:
        """Finds out where a prompt's tokens stand, before the first of them is computed."""
        if not self._counts_in_space or sequence in self._positions:
            return
        tokens = mx.array([_spelt(sequence, 0, len(sequence.spec.prompt))])
        grids = [np.asarray(p.picture.arrays["image_grid_thw"]) for p in sequence.spec.pictures]
        positions, shift = self._language.get_rope_index(tokens, image_grid_thw=mx.array(np.concatenate(grids)))
        self._positions[sequence] = np.array(positions)[:, 0]
        sequence.position_shift = int(np.array(shift).reshape(-1)[0])

    def self_test(self, spec: SequenceSpec) -> str | None:
        """What is wrong if a prompt with a picture, in two chunks, does not get the logits that it gets in one pass."""
        sequence = Sequence(spec, 0)
        stop = len(spec.prompt)
        try:
            self.place(sequence)
            cut = spec.pictures[0].stop if self.looks_both_ways else spec.pictures[0].start + 1
            kept = self.make_cache()
            self(self.shown(sequence, 0, cut), cache=kept)
            ours = self(self.shown(sequence, cut, stop), cache=kept)[0, -1]
            theirs = self._in_one_pass(sequence)[0, -1]
            difference = float(np.array(mx.max(mx.abs(ours - theirs)).astype(mx.float32)))
            scale = float(np.array(mx.max(mx.abs(theirs)).astype(mx.float32)))
        except Exception as error:  # noqa: BLE001 - whatever an architecture needs that we do not give it
            return f"{type(error).__name__}: {error}"
        finally:
            self.forget(sequence)
        tolerance = 2e-3 if theirs.dtype == mx.float32 else 8e-2
        return None if difference <= tolerance * scale else f"logits differ by {difference:.3g} of {scale:.3g}"

    def _in_one_pass(self, sequence: Sequence) -> mx.array:
        """The logits [1, L, V] of a prompt with one picture, by mlx-vlm's own pass. Where tokens see each other both ways its language
        half is told so: by itself it would let all of them or none."""
        tokens = mx.array([_spelt(sequence, 0, len(sequence.spec.prompt))])
        arrays = {name: mx.array(array) for name, array in sequence.spec.pictures[0].picture.arrays.items()}
        if not self.looks_both_ways:
            return self._model(tokens, mask=None, cache=self.make_cache(), **arrays).logits
        embeddings = self._model.get_input_embeddings(tokens, mask=mx.ones_like(tokens), **arrays).inputs_embeds
        mask = both_ways_mask(0, None, self._see_each_other(tokens, np.ones(tokens.shape, bool)))
        return self._language(tokens, inputs_embeds=embeddings, mask=mask, cache=self.make_cache()).logits

    def forget(self, sequence: Sequence) -> None:
        self._positions.pop(sequence, None)

    def shown(self, sequence: Sequence, start: int, stop: int) -> Shown:
        """Tokens [start, stop) of a sequence whose prompt has pictures."""
        tokens = mx.array([_spelt(sequence, start, stop)])
        parts: list[mx.array] = []
        added: list[tuple[mx.array, ...]] = []
        of_pictures = np.zeros((1, stop - start), bool)
        at = start
        for placed in sequence.spec.pictures:
            first, last = max(start, placed.start), min(stop, placed.stop)
            if first >= last:
                continue
            if at < first:
                parts.append(self._text(tokens[:, at - start : first - start]))
            seen = self._look(placed.picture)
            parts.append(seen.embeddings[:, first - placed.start : last - placed.start])
            added.append(tuple(layer[first - placed.start : last - placed.start] for layer in seen.added))
            of_pictures[:, first - start : last - start] = True
            at = last
        if at < stop:
            parts.append(self._text(tokens[:, at - start :]))
        return Shown(
            tokens,
            mx.concatenate(parts, axis=1),
            self._at(sequence, start, stop),
            mx.array(of_pictures),
            tuple(mx.concatenate(list(layer)) for layer in zip(*added, strict=True)),
            self._see_each_other(tokens, of_pictures) if self.looks_both_ways and of_pictures.any() and stop - start > 1 else None,
        )

    def after_pictures(self, sequence: Sequence, tokens: mx.array) -> Shown:
        """The next token [1, 1] of a sequence; it need not be known yet."""
        return Shown(tokens, None, self._at(sequence, sequence.num_queued, sequence.num_queued + 1))

    def _at(self, sequence: Sequence, start: int, stop: int) -> mx.array | None:
        if not self._counts_in_space:
            return None
        known = self._positions[sequence]
        after = np.arange(max(start, known.shape[1]), stop) + sequence.position_shift
        positions = np.concatenate([known[:, start:stop], np.broadcast_to(after, (3, len(after)))], axis=1)
        return mx.array(positions.astype(np.int32))[:, None]

    def _in_order(self, inputs: mx.array, cache: Any) -> mx.array | None:
        if not self._counts_in_space:
            return None
        offset = next((c.offset for c in cache or () if hasattr(c, "offset")), 0)  # a layer that keeps a state counts nothing
        offset = mx.reshape(mx.array(offset), (-1, 1))
        positions = offset + mx.arange(inputs.shape[1])[None]
        return mx.broadcast_to(positions[None], (3, inputs.shape[0], inputs.shape[1]))

    def _see_each_other(self, tokens: mx.array, of_pictures: np.ndarray) -> mx.array:
        """Which of these tokens [1, L] see each other, [L, L]: those that stand for one picture, without the marks beside them."""
        are_visual = (of_pictures & (np.array(tokens) == self._model.config.image_token_index))[0]
        numbers = np.where(are_visual, np.cumsum(np.diff(are_visual, prepend=False) & are_visual), 0)
        return mx.array((numbers[:, None] == numbers[None]) & are_visual)

    def _text(self, tokens: mx.array) -> mx.array:
        return self._model.get_input_embeddings(tokens, None).inputs_embeds

    def _look(self, picture: Picture) -> Seen:
        found = self._seen.get(picture.digest)
        if found is None:
            arrays = {name: mx.array(array) for name, array in picture.arrays.items()}
            tokens = mx.array([picture.tokens])
            result = self._model.get_input_embeddings(tokens, mask=mx.ones_like(tokens), **arrays)
            known = _KNOWN | {"attention_mask_4d"} if self.looks_both_ways else _KNOWN
            extra = [f.name for f in fields(result) if f.name not in known and getattr(result, f.name) is not None]
            if extra:
                raise UnsupportedPictures(f"it needs {', '.join(extra)} beside embeddings")
            found = Seen(result.inputs_embeds, _spread(result.deepstack_visual_embeds, result.visual_pos_masks))
            mx.eval(found.embeddings, *found.added)
            self._seen[picture.digest] = found
            while sum(seen.nbytes for seen in self._seen.values()) > _MAX_FEATURE_BYTES and len(self._seen) > 1:
                self._seen.popitem(last=False)
        self._seen.move_to_end(picture.digest)
        return found


# `model_type` of those whose tokens of one picture see each other both ways, and all others only what comes before them.
_LOOK_BOTH_WAYS = frozenset({"gemma3"})
_KNOWN = frozenset({"inputs_embeds", "position_ids", "rope_deltas", "visual_pos_masks", "deepstack_visual_embeds"})


def _spread(layers: Items[mx.array] | None, are_visual: mx.array | None) -> tuple[mx.array, ...]:
    """What a model has for those tokens of a picture that `are_visual` [1, N], for all N of them."""
    if layers is None or are_visual is None:
        return ()
    rows = mx.array(np.flatnonzero(np.array(are_visual)[0]).astype(np.int32))
    return tuple(mx.zeros((are_visual.shape[1], layer.shape[1]), layer.dtype).at[rows].add(layer) for layer in layers)


def _spelt(sequence: Sequence, start: int, stop: int) -> Items[int]:
    """Tokens as the model's vocabulary has them, pictures included."""
    tokens = sequence.tokens[start:stop]
    for placed in sequence.spec.pictures:
        spelt = placed.picture.tokens
        first, last = max(start, placed.start), min(stop, placed.stop)
        if first < last:
            tokens[first - start : last - start] = spelt[first - placed.start : last - placed.start]
    return tokens
