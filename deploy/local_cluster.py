"""A real federation on one machine: a server and its sites as separate processes, over TLS, with real keys.

    deploy/local-cluster --folder cluster            # the demo over three sites; its summary at the end
    deploy/local-cluster --folder cluster --keep     # and go on serving until Ctrl-C

Everything goes through the commands that a real federation uses. Where root allows, the server and every
site have a network namespace of their own on one bridge, so that a site reaches the server's gate and nothing
else; otherwise they share the loopback under different ports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIDE = [sys.executable, "-P", "-m", "confide"]
PORT = 9092
_DEMO = """
[data]
test = "public.jsonl"

[aggregation]
min_cohort = 3

[server]
deadline_seconds = 600.0
"""


@dataclass
class Network:
    """Where processes run. namespaces: each on its own, else all on the loopback."""

    name: str
    namespaces: bool
    made: list[str] = field(default_factory=list)

    @classmethod
    def best(cls, name: str) -> Network:
        """With namespaces where this machine and this user allow them."""
        if sys.platform != "linux" or shutil.which("ip") is None or os.geteuid() != 0:
            return cls(name, False)
        probe = f"{name}-probe"
        if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
            return cls(name, False)
        _ip("netns", "del", probe)
        return cls(name, True)

    def open(self, sites: int) -> None:
        if not self.namespaces:
            return
        self._add("net")
        _ip("-n", f"{self.name}-net", "link", "add", "bridge", "type", "bridge")
        _ip("-n", f"{self.name}-net", "link", "set", "bridge", "up")
        for number in range(sites + 1):  # 0: the server
            self.join(number)

    def _add(self, role: str) -> str:
        space = f"{self.name}-{role}"
        _ip("netns", "add", space)
        self.made.append(space)
        _ip("-n", space, "link", "set", "lo", "up")
        return space

    def join(self, number: int) -> None:
        """A machine more: a namespace of its own, on the bridge."""
        if not self.namespaces:
            return
        space = self._add(str(number))
        net = f"{self.name}-net"
        _ip("-n", net, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", net, "link", "set", f"port{number}", "master", "bridge", "up")
        _ip("-n", space, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")

    def address(self, number: int) -> str:
        return f"10.97.0.{number + 1}" if self.namespaces else "127.0.0.1"

    def inside(self, number: int) -> list[str]:
        """What a command begins with, to run at the server (0) or at a site."""
        return ["ip", "netns", "exec", f"{self.name}-{number}"] if self.namespaces else []

    def cut(self, number: int, cut: bool) -> None:
        """Take a site off the network, or bring it back. Namespaces only."""
        _ip("-n", f"{self.name}-net", "link", "set", f"port{number}", "down" if cut else "up")

    def can_be_slow(self) -> bool:
        """Whether this kernel delays packets: netem is a module of its own. Tried on the bridge."""
        if not self.namespaces or shutil.which("tc") is None:
            return False
        base = ["tc", "-n", f"{self.name}-net", "qdisc"]
        try:
            _quiet([*base, "add", "dev", "bridge", "root", "netem", "delay", "1ms"])
            _quiet([*base, "del", "dev", "bridge", "root"])
        except subprocess.CalledProcessError:
            return False
        return True

    def slow(self, number: int, milliseconds: int, loss: float = 0.0) -> None:
        """Delay and loss on a site's link, both ways at the switch's end; 0 and 0 take them away."""
        base = ["tc", "-n", f"{self.name}-net", "qdisc"]
        with contextlib.suppress(subprocess.CalledProcessError):
            _quiet([*base, "del", "dev", f"port{number}", "root"])
        if milliseconds or loss:
            more = ["delay", f"{milliseconds}ms", "loss", f"{100 * loss:g}%"]
            _quiet([*base, "add", "dev", f"port{number}", "root", "netem", *more])

    def close(self) -> None:
        for space in reversed(self.made):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", space)
        self.made.clear()


class Cluster:
    """A federation in `folder`: `server/`, `site-1/` and so on, and their processes."""

    def __init__(self, folder: Path, sites: int, network: Network) -> None:
        self.folder = folder.resolve()
        self.sites = sites
        self.network = network
        self.server = self.folder / "server"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # 0: the server
        self.site_program = CONFIDE  # tests put an onlooker in its place

    def site(self, number: int) -> Path:
        return self.folder / f"site-{number}"

    def found(self) -> None:
        """Federation, sites, roster, kits: as people would, one command after the other."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.network.open(self.sites)
        self.confide("server", "init", self.server, "--name", "cluster", "--host", self.network.address(0))
        numbers = range(1, self.sites + 1)
        for number in numbers:
            self.confide("client", "init", self.site(number))
            self.confide("server", "enroll", self.site(number) / "site.pub", "--federation", self.server)
        authority = json.loads(self.confide("server", "roster", self.server, "--json"))
        for number in numbers:
            kit = self.folder / f"{number}.kit.tar"
            self.confide("server", "kit", self.server, str(number), "--to", kit)
            finger = authority["authority_fingerprint"]
            self.confide("client", "join", self.site(number), kit, "--authority", finger)

    def give_records(self, number: int, records: Path, source: str = "records") -> None:
        text = f'[data]\nsource = "{source}"\ntrain = "{records.resolve()}"\n\n[machine]\nthreads = 1\n'
        (self.site(number) / "site.toml").write_text(text)

    def submit(self, config: Path, *overrides: str) -> str:
        """The job's id."""
        more = [part for override in overrides for part in ("--set", override)]
        return str(json.loads(self.confide("server", "submit", self.server, config, *more, "--json"))["job"])

    def approve(self, job: str, numbers: list[int] | None = None) -> None:
        """What each site's people do for a job: a budget that holds it, then their yes."""
        bundle = self.job(job) / "job.fab"
        for number in numbers or range(1, self.sites + 1):
            self.confide("client", "scope", self.site(number), "records", "--job", bundle)
            self.confide("client", "approve", self.site(number), bundle, "--yes", "--widen")

    def job(self, job: str) -> Path:
        return self.server / "jobs" / job

    def start(self, number: int) -> None:
        """The server (0) or a site. What it says goes to `server.out` or `site-N.out`."""
        if number == 0:
            command, out = [*CONFIDE, "server", "run", str(self.server)], "server.out"
        else:
            command, out = [*self.site_program, "client", "run", str(self.site(number))], f"site-{number}.out"
            if not self.network.namespaces:
                first = PORT + 100 + 10 * number
                command += ["--port", str(first), "--health-port", str(first + 1)]
        with (self.folder / out).open("ab") as file:
            self.processes[number] = subprocess.Popen(
                [*self.network.inside(number), *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )

    def start_all(self) -> None:
        for number in range(self.sites + 1):
            self.start(number)

    def stop(self, number: int) -> int:
        """TERM, and wait; the exit code."""
        process = self.processes.pop(number)
        if process.poll() is None:
            process.terminate()
        return process.wait(60)

    def stop_all(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for number in sorted(self.processes, reverse=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop(number)
        self.network.close()

    def status(self) -> dict[str, Any]:
        said = self.confide("server", "status", self.server, "--json", at=0, fails=True)
        found: dict[str, Any] = json.loads(said)
        return found

    def wait(self, job: str, seconds: float) -> dict[str, Any]:
        """The job's summary. Raises TimeoutError, or RuntimeError if it ended by itself."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (self.job(job) / "summary.json").exists():
                found: dict[str, Any] = json.loads((self.job(job) / "summary.json").read_text())
                return found
            if (self.job(job) / "ended.json").exists():
                raise RuntimeError((self.job(job) / "ended.json").read_text())
            time.sleep(0.5)
        raise TimeoutError(f"job {job} is not done after {seconds:g} s")

    def confide(self, *arguments: str | Path, at: int | None = None, fails: bool = False) -> str:
        """What a `confide` command prints. at: where it runs; None: anywhere."""
        inside = [] if at is None else self.network.inside(at)
        done = subprocess.run(
            [*inside, *CONFIDE, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=self.folder,
            check=False,
        )
        if done.returncode and not fails:
            raise RuntimeError(f"confide {' '.join(map(str, arguments))}: {done.stderr or done.stdout}")
        return done.stdout


def write_demo(folder: Path, sites: int) -> Path:
    """The built-in demo's records, divided over so many sites, as files; and its configuration."""
    from common.config import load_config
    from simulations.fleet import split_data
    from simulations.run import DEMO

    split = split_data(load_config(DEMO, [f"sites.count={sites}", "aggregation.min_cohort=3"]))
    for number, indices in enumerate(split.sites, start=1):
        _write(folder / f"records-{number}.jsonl", split.table.take(indices))
    _write(folder / "public.jsonl", split.public)
    kept = {"run", "task", "model", "adapter", "privacy", "warmup", "training", "evaluation"}
    lines: list[str] = []
    section = ""
    for line in DEMO.read_text().splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        if section in kept:
            lines.append(line)
    config = folder / "job.toml"
    config.write_text("\n".join(lines) + "\n" + _DEMO)
    return config


def _write(path: Path, table: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text, label in zip(table.text, table.label, strict=True):
            file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")


def _ip(*arguments: str) -> None:
    _quiet(["ip", *arguments])


def _quiet(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def demo_cluster(
    folder: Path, sites: int, network: Network, *overrides: str
) -> Iterator[tuple[Cluster, str]]:
    """The demo, submitted and approved; nothing runs yet. Whatever was started is stopped at the end."""
    cluster = Cluster(folder, sites, network)
    try:
        cluster.found()
        config = write_demo(cluster.folder, sites)
        for number in range(1, sites + 1):
            cluster.give_records(number, cluster.folder / f"records-{number}.jsonl")
        job = cluster.submit(config, *overrides)
        cluster.approve(job)
        yield cluster, job
    finally:
        cluster.stop_all()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("cluster"))
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--loopback", action="store_true", help="No network namespaces.")
    parser.add_argument("--keep", action="store_true", help="Go on serving when the job is done.")
    parser.add_argument("--seconds", type=float, default=1800, help="Longest time for the job.")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    asked = parser.parse_args()
    name = f"cf{os.getpid() % 100000}"
    network = Network(name, False) if asked.loopback else Network.best(name)
    if asked.folder.exists():
        sys.exit(f"{asked.folder} is there already: choose another --folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with demo_cluster(asked.folder, asked.sites, network, *asked.overrides) as (cluster, job):
        where = "namespaces" if network.namespaces else "the loopback"
        print(f"job {job} over {asked.sites} sites on {where}", file=sys.stderr, flush=True)
        cluster.start_all()
        print(json.dumps(cluster.wait(job, asked.seconds), indent=2), flush=True)
        if asked.keep:
            print(f"confide server status {cluster.server}; Ctrl-C ends it", file=sys.stderr, flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
