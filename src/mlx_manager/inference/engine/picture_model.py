"""A model of mlx-vlm as the engine's caches call it: tokens, or stretches of a prompt with pictures in it, and a cache → logits.

The language half runs like any other model. A picture is put through the vision half once, whatever chunks its prompt is computed in,
and what comes of it takes the place of the embeddings of its tokens. Where a model counts positions of pictures in height and width,
they are found once for a whole prompt; what follows is shifted by one number.
"""
# pyright: basic

from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_manager.inference.engine.sequence import Sequence, SequenceSpec
from mlx_manager.inference.picture import Picture

_MAX_FEATURE_BYTES = 256 << 20


class UnsupportedPictures(Exception):
    """This architecture does more with a picture than to put embeddings in its place."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Tokens [1, L] with their embeddings [1, L, D] (None: those of the tokens) and positions [3, 1, L] (None: in order)."""

    tokens: mx.array
    embeddings: mx.array | None
    positions: mx.array | None


class PictureModel:
    """Owned by the device thread."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._language = model.language_model
        self._counts_in_space = hasattr(self._language, "get_rope_index")
        self._features: OrderedDict[bytes, mx.array] = OrderedDict()
        self._positions: dict[Sequence, np.ndarray] = {}  # [3, prompt]
        self.args = getattr(self._language, "args", None)

    @property
    def layers(self) -> Any:
        return self._language.layers

    def make_cache(self) -> Any:
        from mlx_vlm.models.cache import make_prompt_cache  # noqa: PLC0415 - takes a second, and only models that see need it

        return make_prompt_cache(self._language)

    def parameters(self) -> Any:
        return self._model.parameters()

    def __call__(self, inputs: mx.array | Shown, cache: Any = None) -> mx.array:
        """`inputs` [B, L] or `Shown` → logits [B, L, V]."""
        if isinstance(inputs, Shown):
            tokens, embeddings, positions = inputs.tokens, inputs.embeddings, inputs.positions
        else:
            tokens, embeddings, positions = inputs, None, self._in_order(inputs, cache)
        more = {} if positions is None else {"position_ids": positions}
        return self._language(tokens, inputs_embeds=embeddings, cache=cache, **more).logits

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
        """What is wrong if a prompt with a picture, in two chunks, does not get the logits that mlx-vlm's own pass gives it."""
        sequence = Sequence(spec, 0)
        stop = len(spec.prompt)
        try:
            self.place(sequence)
            cut = spec.pictures[0].start + 1
            kept = self.make_cache()
            self(self.shown(sequence, 0, cut), cache=kept)
            ours = self(self.shown(sequence, cut, stop), cache=kept)[0, -1]
            arrays = {name: mx.array(array) for name, array in spec.pictures[0].picture.arrays.items()}
            theirs = self._model(mx.array([_spelt(sequence, 0, stop)]), cache=self.make_cache(), **arrays).logits[0, -1]
            difference = float(np.array(mx.max(mx.abs(ours - theirs)).astype(mx.float32)))
            scale = float(np.array(mx.max(mx.abs(theirs)).astype(mx.float32)))
        except Exception as error:  # noqa: BLE001 - whatever an architecture needs that we do not give it
            return f"{type(error).__name__}: {error}"
        finally:
            self.forget(sequence)
        tolerance = 2e-3 if theirs.dtype == mx.float32 else 8e-2
        return None if difference <= tolerance * scale else f"logits differ by {difference:.3g} of {scale:.3g}"

    def forget(self, sequence: Sequence) -> None:
        self._positions.pop(sequence, None)

    def shown(self, sequence: Sequence, start: int, stop: int) -> Shown:
        """Tokens [start, stop) of a sequence whose prompt has pictures."""
        tokens = mx.array([_spelt(sequence, start, stop)])
        parts: list[mx.array] = []
        at = start
        for placed in sequence.spec.pictures:
            first, last = max(start, placed.start), min(stop, placed.start + len(placed.picture.tokens))
            if first >= last:
                continue
            if at < first:
                parts.append(self._text(tokens[:, at - start : first - start]))
            parts.append(self._look(placed.picture)[:, first - placed.start : last - placed.start])
            at = last
        if at < stop:
            parts.append(self._text(tokens[:, at - start :]))
        return Shown(tokens, mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0], self._at(sequence, start, stop))

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
        offset = 0 if not cache else cache[0].offset
        offset = mx.reshape(mx.array(offset), (-1, 1))
        positions = offset + mx.arange(inputs.shape[1])[None]
        return mx.broadcast_to(positions[None], (3, inputs.shape[0], inputs.shape[1]))

    def _text(self, tokens: mx.array) -> mx.array:
        return self._model.get_input_embeddings(tokens, None).inputs_embeds

    def _look(self, picture: Picture) -> mx.array:
        """What the vision half makes of a picture, [1, tokens, D]."""
        found = self._features.get(picture.digest)
        if found is None:
            arrays = {name: mx.array(array) for name, array in picture.arrays.items()}
            result = self._model.get_input_embeddings(mx.array([picture.tokens]), **arrays)
            extra = [f.name for f in fields(result) if f.name not in _KNOWN and getattr(result, f.name) is not None]
            if extra:
                raise UnsupportedPictures(f"it needs {', '.join(extra)} beside embeddings")
            found = result.inputs_embeds
            mx.eval(found)
            self._features[picture.digest] = found
            while sum(f.nbytes for f in self._features.values()) > _MAX_FEATURE_BYTES and len(self._features) > 1:
                self._features.popitem(last=False)
        self._features.move_to_end(picture.digest)
        return found


_KNOWN = frozenset({"inputs_embeds", "position_ids", "rope_deltas"})


def _spelt(sequence: Sequence, start: int, stop: int) -> Items[int]:
    """Tokens as the model's vocabulary has them, pictures included."""
    tokens = sequence.tokens[start:stop]
    for placed in sequence.spec.pictures:
        spelt = placed.picture.tokens
        first, last = max(start, placed.start), min(stop, placed.start + len(spelt))
        if first < last:
            tokens[first - start : last - start] = spelt[first - placed.start : last - placed.start]
    return tokens
