"""Finds the native ``rayless`` command that was installed with this package."""

from __future__ import annotations

import os
import shutil
import sys


def find() -> str:
    """Its path: beside this interpreter, beside a ``pip install --target`` folder, else on PATH.

    Raises ``FileNotFoundError`` where there is none.
    """
    import sysconfig

    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folders = [os.path.join(package, "bin"), sysconfig.get_path("scripts"), os.path.dirname(sys.executable)]
    for folder in folders:
        path = os.path.join(folder, "rayless")
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    found = shutil.which("rayless")
    if found is None:
        raise FileNotFoundError(
            "the `rayless` command is not beside this Python and not on PATH\n"
            "hint: pip install rayless, or put the folder of the command on PATH"
        )
    return found
