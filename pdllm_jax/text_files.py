"""Text files."""

from pathlib import Path


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file without its byte order mark.

    Raises:
      ValueError: the file is not UTF-8; the message names it and the byte.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from None
