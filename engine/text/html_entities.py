"""Writes html_entities.h, the named character references of HTML5, from Python's own table.

    python engine/text/html_entities.py > engine/html_entities.h

`html.entities.html5` is what `html.unescape` consults; the all-capitals column follows
`ftfy.chardata._build_html_entities` (ftfy 6.3.1), which also decodes `&NTILDE;`.
"""

import html
from html.entities import html5


def c_string(text):
    """A C string literal of the UTF-8 bytes of `text`: octal escapes, which unlike \\x end after three digits."""
    plain = lambda byte: 0x20 <= byte < 0x7F and chr(byte) not in '"\\?'
    return '"' + "".join(chr(b) if plain(b) else f"\\{b:03o}" for b in text.encode()) + '"'


def row(name):
    """One entry: name, text, text of the name in capitals (or none), whether the semicolon may be missing."""
    caps = name == name.lower() and html.unescape(f"&{name.upper()};") == f"&{name.upper()};"
    capital = c_string(html5[name + ";"].upper()) if caps else "NULL"
    return f'{{"{name}", {c_string(html5[name + ";"])}, {capital}, {int(name in html5)}}},'


def lines(items, width=110):
    """Joins items with spaces into lines of at most `width` columns."""
    line = ""
    for item in items:
        if line and len(line) + 1 + len(item) > width:
            yield line
            line = ""
        line = f"{line} {item}" if line else item
    yield line


if __name__ == "__main__":
    names = sorted(name[:-1] for name in html5 if name.endswith(";"))
    print("/* html_entities.h - written by html_entities.py; sorted by name for binary search.")
    print(" * name, text, text of the name in capitals or NULL, 1 if it counts without its semicolon too */")
    print("\n".join(lines(map(row, names))))
