"""The augmentation policies of timm as text, such as ``rand-m9-mstd0.5-inc1``: what is allowed in them.

timm itself ignores what it cannot read, or ends in an assertion without a message.
"""

import re
from collections.abc import Iterator

from utils.config.suggest import did_you_mean
from utils.config.values import in_interval

MAGNITUDE, STD, SWITCH = "[0, 30]", "[0, 1000]", "[0, 1]"
LIMIT = 10  # timm clips magnitudes here, unless mmax says otherwise

# policy -> its sections, each with the interval of its number
_RAND = {"m": MAGNITUDE, "n": "[1, 15]", "p": "(0, 1]", "mstd": STD, "mmax": "[1, 30]", "inc": SWITCH}
_AUGMIX = {"m": MAGNITUDE, "w": "[1, 10]", "d": "[1, 10]", "a": "[0.001, 1000]", "b": SWITCH, "mstd": STD}
_AUTO = {"mstd": STD}
POLICIES = {"rand": _RAND, "augmix": _AUGMIX, **dict.fromkeys(("v0", "v0r", "original", "originalr", "3a"), _AUTO)}
_FRACTIONS = ("p", "mstd", "a")  # sections that take a number with a fraction
_OPERATION_SETS = ("tweights", "t3a", "t3aw")  # sections of rand that name a set of operations


def policy_problem(text: str) -> str:
    """Return what is wrong with the text of a policy and what is allowed, or an empty text."""
    policy, *sections = text.split("-")
    if policy not in POLICIES:
        return f"{policy!r} is not a policy; known: {', '.join(POLICIES)}, none{did_you_mean(policy, POLICIES)}"
    faults = list(_section_faults(sections, POLICIES[policy], _OPERATION_SETS if policy == "rand" else ()))
    if not faults:
        return ""
    known = [f"{name} with a number in {interval}" for name, interval in POLICIES[policy].items()]
    known += _OPERATION_SETS if policy == "rand" else ()
    return f"{'; '.join(faults)}. Sections of {policy}, joined by -: {', '.join(known)}"


def clipped_magnitude(text: str) -> str:
    """Return a sentence if the policy's magnitude is above the limit at which timm clips it, or an empty text."""
    numbers = {name: int(number) for name, number in re.findall(r"-(m|mmax)(\d+)(?=-|$)", text)}
    limit = numbers.get("mmax", LIMIT)
    if numbers.get("m", 0) <= limit:
        return ""
    raise_it = f"; -mmax{numbers['m']} raises the limit" if text.startswith("rand") else ""
    return f"its magnitude is {numbers['m']}, but timm clips magnitudes at {limit}{raise_it}"


def _section_faults(sections: list[str], intervals: dict[str, str], named: tuple[str, ...]) -> Iterator[str]:
    seen = set()
    for section in sections:
        name, number = re.fullmatch(r"([a-z]*)(.*)", section, re.DOTALL).groups()
        kind = "t" if section in named else name
        if kind in seen:
            yield f"section {section!r} repeats {kind}"
        seen.add(kind)
        if section in named:
            continue
        if name not in intervals:
            yield f"section {section!r} is unknown"
        elif not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?" if name in _FRACTIONS else r"[0-9]{1,9}", number):
            yield f"section {section!r} needs a {'number' if name in _FRACTIONS else 'whole number'} after {name}"
        elif not in_interval(float(number), intervals[name]):
            yield f"section {section!r} is out of range"
