"""A fixed time for chat templates that print the date (Llama 3, Granite, SmolLM3, gpt-oss).

Transformers gives templates a function ``strftime_now``, so the same conversation would be other tokens tomorrow: in a
run resumed, in input added later, in queries. Here it is a macro of the template itself, which formats one fixed time.
It is saved with the run's tokenizer, so that whoever renders with that copy gets the same text.
"""

import json
import re
from datetime import datetime
from functools import cache
from typing import Any

# The date that Llama 3's own template prints where there is no clock.
FIXED = datetime(2024, 7, 26)

_FUNCTION = "strftime_now"
_FIXED_AT = re.compile(r"\{# the clock is fixed at (\S+) #\}")
# Not %s: seconds since 1970 depend on the machine's time zone.
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZf"


def with_fixed_clock(template: str) -> str:
    """The template with a ``strftime_now`` of its own; unchanged if it does not read the clock or has one already."""
    if _FUNCTION not in template or _FIXED_AT.search(template):
        return template
    return _macro() + template


def fix_clock(tokenizer: Any) -> None:
    """Change a tokenizer's chat templates (one, or several by name) to ``with_fixed_clock``."""
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        tokenizer.chat_template = with_fixed_clock(templates)
    elif templates:
        tokenizer.chat_template = {name: with_fixed_clock(template) for name, template in templates.items()}


def fixed_time(tokenizer: Any) -> str | None:
    """The time that a tokenizer's chat templates print, in ISO 8601; None if they do not read the clock."""
    templates = tokenizer.chat_template or ""
    for template in [templates] if isinstance(templates, str) else templates.values():
        if found := _FIXED_AT.search(with_fixed_clock(template)):
            return found[1]
    return None


@cache
def _macro() -> str:
    """A macro that puts the parts of FIXED where a format has its directives; "%%" is NUL in between."""
    times = {letter: FIXED.strftime(f"%{letter}") for flag in ("", "-") for letter in map(flag.__add__, _DIRECTIVES)}
    known = json.dumps({letter: text for letter, text in times.items() if text != f"%{letter}"})
    return (
        f"{{# the clock is fixed at {FIXED.isoformat()} #}}"
        f"{{% macro {_FUNCTION}(format) %}}{{% set times = {known} %}}"
        r"{% filter replace('\x00', '%') %}{% for piece in format.replace('%%', '\x00').split('%') %}"
        "{% if loop.first %}{{ piece }}{% else %}{% set letter = piece[:2] if piece[:1] == '-' else piece[:1] %}"
        "{{ times.get(letter, '%' ~ letter) ~ piece[letter | length:] }}{% endif %}"
        # The newline belongs to the block tag (trim_blocks): the template goes on as at the beginning of a file.
        "{% endfor %}{% endfilter %}{% endmacro %}\n"
    )
