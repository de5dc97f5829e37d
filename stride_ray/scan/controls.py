"""Control items: what no corpus holds, to tell how an item that did not leak responds to the model.

Best are items of the same kind that nobody has published, given by the user. Where there are none they are made: runs
of a few words, each from another item at about the same place, with other digits. A made item shares no long run of
words with any item, but reads worse than a real one, so that given ones are to be preferred.
"""

import random
import re
from collections.abc import Sequence

from stride_ray.scan.items import Item

# Words taken over from one item in a row.
RUN = 6
# Made controls per scan, and their set's name.
MADE, SET = 200, "(made controls)"
_DIGIT = re.compile(r"\d")


def made_controls(items: Sequence[Item], count: int = MADE, seed: int = 0) -> list[Item]:
    """Items that never were, as long as real ones.

    Args:
        items: what they are made of; two at the least, else there is nothing to mix and the list is empty.
        count: how many.
        seed: of the mixture.
    """
    if len(items) < 2:
        return []
    rng = random.Random(seed)
    made = []
    for number in range(count):
        model = items[number % len(items)]
        question = _mixed(model.question, [item.question for item in rng.choices(items, k=64)], rng)
        answer = _mixed(model.answer, [item.answer for item in rng.choices(items, k=64)], rng)
        name = f"made-{number:05d}"
        made.append(Item(name, SET, name, "", number, question, (), answer))
    return made


def _mixed(model: str, others: Sequence[str], rng: random.Random) -> str:
    """Runs of the others' words, about as many as the model has, each from its own relative place."""
    words = re.findall(r"\s*\S+", model)
    mixed: list[str] = []
    while len(mixed) < len(words):
        donor = re.findall(r"\s*\S+", rng.choice(others))
        place = len(mixed) / len(words) * len(donor)
        start = max(0, min(round(place), len(donor) - RUN))
        mixed += donor[start : start + RUN] or words[len(mixed) : len(mixed) + RUN]
    text = "".join(mixed[: len(words)])
    return _DIGIT.sub(lambda _: str(rng.randrange(1, 10)), text) if text else model
