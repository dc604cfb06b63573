"""Guesses the encoding of the file names in an archive that does not declare it.

Zip files mark UTF-8 names with a flag, but macOS, older versions of Windows and many scripts leave it out; tar files do
not declare an encoding at all. One program wrote all names of an archive, so one encoding must explain them all.

Detection libraries need sentences; class names are single words. The rule here scores how much each candidate looks
like names: common characters, no mixed scripts within a word, no upper case after lower case.
"""

import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

CANDIDATES = ("cp437", "cp850", "cp932", "gbk", "big5", "cp949", "cp1252", "cp866", "cp1251", "cp852", "cp1250")
"""Encodings in order of preference for equal scores. cp437 is the one that the zip format prescribes."""

MAX_NAMES = 10_000
"""Names that are examined."""

_COMMON_LATIN = frozenset("äöüßéèêëàâáåæøçñíìîïóòôúùûœ" + "ÄÖÜÉÈÀÂÁÅÆØÇÑÍÎÓÔÚŒ")
_PORTUGUESE = frozenset("ãõÃÕ")
_CENTRAL_EUROPEAN = frozenset("čšžřěůťďňýąęłńśźżćőűăâîșțşţğıđľĺŕ" + "ČŠŽŘĚŮŤĎŇÝĄĘŁŃŚŹŻĆŐŰŞŢĞİĐĽ")
# The most frequent syllables of Korean nouns; all of KS X 1001 has 2,350.
_FREQUENT_HANGUL = frozenset(
    "이가나다라마바사아자차카타파하고기지리스시도구수인어부대일전정상원장조주해동물보무미비오우유자로소과화교경국"
    "그래레르를모문민방배백버복분블새생서석선성세신실안암양여연영예온와용운울위의제종중지진창천초치크토트판포프"
    "피학한행현호환회후강개거견고양곰공광군권금꽃나비남네녹농누늑능니단닭당데돌돼두드들디딸때러류릿말매머메면명"
    "목박밥뱀병불빵뿔산살상새소숲술식쌀쥐집차책초콜키탕터텔토통퍼펭편품풍필합향홍흰"
)
_WORD = re.compile(r"[^\W\d_]+")
_JAPANESE = frozenset({"CJK", "HIRAGANA", "KATAKANA"})
_EAST_ASIAN = _JAPANESE | {"HANGUL"}


def is_utf8(name: bytes) -> bool:
    """Return whether a name is valid UTF-8."""
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def guess_encoding(names: Iterable[bytes]) -> str:
    """Guess the encoding of names that are not all valid UTF-8.

    Args:
        names: All names of an archive whose encoding is not declared.

    Returns:
        `utf-8` if all names are, or else the most plausible of `CANDIDATES`.

    Example:
        >>> guess_encoding(["猫".encode("cp932"), "犬".encode("cp932")])
        'cp932'
    """
    unique = list(dict.fromkeys(names))[:MAX_NAMES]
    if all(map(is_utf8, unique)):
        return "utf-8"
    scores = {encoding: _score(unique, encoding) for encoding in CANDIDATES}
    return max(CANDIDATES, key=lambda encoding: scores[encoding])


def _score(names: list[bytes], encoding: str) -> float:
    """Return the mean plausibility of all characters outside of ASCII; -1 if a name is not valid in the encoding."""
    total, count = 0.0, 0
    for name in names:
        try:
            text = name.decode(encoding)
        except UnicodeDecodeError:
            return -1.0
        words = _WORD.findall(text)
        total += sum(_score_word(word, encoding) for word in words)
        # Letters form names. A backslash is a separator or the second byte of a character in another encoding.
        symbols = [character for character in _WORD.sub("", text) if not character.isascii() or character == "\\"]
        total -= 0.5 * len(symbols)
        count += len(symbols) + sum(not character.isascii() for word in words for character in word)
    return total / max(1, count)


def _score_word(word: str, encoding: str) -> float:
    foreign = [character for character in word if not character.isascii()]
    if not foreign:
        return 0.0
    scripts = {_script(character) for character in word}
    score = sum(_score_character(character, encoding) for character in foreign)
    if len(scripts) > 1 and not scripts <= _JAPANESE:
        # Latin letters do occur next to Chinese characters, but seldom.
        return 0.4 * score if scripts & _EAST_ASIAN else 0.0
    if any(first.islower() and second.isupper() for first, second in pairwise(word)):
        return 0.1 * score
    if scripts == {"LATIN"} and 2 * len(foreign) > len(word) and len(word) > 1:
        return 0.4 * score  # most letters of a Latin word have no accent
    if scripts == {"CYRILLIC"} and len(word) > 1 and word.isupper():
        return 0.8 * score
    return score


def _script(character: str) -> str:
    return unicodedata.name(character, "?").split(maxsplit=1)[0]


def _score_character(character: str, encoding: str) -> float:
    script = _script(character)
    if script == "LATIN":
        known = {0.9: _COMMON_LATIN, 0.85: _PORTUGUESE, 0.8: _CENTRAL_EUROPEAN}
        return next((score for score, characters in known.items() if character in characters), 0.4)
    if script in {"HIRAGANA", "KATAKANA"}:
        return 1.0 if encoding == "cp932" else 0.3
    if script == "CYRILLIC":
        is_common = "\u0410" <= character <= "\u044f" or character in "ёЁіІїЇєЄ"
        return 0.7 if is_common else 0.2
    if script == "HANGUL":
        return 0.9 if character in _FREQUENT_HANGUL else 0.4 if _is_common(character, encoding) else 0.1
    if script == "CJK":
        return 0.6 if _is_common(character, encoding) else 0.2
    return 0.0


_COMMON_ZONES = {
    "cp932": (b"\x88\x9f", b"\x98\x72"),  # JIS X 0208, level 1
    "gbk": (b"\xb0\xa1", b"\xd7\xf9"),  # GB 2312, level 1
    "big5": (b"\xa4\x40", b"\xc6\x7e"),  # frequently used characters
    "cp949": (b"\xb0\xa1", b"\xc8\xfe"),  # Hangul of KS X 1001
}


def _is_common(character: str, encoding: str) -> bool:
    """Return whether a character is in the part of a character set that is meant for frequent use."""
    code = character.encode(encoding)
    first, last = _COMMON_ZONES.get(encoding, (b"", b""))
    if not first <= code <= last:
        return False
    # GBK and cp949 extend GB 2312 and KS X 1001 with rare characters, whose second byte is below 0xA1.
    return encoding not in ("gbk", "cp949") or code[1] >= 0xA1
