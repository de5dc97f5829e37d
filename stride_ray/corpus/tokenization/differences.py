"""What two texts that a template renders have in common, and where one has what the other lacks."""


def markers(a: str, b: str) -> str:
    """The common beginning of two texts, without the part of a marker in which they begin to differ."""
    shared = a[: common(a, b)]
    opened = max(map(shared.rfind, "<["))
    return shared[:opened] if shared != a and opened > max(map(shared.rfind, ">]")) else shared


def common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_end(a: str, b: str) -> int:
    """Length of the longest common end."""
    return common(a[max(0, len(a) - len(b)) :][::-1], b[::-1])


def repeated(once: str, twice: str, within: int) -> tuple[int, int] | None:
    """Where a block of a text stands that another text has twice in a row; None if they differ in another way.

    Texts that repeat something can be cut in several places. The first is taken at which a tag begins and before which
    one ends.

    Args:
        once: the text.
        twice: the other one.
        within: the place of a character of the block.

    Example:
        >>> text = "<a>1<end><b>2<end><a>3<end>"
        >>> text[slice(*repeated(text, text.replace("<b>2<end>", "<b>2<end>" * 2), text.index("2")))]
        '<b>2<end>'
    """
    length, start = len(twice) - len(once), common(once, twice)
    if length <= 0 or once[start:] != twice[start + length :]:
        return None
    places = [start]
    while places[0] and twice[places[0] - 1] == twice[places[0] + length - 1]:
        places.insert(0, places[0] - 1)
    places = [place for place in places if place < within < place + length] or places[:1]
    cut = (place for place in places if once[place] in "<[" and once[place + length - 1 : place + length] in (">", "]"))
    first = next(cut, places[0])
    return first, first + length
