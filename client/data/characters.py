"""Characters that do not belong into a text: how each kind is found, and how it is cured.

A text has a fault exactly if its cure changes it, so what `clean` leaves `check` does not report.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from client.data.findings import Code

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CARRIAGE = re.compile(r"\r\n?")
# Zero width, soft hyphen, word joiner, byte order mark, marks and overrides of direction, tags (which hide
# instructions from people, not from models).
_HIDDEN = re.compile(
    "[\u200b\u00ad\u2060-\u2064\ufeff\u200e\u200f\u202a-\u202e\u2066-\u2069\U000e0001-\U000e007f]"
)
_JOINERS = re.compile("[\u200c\u200d]")  # join emoji, and letters of scripts that need them
_LATIN_ENDS = 0x250
_BLANKS = re.compile(r"[^\S\n]+")
_BREAKS = re.compile(r" ?\n ?")
_MANY_BREAKS = re.compile(r"\n{3,}")
_BLOCKS = "p|div|br|hr|li|ul|ol|table|tr|td|th|thead|tbody|h[1-6]|head|body|html|section|article|pre|title"
_INLINE = (
    "a|abbr|b|big|blockquote|button|center|code|em|font|footer|form|header|i|iframe|img|input|label|link|main|"
    "meta|nav|s|script|small|span|strike|strong|style|sub|sup|svg|u|video"
)
_HIDDEN_BLOCK = re.compile(
    r"<(script|style)\b[^<>]{0,2000}>.{0,20000}?</\1\s*>|<!--.{0,20000}?-->", re.I | re.S
)
_BLOCK_TAG = re.compile(rf"</?(?:{_BLOCKS})(?:\s[^<>]{{0,2000}})?/?>|<!doctype[^<>]{{0,200}}>", re.I)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE})(?:\s[^<>]{{0,2000}})?/?>", re.I)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")


def strip_control(text: str) -> str:
    """Without control characters but tab and line feed; what parts words leaves a blank."""
    text = _CARRIAGE.sub("\n", text) if "\r" in text else text
    return _CONTROL.sub(lambda match: " " if match.group().isspace() else "", text)


def strip_invisible(text: str) -> str:
    """Without characters that nobody sees. A joiner stays where an emoji or a script needs it."""
    if text.isascii():
        return text
    text = _HIDDEN.sub("", text)
    while (kept := _JOINERS.sub(lambda match: match.group() if _joins(match) else "", text)) != text:
        text = kept
    return text


def _joins(match: re.Match[str]) -> bool:
    text, start, end = match.string, match.start(), match.end()
    return start > 0 and end < len(text) and min(ord(text[start - 1]), ord(text[end])) >= _LATIN_ENDS


def collapse_space(text: str) -> str:
    """Runs of blanks as one blank, at most one empty line, nothing at both ends."""
    text = _BREAKS.sub("\n", _BLANKS.sub(" ", text))
    return _MANY_BREAKS.sub("\n\n", text).strip()


def strip_html(text: str) -> str:
    """Without tags of HTML and comments, entities as characters. `<x>` that is no tag of HTML stays."""
    while "<" in text or "&" in text:
        bare = _INLINE_TAG.sub("", _BLOCK_TAG.sub(" ", _HIDDEN_BLOCK.sub(" ", text)))
        bare = _ENTITY.sub(lambda match: html.unescape(match.group()), bare)
        if bare == text:
            break
        text = bare
    return text


def normalise_unicode(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def fix_mojibake(text: str) -> str:
    """UTF-8 that was read as another encoding, read rightly. Other characters stay as they are."""
    if text.isascii():
        return text
    from ftfy import TextFixerConfig, fix_encoding
    from ftfy.badness import is_bad

    if not is_bad(text):
        return text
    # Only whole and certain repairs: nothing lossy, no replacing of single characters.
    sure = TextFixerConfig(replace_lossy_sequences=False, restore_byte_a0=False, fix_c1_controls=False)
    return fix_encoding(text, sure)


@dataclass(frozen=True)
class TextFault:
    """`says` completes "N rows …"."""

    code: Code
    says: str
    cure: Callable[[str], str] | None  # None: nothing brings it back

    def found(self, text: str) -> bool:
        return "\ufffd" in text if self.cure is None else self.cure(text) != text


FAULTS = (
    TextFault(Code.REPLACEMENT, "with U+FFFD, where a character was lost", None),
    TextFault(Code.MOJIBAKE, "in which UTF-8 was read as another encoding", fix_mojibake),
    TextFault(Code.CONTROL, "with control characters", strip_control),
    TextFault(Code.INVISIBLE, "with characters that nobody sees", strip_invisible),
    TextFault(Code.HTML, "with remnants of HTML", strip_html),
    TextFault(Code.NOT_NFC, "not in Unicode's normal form NFC", normalise_unicode),
    TextFault(Code.SPARE_SPACE, "with blanks at an end, or several in a row", collapse_space),
)
