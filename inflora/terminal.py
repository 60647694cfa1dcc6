"""What a terminal, or the file that output goes to, can show."""

import io
import sys


def tolerate_any_encoding() -> None:
    """Write what the encoding of standard output and error lacks (a true minus sign, in many of Windows) as an escape, not as an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's are not
            stream.reconfigure(errors="backslashreplace")
