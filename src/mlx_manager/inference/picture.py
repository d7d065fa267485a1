"""A picture as a model is shown it, and where it stands in a prompt; a frame of a video, which is a picture too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Picture:
    """What a model is shown of one picture: `tokens` that stand for it in the model's vocabulary, and the processor's `arrays`. In a
    prompt they are `names` instead, tokens beyond every vocabulary that only this picture has: so its blocks are its own."""

    digest: bytes
    tokens: tuple[int, ...]
    names: tuple[int, ...]
    arrays: Mapping[str, Any] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a video, decoded: `pixels` is an RGB image of Pillow's. `digest` says of which video it is, and which frame of how
    many; `where` is the field that the video came in."""

    digest: bytes
    pixels: Any = field(compare=False)
    where: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class PlacedPicture:
    """`start` is where in the prompt the picture's names begin."""

    start: int
    picture: Picture

    @property
    def stop(self) -> int:
        return self.start + len(self.picture.tokens)
