"""What generated text is split into. The pieces of a text cover it in order and without gaps; each says how many of its characters
it accounts for."""

from dataclasses import dataclass

from mlx_manager.inference.families.family import Call


@dataclass(frozen=True, slots=True)
class Text:
    text: str

    @property
    def num_chars(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str

    @property
    def num_chars(self) -> int:
        return len(self.text)


@dataclass(frozen=True, slots=True)
class Calls:
    calls: tuple[Call, ...]
    num_chars: int


@dataclass(frozen=True, slots=True)
class CallOpened:
    """A call whose arguments follow piece by piece."""

    name: str
    num_chars: int


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next of the JSON text of the call that was opened last; `closes` says that there is no more."""

    text: str
    num_chars: int
    closes: bool = False


@dataclass(frozen=True, slots=True)
class Markup:
    """Tags, and white space that belongs to them: shown nowhere."""

    num_chars: int


Piece = Text | Reasoning | Calls | CallOpened | Arguments | Markup


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one, so that a section does not fall apart where it was looked at."""
    joined: list[Piece] = []
    for piece in pieces:
        match piece, joined[-1] if joined else None:
            case Text(text), Text(before):
                joined[-1] = Text(before + text)
            case Reasoning(text), Reasoning(before):
                joined[-1] = Reasoning(before + text)
            case Arguments(text, num_chars, closes), Arguments(before, num_before, False):
                joined[-1] = Arguments(before + text, num_before + num_chars, closes)
            case _:
                joined.append(piece)
    return joined
