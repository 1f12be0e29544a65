"""Two network namespaces with a daemon each, for the benchmarks that need a cluster: nothing of a test's knobs, the defaults of a user."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from netns import Host, hosts
from serving import rayless_command


def new_token(folder: Path) -> Path:
    """A file with a token that nobody else has."""
    token = folder / "token"
    made = subprocess.run([rayless_command(), "token", "new"], capture_output=True, text=True, check=True)
    token.touch(mode=0o600)
    token.write_text(made.stdout)
    return token


@dataclass
class Nodes:
    """A head in the first namespace, a node in the second."""

    a: Host
    b: Host
    #: Run dir of the head: `RAYLESS_RUN_DIR` of a driver in the first namespace.
    run_dir: str
    #: For whatever else is written; gone at the end.
    base: Path


@contextlib.contextmanager
def two_nodes(*flags: str) -> Iterator[Nodes]:
    """Starts both daemons with these flags; at the end they are stopped and the namespaces are gone."""
    rayless = rayless_command()
    with tempfile.TemporaryDirectory(prefix="rayless-bench-") as folder, hosts(2) as (a, b):
        base = Path(folder)
        near, far = f"{folder}/a", f"{folder}/b"
        common = ["--token-file", str(new_token(base)), "--daemon", *flags]
        try:
            a.run([rayless, "head", "--bind", a.address, "--run-dir", near, "--name", "a", *common])
            b.run([rayless, "join", f"{a.address}:6379", "--run-dir", far, "--name", "b", *common])
            yield Nodes(a, b, near, base)
        finally:
            for host, run_dir in ((b, far), (a, near)):
                host.run([rayless, "stop", "--run-dir", run_dir], check=False)
