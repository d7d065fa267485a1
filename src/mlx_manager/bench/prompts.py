"""The texts that a benchmark sends: the same for the same seed, of a wanted length, sharing a prefix or sharing nothing."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Prefix = Literal["unique", "shared"]

SHARED_PART = 0.9
"""How much of a prompt of a "shared" workload is the same in all of them."""

INSTRUCTION = "Write a very long story that uses all of these words."

TEXT = """
able above across action after again against air almost alone along always amount animal answer apple area arm army art
baby back ball bank base bath bear bed bell best bird black blood blue board boat body bone book bottle box boy branch bread
bridge bright brother brown building burn bus butter cake camera car card care case cat chair chance cheese child church
circle city class clean clear clock cloth cloud coat coffee cold color common cook copper corn cotton country cover cow
cup dance dark daughter day deep desk dinner direction doctor dog door down dress drink drive dry dust ear early earth east
edge egg engine evening eye face fact family farm father feather field finger fire first fish floor flower fly food foot
forest fork friend fruit garden gate girl glass glove gold good grain grass gray great green ground group hair hand happy
hat head heart heavy high history hole home horse hospital hour house ice idea iron island jewel journey juice jump key king
kitchen knee knife lake lamp land language laugh leaf left leg letter library light line lion list lock long low lunch
machine map market meal metal milk mind minute mirror money month moon morning mother mountain mouth music nail name narrow
neck needle nest new night noise north nose note number nut ocean office oil old open orange oven page paint paper park path
pen picture pig pipe plant plate pocket poem point pot potato power price prose queen question quick rain red rice right
ring river road rock roof room root rose round sail salt sand school science sea seat second seed shade shape sheep ship
shirt shoe shop shoulder silver sister size skin sky sleep slow small smoke snow soap sock soft son song sound south space
spoon spring square stage star station steam stone store storm story street strong sugar summer sun table tail tall teacher
thread ticket time tooth town train tree truck turn uncle under valley view village voice walk wall warm watch water wave
weather week west wheel white wide wife wild window wine wing winter wise woman wood wool word work world yard year yellow
young zebra
"""
WORDS = tuple(TEXT.split())


@dataclass(frozen=True, slots=True)
class WordScale:
    """How many tokens a prompt of so many words has on a server: a straight line through what its usage reported."""

    base_tokens: float = 0.0
    tokens_per_word: float = 1.0

    @classmethod
    def through(cls, few: tuple[int, int], many: tuple[int, int]) -> "WordScale":
        """From two prompts, each (words, tokens). Falls back to a token a word if the counts cannot be a line of words."""
        (few_words, few_tokens), (many_words, many_tokens) = few, many
        if many_words <= few_words or many_tokens <= few_tokens:
            return cls()
        per_word = (many_tokens - few_tokens) / (many_words - few_words)
        return cls(few_tokens - per_word * few_words, per_word)

    def num_words(self, num_tokens: int) -> int:
        return max(1, round((num_tokens - self.base_tokens) / self.tokens_per_word))


def texts(prefix: Prefix, num_words: int, count: int, salt: str) -> list[str]:
    """`count` prompts, the same for the same arguments and unlike those of any other `salt`.

    "unique": the first words differ from each other (for as many prompts as there are words to start with, hundreds), the rest
    is drawn by lot, so a prefix cache can share no more than what the chat template puts in front. "shared": the first nine
    tenths are one text, the rest is unique.
    """
    if prefix == "unique":
        return [_told(words) for words in _apart(num_words, count, salt)]
    num_shared = int(num_words * SHARED_PART)
    shared = random.Random(f"{salt}/shared").choices(WORDS, k=num_shared)
    return [_told([*shared, *words]) for words in _apart(num_words - num_shared, count, salt)]


def endings(num_words: int, count: int, salt: str) -> list[str]:
    """`count` prompts of one text, new for every salt, each with a last sentence of its own."""
    lot = random.Random(salt)
    text = " ".join(lot.choices(WORDS, k=num_words))
    return [f"{text}\n\nWrite a very long story that uses all of these words and {word}." for word in lot.sample(WORDS, k=count)]


def short(salt: str) -> Iterator[str]:
    """Prompts of a dozen tokens with an ordinary chat template, without end."""
    lot = random.Random(salt)
    while True:
        yield f"Say {lot.choice(WORDS)} {lot.choice(WORDS)} forever."


def _apart(num_words: int, count: int, salt: str) -> list[list[str]]:
    lot = random.Random(salt)
    first = lot.sample(WORDS, k=len(WORDS))
    return [[first[n % len(first)], *lot.choices(WORDS, k=num_words - 1)] for n in range(count)]


def _told(words: Sequence[str]) -> str:
    return f"{' '.join(words)}\n\n{INSTRUCTION}"
