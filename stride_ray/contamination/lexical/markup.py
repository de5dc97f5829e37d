"""The readable text of a raw text: what a browser would show, with each character's position in the raw text.

HTML entities, percent escapes of URLs (also those escaped twice) and escapes of strings in JSON and code are decoded.
Tags, raw or escaped, and invisible characters are removed; fractions and letters in one symbol (½, ㎏) are spelt out;
words hyphenated at the end of a line, or of an element, are joined. Comments, scripts, styles, declarations, processing
instructions and ruby annotations do not interrupt the text around them. The model trains on their content all the same,
so each becomes a passage of its own. The content of CDATA is text. An element that is not closed hides nothing: unlike
in a browser, the rest stays readable, because documents are often cut. Items and corpus are read in the same way, so
that code which looks like markup (``&lt;b&gt;``, ``Set<Object>``) still equals its copies.
"""

from collections.abc import Callable, Iterator
from functools import cache
from html import unescape
from html.entities import html5
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import regex

# Old entities may lack their semicolon, but not in a query such as "?a=1&copy=2".
_OLD = "|".join(sorted((name for name in html5 if not name.endswith(";")), reverse=True))
_ENTITY = regex.compile(
    r"&(?:amp;)*(?:(#\d{1,7}+|#[xX][0-9a-fA-F]{1,6}+);?|([a-zA-Z][a-zA-Z0-9]{1,31});|"
    rf"({_OLD})(?![a-zA-Z0-9=;]))"
)
# A character in a URL, in UTF-8, also where its percent sign was escaped again; no control character ("%02d" of code).
# And "%u00e9" of the old JavaScript.
_HEX, _SIGN = "[0-9a-fA-F]", "%(?:25)*"
_MORE = f"{_SIGN}[89abAB]{_HEX}"
_PERCENT = regex.compile(
    f"{_SIGN}(?:[2-7]{_HEX}|0[aAdD9]|[cCdD]{_HEX}{_MORE}|[eE]{_HEX}(?:{_MORE}){{2}}|[fF][0-4](?:{_MORE}){{3}}"
    f"|u({_HEX}{{4}}))"
)
# A character of a string in JSON or code: \n, \u00e9, \ud83d\ude00, \u{e9}, \U000000e9, or \xe9, which may also be a
# byte of UTF-8.
_AGAIN = rf"\\++x[89abAB]{_HEX}"
_ESCAPE = regex.compile(
    rf"(?<!\\)\\++(?:u(?P<high>[dD][89abAB]{_HEX}{{2}})\\++u(?P<low>[dD][c-fC-F]{_HEX}{{2}})"
    rf"|u(?P<code>{_HEX}{{4}})|u\{{(?P<code>{_HEX}{{1,6}})\}}|U(?P<code>{_HEX}{{8}})|[nrt]"
    rf"|(?P<bytes>x[cCdD]{_HEX}{_AGAIN}|x[eE]{_HEX}(?:{_AGAIN}){{2}}|x[fF][0-4](?:{_AGAIN}){{3}}|x{_HEX}{{2}}))"
)
# Elements within a line: browsers show no space where such a tag stands. Any other tag separates words.
_INLINE = frozenset(
    "a abbr acronym b bdi bdo big cite code del dfn em font i ins kbd mark q rb ruby s samp small span strike strong "
    "sub sup tt u var wbr".split()
)
_ELEMENTS = _INLINE | frozenset(
    "address applet area article aside audio base blockquote body br button canvas caption center col colgroup data "
    "datalist dd details dialog dir div dl dt embed fieldset figcaption figure footer form frame frameset h1 h2 h3 h4 "
    "h5 h6 head header hgroup hr html iframe img input label legend li link main map menu meta meter nav noframes "
    "noscript object ol optgroup option output p param picture pre progress rp rt script search section select "
    "slot source style summary svg table tbody td template textarea tfoot th thead time title tr track ul video".split()
)
# An attribute may lack its value, and white space before it after a quote. The limit keeps time linear.
_VALUE = r"""\\?"[^"]*+"|\\?'[^']*+'|[^\s"'<>`]++"""
_ATTRIBUTE = rf"""(?:\s++|(?<=["']))[a-z_:@#*\[(][^\s"'<>/=,;&|`]*+(?:\s*+=(?:\s*+(?:{_VALUE}))?)?"""
_TAG = regex.compile(rf"<(/?)([a-z][\w:.-]*+)((?:{_ATTRIBUTE}){{0,100}}+)\s*+(/?)>", regex.IGNORECASE)
# Distinguish "a <b and c> d" from a one-letter tag: attributes have a value, a mark in the name, or one of these names.
_BARE = frozenset(
    "border class compact contenteditable dir download draggable hidden href id inert itemscope lang name nonce "
    "noshade nowrap ping popover rel spellcheck style tabindex target title translate value".split()
)
_OPERATORS = frozenset(("and", "or", "not", "xor", "then"))
_CLOSING = regex.compile(r"</([a-z][\w:.-]*+)\s*+>", regex.IGNORECASE)
# What browsers do not show, or not in its line (the reading aids of ruby): where it begins, since there may be no end.
# Attributes may hold ">" in quotes.
_HIDDEN = regex.compile(
    r"""<(?:(?P<comment>!--)|(?P<instruction>\?[a-z])|!\[CDATA\[|!(?:doctype|\[(?:if|endif))\b[^<>]*+>"""
    r"""|(?P<raw>script|style|rt|rp)(?:[\s/](?:[^<>"']++|"[^"]*+"|'[^']*+')*+)?>)|\]\]>""",
    regex.IGNORECASE,
)
# A reading aid may lack its end tag before the next one, and before the end of the ruby.
_OR_NEXT = r"|(?=</ruby[\s>]|</?r(?:b|tc)[\s>]|<r[tp][\s>])"
_END = {
    "comment": regex.compile(r"--!?>"),
    "instruction": regex.compile(r"\?>"),
    **{
        name: regex.compile(rf"</{name}(?:[\s/][^<>]*+)?>{_OR_NEXT if name in ('rt', 'rp') else ''}", regex.IGNORECASE)
        for name in ("script", "style", "rt", "rp")
    },
}
# Attributes whose value readers see, if it has at least this many words: links have short titles in mid-sentence.
_SHOWN = regex.compile(
    r"""\s(?:alt|title|content|label|summary|placeholder|value|aria-label)\s*=\s*\\?(["'])((?:(?!\1).)*+)""",
    regex.IGNORECASE | regex.DOTALL,
)
_SHOWN_WORDS = 6
# Invisible characters, lines below and through letters, and the Arabic stroke that only stretches a word.
_INVISIBLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\p{Cf}\u0640\u0332\u0333\u0335-\u0338]+")
# A hyphen at a line's end, with what is before it and after the break.
_BROKEN = regex.compile(
    r"(?<=([\p{L}\p{M}]++))[-\u00ad\u00ac\u2010][^\S\r\n]*+[\r\n]\s*+(?=(\p{Ll}[\p{L}\p{M}]*+))", regex.V1
)
# Letters that compatibility form writes as two characters, between which words of Thai and Lao would be cut; and
# apostrophes that count as letters (of Ukrainian, Hawaiian), for which others are written as often.
_SPELT = {"\u0e4d\u0e32": "\u0e33", "\u0ecd\u0eb2": "\u0eb3", "\u0eab\u0e99": "\u0edc", "\u0eab\u0ea1": "\u0edd"}
_SPELT |= {"\u02bb": "'", "\u02bc": "'"}
_OTHERWISE = regex.compile("|".join(_SPELT))
# Characters that stand for several words, or for letters though they count as symbols: ½, ⒈, ㎏, Ⓐ, ㍿. (™ is no word.)
_COMPOSED = regex.compile(r"[[\p{No}\p{So}\p{Sc}\ufdfa\ufdfb]--[\u2120\u2122]]", regex.V1)


class Readable(NamedTuple):
    """The readable text of a raw text of n characters.

    Attributes:
        text: m characters.
        starts, stops: (m,) int64, the range of the raw text that each character stands for, ``stops`` excluded; empty
            without ``places``.
    """

    text: str
    starts: np.ndarray
    stops: np.ndarray


def readable(text: str, is_word: Callable[[str], bool] | None = None, places: bool = False) -> list[Readable]:
    """Return the readable text, then each passage that stands apart from it.

    Example:
        >>> [passage.text for passage in readable("So <b>it</b> <!-- as they say -->was.")]
        ['So it was.', ' as they say ']

    Args:
        text: the raw text.
        is_word: whether the joined halves of a word hyphenated at a line's end are a word; if not, they stay apart, as
            in "well-known". None: halves are always joined.
        places: whether to return ``starts`` and ``stops`` too.
    """
    numbers = np.arange(len(text) + 1 if places else 1, dtype=np.int64)
    now = Readable(text, numbers[:-1], numbers[1:])
    if "%" in now.text:
        now = _substitute(now, _PERCENT, _percent_character)
    if "&" in now.text:
        now = _substitute(now, _ENTITY, _entity_character)
    if "\\" in now.text:
        now = _substitute(now, _ESCAPE, _escape_character)
    passages = _passages(now) if "<" in now.text else [now]
    return [_without_markup(passage, is_word) for passage in passages]


def _without_markup(now: Readable, is_word: Callable[[str], bool] | None) -> Readable:
    """Return a passage without tags, invisible characters and hyphenation."""
    if "<" in now.text:
        closed = {name.lower() for name in _CLOSING.findall(now.text)}
        now = _substitute(now, _TAG, lambda match: _tag_text(match, closed))
    if "\n" in now.text or "\r" in now.text:
        now = _substitute(now, _BROKEN, lambda match: _rejoined_halves(match, is_word))
    if not now.text.isascii():
        now = _substitute(now, _INVISIBLE, lambda match: "")
        now = _substitute(now, _OTHERWISE, lambda match: _SPELT[match.group()])
        now = _substitute(now, _COMPOSED, lambda match: _spelt_out(match.group()))
    return now


def _passages(now: Readable) -> list[Readable]:
    """Return the text without what browsers hide, then each hidden piece that is not blank."""
    kept, apart, last = list[Readable](), list[Readable](), 0
    for start, stop, inner in _hidden_ranges(now.text):
        kept.append(_slice(now, last, start))
        if now.text[inner[0] : inner[1]].strip():
            apart.append(_slice(now, *inner))
        last = stop
    if not kept:
        return [now]
    kept.append(_slice(now, last, len(now.text)))
    texts, starts, stops = zip(*kept, strict=True)
    return [Readable("".join(texts), np.concatenate(starts), np.concatenate(stops)), *apart]


def _slice(now: Readable, start: int, stop: int) -> Readable:
    return Readable(now.text[start:stop], now.starts[start:stop], now.stops[start:stop])


def _hidden_ranges(text: str) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Yield what browsers do not show: start, stop, and the range of its content; in linear time."""
    at, in_data = 0, False
    endless = set[str]()  # kinds without an end from here on: searching again for each would take quadratic time
    while match := _HIDDEN.search(text, at):
        start, at = match.span()
        kind = (match["raw"] or match.lastgroup or match.group()).lower()
        if kind in _END:
            end = kind not in endless and _END[kind].search(text, start + 2 if kind == "comment" else at)
            if end:  # "<!-->" is a whole comment
                inner = start + 2 if kind == "instruction" else at
                yield start, end.end(), (min(inner, end.start()), end.start())
                at = end.end()
            else:
                endless.add(kind)
        elif kind == "<![cdata[" or (kind == "]]>" and in_data):
            yield start, at, (at, at)
            in_data = kind != "]]>"
        elif kind != "]]>":
            yield start, at, (start, at)


def _substitute(now: Readable, pattern: "regex.Pattern[str]", replacement: Callable[..., str]) -> Readable:
    """Substitute all matches; each character of a replacement stands for the whole match."""
    if len(now.starts) != len(now.text):
        return Readable(pattern.sub(replacement, now.text), now.starts, now.stops)
    pieces, starts, stops, last = [], [], [], 0
    for match in pattern.finditer(now.text):
        new, (first, stop) = replacement(match), match.span()
        if new == match.group():
            continue
        pieces += [now.text[last:first], new]
        starts += [now.starts[last:first], np.full(len(new), now.starts[first])]
        stops += [now.stops[last:first], np.full(len(new), now.stops[stop - 1])]
        last = stop
    if not pieces:
        return now
    text = "".join([*pieces, now.text[last:]])
    return Readable(text, np.concatenate([*starts, now.starts[last:]]), np.concatenate([*stops, now.stops[last:]]))


def _percent_character(match: "regex.Match[str]") -> str:
    """Return the character that a percent escape stands for, or the escape itself if it is not valid UTF-8."""
    if match[1]:
        return _code_point(match[1])
    pairs = match.group().replace("%", " %").split()
    try:
        return bytes(int(pair[-2:], 16) for pair in pairs).decode()
    except UnicodeDecodeError:
        return match.group()


def _entity_character(match: "regex.Match[str]") -> str:
    number, *names = match.groups()
    name = next(filter(None, names), "")
    return unescape(f"&{number};") if number else html5.get(f"{name};", match.group())


def _escape_character(match: "regex.Match[str]") -> str:
    """Return the character that an escape stands for; a space for white space and for half of a surrogate pair."""
    if match["low"]:
        return chr(0x10000 + (int(match["high"], 16) - 0xD800 << 10) + int(match["low"], 16) - 0xDC00)
    if match["code"]:
        return _code_point(match["code"])
    if match["bytes"]:
        data = bytes(int(pair[-2:], 16) for pair in match["bytes"].replace("\\", "").split("x")[1:])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data.decode("latin-1")
    return "\n" if match.group().endswith("n") else " "


def _code_point(code: str) -> str:
    number = int(code, 16)
    return " " if 0xD800 <= number < 0xE000 or number > 0x10FFFF else chr(number)


@cache
def _spelt_out(character: str) -> str:
    """The compatibility form of a character if it has letters or digits; a fraction stands apart, as 1/2 does in 3½."""
    form = normalize("NFKC", character)
    if "\u2044" in form:
        return f" {form} "
    return form if any(map(str.isalnum, form)) else character


def _rejoined_halves(match: "regex.Match[str]", is_word: Callable[[str], bool] | None) -> str:
    return "" if is_word is None or is_word(match.group(1) + match.group(2)) else match.group()


def _tag_text(match: "regex.Match[str]", closed: set[str]) -> str:
    """Return what replaces a tag: nothing, a line's end, or the text of an attribute; the tag itself if it may be code.

    The name decides. One that HTML does not define (``List<int>``, ``<your-name>``) counts as a tag only if closed or
    with quoted attributes or, in a custom element (with a dash in its name), any attributes.
    """
    slash, name, attributes, alone = match.groups()
    name = name.lower()
    known = name in _ELEMENTS or ("-" in name and attributes)
    if not (known or name in closed or slash or alone or '"' in attributes or "'" in attributes):
        return match.group()
    if attributes and "=" not in attributes:
        bare = attributes.lower().split()
        marked = len(name) > 1 or all(each in _BARE or not each.isalpha() for each in bare)
        if not marked or not _OPERATORS.isdisjoint(bare):
            return match.group()
    shown = [value for _, value in _SHOWN.findall(attributes) if len(value.split()) >= _SHOWN_WORDS]
    if shown:
        return f" {' '.join(shown)} "
    return "" if name in _INLINE else "\n"
