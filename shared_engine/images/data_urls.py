"""Data URLs of images, alone or within a text. Needs no Pillow."""

from __future__ import annotations

import re

_HEAD = re.compile(r"data:image/[\w.+-]+(;[^;,\s]+)*,", re.ASCII | re.IGNORECASE)
_LONGEST_HEAD = 256
_BASE64 = re.compile(
    r"(?:(?:[A-Za-z0-9+/]++|%[0-9A-F]{2})*+"  # in one line, or in lines as in an e-mail
    r"|(?:[A-Za-z0-9+/]{1,76}+\r?\n)++[A-Za-z0-9+/]{0,76}+)"
    r"(?:=|%3D){0,2}[\r\n]*+",
    re.IGNORECASE,
)
_ESCAPED = re.compile(
    r"[\w.~/+-]*+(?:%[0-9A-F]{2}[\w.~/+=-]*+)++[\r\n]*+", re.ASCII | re.IGNORECASE
)
_TAG_START = re.compile(r"""<img\s+src=(['"])\Z""")
_TAG_END = re.compile(r"""(['"])\s*/?>\Z""")
_LONGEST_TAG = 64
_SEPARATORS = (" ", "\n")


def is_data_url(text: object) -> bool:
    """Return whether a whole text is the data URL of an image.

    The body is base64, in one line or in lines of at most 76 characters, or percent-encoded bytes.
    One character that fits neither makes it a text.

    >>> is_data_url("data:image/png;base64,iVBORw0KGgo=")
    True
    >>> is_data_url("data:image/png;base64,iVBORw0KGgo=) shows"), is_data_url("data:image/png, a")
    (False, False)
    """
    if not isinstance(text, str) or text[:5].lower() != "data:":
        return False
    head = _HEAD.match(text, 0, _LONGEST_HEAD)
    if head is None:
        return False
    if _BASE64.fullmatch(text, head.end()):
        return True
    return not head[0].lower().endswith(";base64,") and bool(_ESCAPED.fullmatch(text, head.end()))


def split_data_url(text: str) -> tuple[str, str] | None:
    r"""Return the text before a final data URL, and the URL; None if the text ends otherwise.

    The URL may be in an <img> tag. One space or newline between text and URL belongs to neither.

    >>> split_data_url("a cat\ndata:image/png;base64,AAAA")
    ('a cat', 'data:image/png;base64,AAAA')
    >>> split_data_url("a cat <img src='data:image/png;base64,AAAA'/>")
    ('a cat', 'data:image/png;base64,AAAA')
    >>> split_data_url("data:image/png;base64,AAAA")
    ('', 'data:image/png;base64,AAAA')
    >>> split_data_url("data:image/png;base64,AAAA is a data URL") is None
    True
    """
    start = text.rfind("data:image/")
    if start < 0:
        return None
    before, url = text[:start], text[start:].rstrip()
    tag_start = _TAG_START.search(before[-_LONGEST_TAG:])
    tag_end = _TAG_END.search(url[-_LONGEST_TAG:])
    if tag_start and tag_end and tag_start[1] == tag_end[1]:
        before, url = before.removesuffix(tag_start[0]), url.removesuffix(tag_end[0])
    elif before and before[-1] not in _SEPARATORS:
        return None
    if not is_data_url(url):
        return None
    return before[:-1] if before[-1:] in _SEPARATORS else before, url
