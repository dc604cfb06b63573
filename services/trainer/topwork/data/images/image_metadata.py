"""Removes metadata from image files before they are decoded, so that damaged or huge metadata does not matter."""

from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
EXIF_HEADER = b"Exif\0\0"

# Longer metadata is not stored: every epoch would read it again.
MAX_STORED_METADATA_BYTES = 64 * 2**10
_MAX_EXIF_BYTES = 64 * 2**10
_APP0, _APP1, _APP14, _APP15, _COMMENT, _START_OF_SCAN, _END = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE, 0xDA, 0xD9


def remove_metadata(data: bytes) -> bytes:
    """Remove everything from a PNG or JPEG file that does not affect its pixels, except an EXIF block.

    Text, color profiles and thumbnails are dropped without decompressing them.

    Args:
        data: Bytes of an image file of any format.

    Returns:
        Bytes of the same image. Other formats are returned unchanged.
    """
    if data.startswith(PNG_SIGNATURE):
        return b"".join((PNG_SIGNATURE, *_essential_chunks(data)))
    if data.startswith(JPEG_SIGNATURE):
        return b"".join((JPEG_SIGNATURE, *_essential_segments(data)))
    return data


def find_png_chunk(data: bytes, kind: bytes) -> bytes | None:
    """Find the first chunk of a kind in a PNG file.

    Args:
        data: Bytes of the file.
        kind: Type of the chunk, such as `tRNS`.

    Returns:
        The content of the chunk, or None.
    """
    for position, length, found in _chunks(data):
        if found == kind:
            return data[position + 8 : position + 8 + length]
    return None


def _chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield position, length and type of each complete chunk."""
    position = len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if position + 12 + length > len(data):
            return
        yield position, length, data[position + 4 : position + 8]
        position += 12 + length


def _essential_chunks(data: bytes) -> Iterator[bytes]:
    end, has_pixels, has_exif = len(PNG_SIGNATURE), False, False
    for position, length, kind in _chunks(data):
        end = position + 12 + length
        has_pixels |= kind == b"IDAT"
        is_exif = kind == b"eXIf" and not (has_pixels or has_exif) and length <= _MAX_EXIF_BYTES
        has_exif |= is_exif
        is_critical = kind[:1].isupper()
        if is_critical or kind == b"tRNS" or is_exif:
            yield data[position:end]
        if kind == b"IEND":
            return
    yield data[end:]  # an incomplete chunk: the decoder reports it


def _essential_segments(data: bytes) -> Iterator[bytes]:
    position, has_exif = len(JPEG_SIGNATURE), False
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker in (0x00, 0x01, _START_OF_SCAN, _END) or 0xD0 <= marker <= 0xD8:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        content = data[position + 4 : end]
        is_exif = marker == _APP1 and content.startswith(EXIF_HEADER) and not has_exif
        has_exif |= is_exif
        is_metadata = _APP0 <= marker <= _APP15 or marker == _COMMENT
        if not is_metadata or is_exif or _affects_colors(marker, content):
            yield data[position:end]
        position = end
    yield data[position:]


def _affects_colors(marker: int, content: bytes) -> bool:
    """Check for the segments from which libjpeg derives the color space."""
    return (marker == _APP0 and content.startswith(b"JFIF\0") and len(content) >= 14) or (
        marker == _APP14 and content.startswith(b"Adobe") and len(content) >= 12
    )
