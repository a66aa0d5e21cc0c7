"""A server and three sites as processes: TLS, node authentication, secure aggregation, ledgers."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from client.identity import SiteFolder, load_local_key
from tests.e2e.cluster import (
    ROLES,
    charges,
    check_end,
    children,
    kill,
    named,
    rounds_of,
    tiny_cluster,
    until,
)
from tests.e2e.command import ROOT

pytestmark = pytest.mark.timeout(900)
SECRETS = ("identity.pem", "local.key", "node.key", "executor.key", "authority.key", "ca.key", "server.key")


@pytest.mark.slow
def test_a_job_over_three_sites(bert_folder: Path, data_file: Path, tmp_path: Path) -> None:
    with tiny_cluster(tmp_path / "c", bert_folder, data_file) as (cluster, job):
        cluster.start_all()
        summary = cluster.wait(job, 400)
        assert summary["rounds_without_sum"] == 0
        assert summary["private"] and summary["secure_aggregation"]
        assert summary["epsilon_rdp_max"] <= 8
        check_end(cluster, job, 2)
        status = cluster.status()
        assert status["serving"] is True
        assert [site["node"] for site in status["sites"]] == ["online"] * 3
        assert [site["rounds"] for site in status["sites"]] == [2, 2, 2]
        assert [found["standing"] for found in status["jobs"]] == ["done"]
        _only_what_is_documented_listens(cluster)
        _page_and_health(cluster)
        _an_enrolled_site_reads_only_its_own(cluster)
        _nothing_secret_is_told(cluster)
        # The adapter loads with plain peft, and the auditor finds every site's ledger in order.
        said = cluster.confide("predict", cluster.job(job) / "adapter", "w1 good", "--json")
        assert json.loads(said)["label"] in ("bad", "good")
        for number in (1, 2, 3):
            out = cluster.folder / f"{number}.export"
            cluster.confide("client", "export", cluster.site(number), out)
            cluster.confide("audit", "ledger", out)
        for number in range(4):
            assert cluster.stop(number) == 0
        stages = [json.loads(line) for line in (cluster.job(job) / "stages.jsonl").read_text().splitlines()]
        times = [b["at"] - a["at"] for a, b in itertools.pairwise(stages) if a["round"] == b["round"]]
        print(f"exchange: median {statistics.median(times):.2f} s of {len(times)}")


@pytest.mark.slow
@pytest.mark.parametrize("columns", ['prompt = "messages"\ntext = "answer"', 'text = "whole"'])
def test_conversations_over_three_sites(
    bpe_folder: Path, data_file: Path, tmp_path: Path, columns: str
) -> None:
    """Server and sites write the same prompts; the adapter is asked as it was trained."""
    with tiny_cluster(tmp_path / "c", bpe_folder, data_file, chat=columns) as (cluster, job):
        cluster.start_all()
        summary = cluster.wait(job, 400)
        assert summary["rounds_without_sum"] == 0
        assert summary["metric"] == "token accuracy"
        check_end(cluster, job, 2)
        adapter = cluster.job(job) / "adapter"
        assert cluster.confide("ask", adapter, "w1 good") == cluster.confide(
            "ask", adapter, "w1 good", "--chat"
        )


def _only_what_is_documented_listens(cluster: Any) -> None:
    if not cluster.network.namespaces:
        pytest.skip("without namespaces other programs listen too")
    listening: dict[int, set[str]] = {}
    for number in range(4):
        inside = cluster.network.inside(number)
        done = subprocess.run([*inside, "ss", "-Hltn"], capture_output=True, text=True, check=True)
        listening[number] = {
            line.split()[3].replace("[::ffff:127.0.0.1]", "127.0.0.1") for line in done.stdout.splitlines()
        }
    assert listening[0] == {"0.0.0.0:9092", *(f"127.0.0.1:{port}" for port in (9093, 9094, 9095, 9096))}
    for number in (1, 2, 3):
        assert listening[number] == {"127.0.0.1:9194", "127.0.0.1:9195"}


def _page_and_health(cluster: Any) -> None:
    inside = cluster.network.inside(0)

    def get(path: str, *more: str) -> str:
        command = [*inside, "curl", "-s", "-m", "10", *more, f"http://127.0.0.1:9096{path}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "<h1>cluster</h1>" in get("/")
    assert get("/health") == "ok"
    assert json.loads(get("/status.json"))["federation"] == "cluster"
    assert re.search(r'confide_site_online\{site="1"\} 1\.0', get("/metrics"))
    assert "Invalid host" in get("/", "-H", "Host: evil.example")
    assert "Method Not Allowed" in get("/", "-X", "POST")


_ATTACK = """
import json, sys
from pathlib import Path
import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

address, site, mine, theirs, their_public = sys.argv[1:]
folder = Path(site)
key = load_ssh_private_key((folder / "node.key").read_bytes(), None)
stranger = ec.generate_private_key(ec.SECP384R1())

def fleet(key):
    named = RuntimeVersionHttpInterceptor(component_name="attack")
    signed = [NodeAuthHttpInterceptor(key, key.public_key())] if key else []
    return FleetHttpClient(f"https://{address}", interceptors=[named, *signed], verify=str(folder / "ca.pem"))

def control(kind):
    named = RuntimeVersionHttpInterceptor(component_name="attack")
    return kind(f"https://{address}", interceptors=[named], verify=str(folder / "ca.pem"))

def said(ask):
    try:
        ask()
        return 200
    except httpx.HTTPStatusError as error:
        return error.response.status_code

pull = lambda node: PullMessagesRequest(node=Node(node_id=int(node)))
print(json.dumps({
    "own": said(lambda: fleet(key).PullMessages(pull(mine))),
    "another_s": said(lambda: fleet(key).PullMessages(pull(theirs))),
    "stranger": said(lambda: fleet(stranger).PullMessages(pull(mine))),
    "stranger_activates": said(lambda: fleet(stranger).ActivateNode(
        ActivateNodeRequest(public_key=public_key_to_bytes(stranger.public_key()), heartbeat_interval=30))),
    "unsigned": said(lambda: fleet(None).PullMessages(pull(mine))),
    "another_s_key": said(lambda: fleet(key).ActivateNode(
        ActivateNodeRequest(public_key=Path(their_public).read_bytes(), heartbeat_interval=30))),
    "bundle_as_another": said(lambda: fleet(key).GetFab(
        GetFabRequest(node=Node(node_id=int(theirs)), hash_str="0" * 64, run_id=1))),
    "list_runs": said(lambda: control(ControlHttpClient).ListRuns(ListRunsRequest())),
    "start_run": said(lambda: control(ControlHttpClient).StartRun(StartRunRequest())),
    "claim_task": said(lambda: control(RuntimeHttpClient).AcquireTask(
        AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))),
}))
"""


def _an_enrolled_site_reads_only_its_own(cluster: Any) -> None:
    """From a site's place in the network, with its real key and Flower's own clients."""
    from server.federation import FederationFolder
    from server.superlink import NodeInfo

    nodes: list[NodeInfo] = []
    ask = (
        "import json,sys;from pathlib import Path;from server.superlink import SuperLink;"
        "link = SuperLink('127.0.0.1:9093', Path(sys.argv[1]));"
        "print(json.dumps([[n.id, n.public.decode()] for n in link.nodes()]))"
    )
    done = subprocess.run(
        [*cluster.network.inside(0), sys.executable, "-c", ask, str(cluster.server / "tls" / "ca.pem")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    nodes = [NodeInfo(node, public.encode(), "", "") for node, public in json.loads(done.stdout)]
    by_site = {FederationFolder(cluster.server).nodes()[node.public]: node.id for node in nodes}
    address = f"{cluster.network.address(0)}:9092"
    done = subprocess.run(
        [
            *cluster.network.inside(1),
            *(sys.executable, "-c", _ATTACK, address, str(cluster.site(1))),
            *(str(by_site[1]), str(by_site[2]), str(cluster.server / "nodes" / "2.pem")),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("own") == 200
    refused = {name: code for name, code in found.items() if code not in (401, 403, 404, 405, 412)}
    assert refused == {}, found
    for path in ("list_runs", "start_run", "claim_task"):
        assert found[path] == 404


def _nothing_secret_is_told(cluster: Any) -> None:
    """Modes of secrets; and neither their bytes nor passphrases in any log or command line."""
    needles: list[bytes] = []
    for path in cluster.folder.rglob("*"):
        if path.name in SECRETS or path.name == "superexec.key":
            assert path.stat().st_mode & 0o777 == 0o600, path
            data = path.read_bytes()
            needles += (
                [data, data.hex().encode()] if not data.startswith(b"-----") else [data.split(b"\n")[1]]
            )
    for number in (1, 2, 3):
        key = load_local_key(SiteFolder(cluster.site(number)).local_key).reveal()
        needles += [key, key.hex().encode()]
    told = [
        p for p in cluster.folder.rglob("*") if p.suffix in (".jsonl", ".out", ".log") or p.name == "site.log"
    ]
    assert told
    for path in told:
        data = path.read_bytes()
        assert not [n for n in needles if n in data], path
    for process in cluster.processes.values():
        for one in children(process.pid):
            line = Path(f"/proc/{one}/cmdline").read_bytes()
            assert not [n for n in needles if n in line]


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("moment", ["training", "mask"])
def test_killing_a_process_loses_nothing(
    role: str, moment: str, bert_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """kill -9 in the middle of a round; everything else goes on, and the supervisor starts it again."""
    with tiny_cluster(tmp_path / "c", bert_folder, data_file, rounds=3, deadline=20) as (cluster, job):
        cluster.start_all()
        until(lambda: len(rounds_of(cluster, job)) >= 2, 240, "the first round")

        def stage() -> str:
            try:
                return str(json.loads((cluster.job(job) / "progress.json").read_text())["stage"])
            except (OSError, ValueError):
                return ""

        end = time.monotonic() + 60
        while stage() != moment and time.monotonic() < end:
            time.sleep(0.05)
        victims = [one for p in cluster.processes.values() for one in named(p.pid, role)]
        assert victims, role
        kill(victims[0])
        cluster.wait(job, 500)
        check_end(cluster, job, 3)


@pytest.mark.slow
def test_killing_everything_and_starting_again_goes_on(
    bert_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    with tiny_cluster(tmp_path / "c", bert_folder, data_file, rounds=3, deadline=20) as (cluster, job):
        cluster.start_all()
        until(lambda: len(rounds_of(cluster, job)) >= 2, 240, "the first round")
        for number, process in list(cluster.processes.items()):
            for one in children(process.pid):
                kill(one)
            process.wait(20)
            del cluster.processes[number]
        cluster.start_all()
        cluster.wait(job, 500)
        check_end(cluster, job, 3)


@pytest.mark.slow
def test_a_site_that_was_away_comes_back_and_one_that_never_approved_is_waited_for(
    bert_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    with tiny_cluster(tmp_path / "c", bert_folder, data_file, rounds=2, deadline=20) as (cluster, job):
        bundle = cluster.job(job) / "job.fab"
        (cluster.site(3) / "policy.toml").write_text("")  # nobody at site 3 has approved anything
        cluster.start_all()
        until(lambda: bool(_absent(cluster, job)), 240, "a roll call")
        assert _absent(cluster, job) == {"3": "refused-policy"}
        assert (cluster.site(3) / "bundles" / "pending.fab").read_bytes() == bundle.read_bytes()
        cluster.stop(2)
        cluster.confide("client", "approve", cluster.site(3), "--yes", "--widen")
        time.sleep(5)
        cluster.start(2)
        cluster.wait(job, 500)
        check_end(cluster, job, 2)


def _absent(cluster: Any, job: str) -> dict[str, str]:
    try:
        found = json.loads((cluster.job(job) / "progress.json").read_text())["absent"]
    except (OSError, ValueError, KeyError):
        return {}
    return dict(found)


@pytest.mark.slow
def test_a_site_comes_in_and_another_goes_while_a_job_runs(
    bert_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    """Site 4 takes over the records of site 3 under a key of its own, with no process started anew."""
    rounds = 6
    with tiny_cluster(tmp_path / "c", bert_folder, data_file, rounds=rounds, deadline=30) as (cluster, job):
        cluster.start_all()
        until(lambda: len(rounds_of(cluster, job)) >= 2, 240, "the first round")
        cluster.network.join(4)
        cluster.sites = 4
        cluster.confide("client", "init", cluster.site(4))
        cluster.confide("server", "enroll", cluster.site(4) / "site.pub", "--federation", cluster.server)
        cluster.confide("server", "revoke", cluster.server, "--id", "3")
        authority = json.loads(cluster.confide("server", "roster", cluster.server, "--json"))
        kit = cluster.folder / "4.kit.tar"
        cluster.confide("server", "kit", cluster.server, "4", "--to", kit)
        finger = authority["authority_fingerprint"]
        cluster.confide("client", "join", cluster.site(4), kit, "--authority", finger)
        cluster.give_records(4, cluster.folder / "records-3.jsonl")
        cluster.approve(job, [4])
        cluster.start(4)
        # The others have the old roster still: the job waits for them, and nobody is charged meanwhile.
        until(lambda: "refused-roster" in _absent(cluster, job).values(), 120, "a roster that lags")
        before = [charges(cluster, number, job) for number in (1, 2, 4)]
        time.sleep(10)
        assert [charges(cluster, number, job) for number in (1, 2, 4)] == before
        for number in (1, 2):
            cluster.confide("client", "pin", cluster.site(number), cluster.server / "roster.json")
        cluster.wait(job, 500)
        check_end(cluster, job, rounds, sites=4)
        last = [event for event in rounds_of(cluster, job) if event["counted"]][-1]
        assert last["round"] == rounds and last["answered"] == 3
        assert rounds in charges(cluster, 4, job)
        assert rounds not in charges(cluster, 3, job) and charges(cluster, 3, job)
        status = cluster.status()
        assert [site["id"] for site in status["sites"] if site["node"] == "online"] == [1, 2, 4]
