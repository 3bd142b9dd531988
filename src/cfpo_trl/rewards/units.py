r"""Units behind a number: which texts are some, and which two are the same."""

import re

_SPELLINGS = """
mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|in inch|ft foot feet
yd yard|mi mile|mg milligram|g gram|kg kilogram|oz ounce|lb pound|ton tonne|ml milliliter millilitre|l liter litre
gal gallon|quart|pint|cup|s sec second|min minute|h hr hour|day|week|month|year yr|hz hertz|n newton
j joule|w watt|v volt|ohm|celsius|fahrenheit|kelvin|deg degree|rad radian|dollar usd|cent|euro eur|penny pence
gbp|yen|yuan|rupee|ruble|unit|point|person people|student|child children|man men|woman women|way
"""
UNITS = {name: names.split()[0] for names in re.split(r"[|\n]", _SPELLINGS) for name in names.split()}
UNITS |= {"mph": "mi / h", "kmh": "km / h", "kph": "km / h", "kmph": "km / h"}
SHAPES = {"square": "sq", "squared": "sq", "sq": "sq", "cubic": "cu", "cubed": "cu", "cu": "cu", "per": "/", "/": "/"}
MAGNITUDES = ("dozen", "hundred", "thousand", "million", "billion", "trillion", "tenth", "hundredth", "thousandth")

_FACTORS = {"pi", "theta", "lakh", "crore", *SHAPES}  # text behind a number that is no unit
_LARGE = set("MGSH")  # million, giga, …: no meter, gram, second or hour

_SPACE = r"(?:\s|\\[,;: ]|\\q?quad\b|~)*"
_POWER = r"\s*(?:\^\s*\{?\s*([23])\s*\}?)?"
_MARKED = re.compile(rf"{_SPACE}\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)\s*\{{([^{{}}]*)\}}{_POWER}\s*$")
_ANY_TEXT = re.compile(rf"(?<=[\d)}}]){_SPACE}\\text\s*\{{([A-Za-z ./]{{2,}})\}}{_POWER}\s*$")
_PLAIN = re.compile(rf"(?<=[\d)}}])({_SPACE})([A-Za-z][A-Za-z ./]*){_POWER}\s*$")


def split_unit(text: str) -> tuple[str, str]:
    r"""A number and the name of its unit: `5` and `cm` of `5\text{ cm}`, `5 cm` and `5\,\mathrm{centimeters}`.

    The name is empty, and the text whole, where there is no unit that is known. A single letter without `\text` is a
    unit only behind a space: `5t` is a product.
    """
    if marked := _MARKED.search(text):
        phrase, power, start = marked[1], marked[2], marked.start()
    elif plain := _PLAIN.search(text):
        phrase, power, start = plain[2], plain[3], plain.start()
        if not plain[1] and len(phrase) == 1:
            return text, ""
    else:
        return text, ""
    name = unit_name(phrase)
    if not name:
        return text, ""
    return text[:start], {"2": "sq ", "3": "cu "}.get(power, "") + name


def without_unit(formula: str) -> str:
    r"""A number without the text behind it, known as a unit or not: `12` of `12\text{ apples}`."""
    value, unit = split_unit(formula)
    text = None if unit else _ANY_TEXT.search(formula)
    if text is None:
        return value
    words = text[1].lower().split()
    return value if len("".join(words)) == 1 or _FACTORS & set(words) else formula[: text.start()]


def unit_name(phrase: str) -> str:
    """One name for all spellings: `sq cm` for `square centimeters`; empty where a word is unknown."""
    phrase = re.sub(r"~|\\[,;: ]", " ", phrase)
    if phrase.strip() in _LARGE:
        return ""
    words = re.findall(r"[a-z]+|[^a-z\s.]", phrase.lower())
    names = [SHAPES.get(word) or UNITS.get(word) or UNITS.get(re.sub(r"e?s$", "", word)) or "" for word in words]
    names = [name or UNITS.get(word.removesuffix("s"), "") for name, word in zip(names, words, strict=True)]
    if not all(names) or not set(names) - set(SHAPES.values()):
        return ""
    shapes = [name for name in names if name in ("sq", "cu")]  # `meters squared`, too
    return " ".join([*shapes, *(name for name in names if name not in ("sq", "cu"))])
