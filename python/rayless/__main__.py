"""``python -m rayless …`` is the ``rayless`` command that came with this package."""

import os
import sys

from rayless._binary import find

if __name__ == "__main__":
    program = find()
    os.execv(program, [program, *sys.argv[1:]])
