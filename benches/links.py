"""Links beside their floors, in turns, in one sitting; prints the ratios that README.md quotes.

    python benches/links.py [--turns 5] [--seconds 0.5] [--json FILE] [--guest]

tcp: two network namespaces joined by a veth pair. A hop of 14 and 28 KiB (one dict of two tensors) beside gloo as vLLM uses it (benches/gloo_hop.py)
and beside a raw TCP ping-pong of the same bytes; 16 MiB messages one way beside iperf3 with as many streams: with the host's congestion
control, as iperf3 does by itself, and with the one that the link has (RAYLESS_TCP_CONGESTION: not bbr); and beside a bare program that sends
from and receives into 16 MiB, since iperf3's buffers of 128 KiB stay in the cache. shm: 28 KiB beside a
futex ping-pong plus a copy of as many bytes, 16 MiB beside memcpy. --guest: rdma in an emulated guest beside ib_send_lat, ib_write_lat and ib_write_bw;
nothing is concluded from those, for an emulated clock lies. Run it with a Python that has torch and this tree's rayless on
PYTHONPATH and PATH, as `benches/run links` does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import netns
from nodes import new_token

SMALL = (14 << 10, 28 << 10)
LARGE = 16 << 20
STREAMS = 4


def read(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON that a command printed."""
    if done.returncode != 0:
        raise RuntimeError(f"{done.args} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


class Tcp:
    """What is measured between the two namespaces."""

    def __init__(self, a: netns.Host, b: netns.Host, folder: Path, floors: str, seconds: float) -> None:
        self.a, self.b, self.floors, self.seconds = a, b, floors, seconds
        self.token = new_token(folder)
        self.link = self._listening(
            ["rayless", "bench", "link", "--listen", f"{b.address}:0", "--token-file", str(self.token)]
        )
        self.raw = self._listening([floors, "tcp-listen", f"{b.address}:0"])
        self.bulk_at = self._listening([floors, "bulk-listen", f"{b.address}:0"])
        b.popen(["iperf3", "--server", "--bind", b.address], stdout=subprocess.DEVNULL)
        self.port = 29500

    def _listening(self, words: list[str]) -> str:
        child = self.b.popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert child.stdout
        return child.stdout.readline().decode().strip()

    def links(self, *sizes: int) -> dict[int, dict[str, float]]:
        """By size: p50 and p99 of a hop, and GB/s one way."""
        words = ["rayless", "bench", "link", "--to", self.link, "--token-file", str(self.token), "--transport", "tcp"]
        words += ["--json", "--streams", str(STREAMS), "--seconds", str(self.seconds), "--sizes"]
        document = read(self.a.run([*words, ",".join(map(str, sizes))], timeout=300))
        return flat(document["transports"][0]["points"])

    def ping_pong(self, size: int) -> dict[str, float]:
        """A raw TCP ping-pong."""
        got: dict[str, float] = read(
            self.a.run([self.floors, "tcp-to", self.raw, str(size), str(self.seconds)], timeout=300)
        )
        return got

    def gloo(self, size: int) -> dict[str, float]:
        """A hop as vLLM makes it."""
        self.port += 1
        rest = [self.a.address, str(self.port), str(size), str(self.seconds)]
        script = [sys.executable, str(ROOT / "benches" / "gloo_hop.py")]
        env = ["env", "GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1"]
        other = self.b.popen([*env, *script, "1", *rest], stdout=subprocess.DEVNULL)
        got: dict[str, float] = read(self.a.run([*env, *script, "0", *rest], timeout=300))
        other.wait(60)
        return got

    def bulk(self, size: int) -> dict[str, float]:
        """GB/s of as many raw streams as a link has, from and to a buffer of ``size`` bytes."""
        words = [self.floors, "bulk-to", self.bulk_at, str(STREAMS), str(size), str(self.seconds), "auto"]
        got: dict[str, float] = read(self.a.run(words, timeout=300))
        return got

    def iperf(self, congestion: str = "") -> float:
        """GB/s of iperf3, with the host's congestion control or this one."""
        words = ["iperf3", "--client", self.b.address, "--parallel", str(STREAMS), "--json", "--omit", "1"]
        words += ["--congestion", congestion] if congestion else []
        document = read(self.a.run([*words, "--time", str(max(2, round(4 * self.seconds)))], timeout=300))
        return float(document["end"]["sum_received"]["bits_per_second"]) / 8e9


def like_the_link(host: netns.Host) -> str:
    """The congestion control that a link has on this host."""
    own = host.run(["sysctl", "-n", "net.ipv4.tcp_congestion_control"]).stdout.strip()
    return "cubic" if own.startswith("bbr") else own


def flat(points: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """The numbers that are compared, by size."""
    return {
        point["bytes"]: {
            "p50_us": point["latency_us"]["p50"],
            "p99_us": point["latency_us"]["p99"],
            "gb_s": point["gigabytes_per_s"],
        }
        for point in points
    }


def shm(floors: str, size: int, seconds: float) -> dict[str, float]:
    """A link between two processes, and its floor."""
    words = [
        "rayless",
        "bench",
        "link",
        "--transport",
        "shm",
        "--json",
        "--seconds",
        str(seconds),
        "--sizes",
        str(size),
    ]
    point = flat(read(subprocess.run(words, capture_output=True, text=True))["transports"][0]["points"])[size]
    floor = read(subprocess.run([floors, "shm", str(size), str(seconds)], capture_output=True, text=True))
    return {**point, **floor, "memcpy_gb_s": size / floor["memcpy_us"] / 1e3}


def guest(seconds: float) -> dict[str, Any]:
    """rdma over both kinds of software device, beside perftest on the same."""
    tool = ROOT / "tests" / "rdma-vm" / "rdma-vm"
    packages = ["qemu-system-x86", "busybox-static", "cpio", "kmod", "rdma-core", "ibverbs-providers", "libibverbs1"]
    packages += ["librdmacm1", "iproute2", "linux-headers-amd64", "perftest"]
    subprocess.run([ROOT / "tests" / "setup" / "apt", *packages], check=True)
    subprocess.run([tool, "setup"], check=True)
    script = Path(__file__).parent / "rdma_guest.sh"
    command = shutil.which("rayless")
    assert command
    words = [tool, "run", "--timeout", "600", "--", "bash", script, command, str(seconds)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    out: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        kind, what, value = line.split(" ", 2)
        shown = value.strip()
        out.setdefault(kind, {})[what] = flat(json.loads(shown)["transports"][0]["points"]) if what == "link" else shown
    return out


def median(turns: list[dict[str, float]], key: str) -> float:
    """Over the turns."""
    return statistics.median(turn[key] for turn in turns)


def compare(what: str, ratio: float, limit: float, at_most: bool = True) -> dict[str, Any]:
    """A line for people and an entry for the file."""
    word = "at most" if at_most else "at least"
    holds = ratio <= limit if at_most else ratio >= limit
    print(f"{what:62} {ratio:6.2f}   {word} {limit:.2f}: {'yes' if holds else 'NO'}", flush=True)
    return {"what": what, "ratio": ratio, word: limit, "holds": holds}


def main() -> None:
    """Measures in turns, then prints the ratios of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--guest", action="store_true")
    asked = parser.parse_args()
    subprocess.run([ROOT / "tests" / "setup" / "apt", "iperf3"], check=True)
    build = ["cargo", "build", "--release", "--quiet", "--package", "rayless-fabric", "--example", "floors"]
    built = subprocess.run(
        [*build, "--message-format", "json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    lines = [json.loads(line) for line in built.stdout.splitlines()]
    floors = next(str(line["executable"]) for line in lines if line.get("executable"))

    turns: dict[str, list[dict[str, float]]] = {}

    def note(key: str, value: dict[str, float]) -> None:
        turns.setdefault(key, []).append(value)

    with netns.hosts(2) as (a, b), tempfile.TemporaryDirectory() as folder:
        tcp = Tcp(a, b, Path(folder), floors, asked.seconds)
        for _ in range(asked.turns):
            for size in SMALL:
                note(f"tcp {size}", tcp.links(size)[size])
                note(f"raw {size}", tcp.ping_pong(size))
                note(f"gloo {size}", tcp.gloo(size))
            note(f"tcp {LARGE}", tcp.links(LARGE)[LARGE])
            note("iperf", {"gb_s": tcp.iperf()})
            note("iperf like the link", {"gb_s": tcp.iperf(like_the_link(a))})
            note("bulk", tcp.bulk(LARGE))
            for size in (SMALL[1], LARGE):
                note(f"shm {size}", shm(floors, size, asked.seconds))

    print(f"medians of {asked.turns} turns\n{'':62}  ratio")
    shown = []
    for size in SMALL:
        hop, name = (
            median(turns[f"tcp {size}"], "p50_us"),
            f"tcp, {size >> 10} KiB, p50 {median(turns[f'tcp {size}'], 'p50_us'):.1f} us",
        )
        gloo, raw = median(turns[f"gloo {size}"], "p50_us"), median(turns[f"raw {size}"], "p50_us")
        shown.append(compare(f"{name} / gloo as vLLM uses it {gloo:.1f}", hop / gloo, 0.25))
        shown.append(compare(f"{name} / raw ping-pong {raw:.1f}", hop / raw, 1.5))
        p99 = median(turns[f"tcp {size}"], "p99_us")
        shown.append(compare(f"tcp, {size >> 10} KiB, p99 {p99:.1f} us / p50", p99 / hop, 4))
    fast, iperf = median(turns[f"tcp {LARGE}"], "gb_s"), median(turns["iperf"], "gb_s")
    shown.append(compare(f"tcp, 16 MiB, {fast:.2f} GB/s / iperf3 -P {STREAMS} {iperf:.2f}", fast / iperf, 0.85, False))
    like, bulk = median(turns["iperf like the link"], "gb_s"), median(turns["bulk"], "gb_s")
    print(f"{f'   the same beside iperf3 with the congestion control of the link {like:.2f}':62} {fast / like:6.2f}")
    print(f"{f'   the same beside raw streams from and to 16 MiB {bulk:.2f}':62} {fast / bulk:6.2f}")
    small, large = turns[f"shm {SMALL[1]}"], turns[f"shm {LARGE}"]
    hop, floor = median(small, "p50_us"), median(small, "futex_us") + median(small, "memcpy_us")
    shown.append(compare(f"shm, 28 KiB, p50 {hop:.1f} us / futex ping-pong + memcpy {floor:.1f}", hop / floor, 1.5))
    spun = median(small, "spin_us") + median(small, "memcpy_us")
    print(f"{f'   the same beside a ping-pong that spins + memcpy {spun:.1f}':62} {hop / spun:6.2f}")
    handed = median(small, "handed_us")
    print(
        f"{f'   the same beside a bare copy in by one core and out by the other {handed:.1f}':62} {hop / handed:6.2f}"
    )
    fast, copy = median(large, "gb_s"), median(large, "memcpy_gb_s")
    shown.append(compare(f"shm, 16 MiB, {fast:.2f} GB/s / memcpy {copy:.2f}", fast / copy, 0.8, False))
    document: dict[str, Any] = {"ratios": shown, "turns": turns}
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1))
    if asked.guest:
        document["guest"] = guest(asked.seconds)
        for kind, values in document["guest"].items():
            print(f"{kind} (emulated): {json.dumps(values)}")
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
