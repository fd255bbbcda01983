"""Writes tables.h, the data of html.c and unicode.c, from Python's html and unicodedata modules and from ftfy.

    python engine/text/tables.py > engine/text/tables.h

The committed file is from Python 3.11 (Unicode 14) and ftfy 6.3.1. Later versions of Unicode add characters and never
change the decomposition or composition of existing ones. All numbers are hexadecimal.

    names           "aacute*=e1^c1,": a character name of HTML5 and its code point. "*": valid without a semicolon.
                    "3d+20e5": two code points. "^c1": the value of the name in capitals, which only ftfy accepts;
                    without "^" it is the same value
    decompositions  "c0=41+300,41+301,": U+00C0 has the parts U+0041 U+0300; the next item is for U+00C1.
                    "!": form C does not compose the parts again
    forms           the same format: the Latin ligatures and the full-width and half-width forms that ftfy replaces
    classes         "300-314=e6,": canonical combining classes other than 0
    zeros           "30,660,": the digit 0 of each script; the digits 1 to 9 follow it
"""

import html
import itertools
import platform
import sys
import unicodedata
from html.entities import html5

import ftfy.chardata

CODES = range(sys.maxunicode + 1)
WIDTH = 1000


def joined(codes):
    return "+".join(f"{code:x}" for code in codes)


def name_item(name):
    """The item of a name, as html.unescape and ftfy.chardata._build_html_entities decode it."""
    text, capitals = html5[name + ";"], html5[name + ";"].upper()
    caps = name == name.lower() and html.unescape(f"&{name.upper()};") == f"&{name.upper()};" and capitals != text
    return f"{name}{'*' * (name in html5)}={joined(map(ord, text))}{'^' * caps}{joined(map(ord, capitals)) * caps}"


def decomposition(code):
    """The item of one step of canonical decomposition, with "!" if form C does not compose the parts."""
    parts = unicodedata.decomposition(chr(code))
    if not parts or parts.startswith("<"):
        return None
    parts = [int(part, 16) for part in parts.split()]
    back = len(parts) == 2 and unicodedata.normalize("NFC", "".join(map(chr, parts))) == chr(code)
    return joined(parts) + "!" * (len(parts) == 2 and not back)


def coded(values):
    """[(code, value)] as items; the code is left out where it is one more than the previous one."""
    last = None
    for code, value in values:
        yield value if code - 1 == last else f"{code:x}={value}"
        last = code


def ranges(values):
    """[(code, value)] as items; consecutive codes of equal value are one item."""
    for _, group in itertools.groupby(enumerate(values), lambda item: (item[1][0] - item[0], item[1][1])):
        group = [item for _, item in group]
        first, last = group[0][0], group[-1][0]
        yield f"{first:x}{f'-{last:x}' if last > first else ''}={group[0][1]:x}"


def table(name, items):
    """A C array of strings, each several items long."""
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + len(item) >= WIDTH:
            lines.append("")
        lines[-1] += item + ","
    return f"static const char *const {name}[] = {{\n" + "".join(f'"{line}",\n' for line in lines) + "NULL};"


def main():
    forms = {code: joined(map(ord, text)) for code, text in (ftfy.chardata.LIGATURES | ftfy.chardata.WIDTH_MAP).items()}
    decompositions = {code: value for code in CODES if (value := decomposition(code))}
    marks = [code for code in CODES if unicodedata.combining(chr(code))]
    names = sorted(name[:-1] for name in html5 if name.endswith(";"))
    print(f"/* tables.h - written by tables.py, which explains it: Python {platform.python_version()}, "
          f"Unicode {unicodedata.unidata_version}, ftfy {ftfy.__version__} */")
    print(f"enum {{ NAMES = {len(names)}, DECOMPOSITIONS = {len(decompositions)}, FORMS = {len(forms)},"
          f" PARTS = {1 + max(value.count('+') for value in forms.values())}, MARKS_END = {marks[-1] + 1:#x} }};")
    print(table("names", map(name_item, names)))
    print(table("decompositions", coded(decompositions.items())))
    print(table("forms", coded(sorted(forms.items()))))
    print(table("classes", ranges((code, unicodedata.combining(chr(code))) for code in marks)))
    print(table("zeros", (f"{c:x}" for c in CODES if unicodedata.decimal(chr(c), None) == 0)))


if __name__ == "__main__":
    main()
