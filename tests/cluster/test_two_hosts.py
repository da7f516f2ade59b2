"""A cluster under two torchrun agents: in two network namespaces where root may make them, else on loopback."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from child_process import free_port, own_environment
from cluster.test_distributed import LIMIT_S, TESTS, WORKLOAD, expected

NAMESPACES = (f"memserve-{os.getpid()}-a", f"memserve-{os.getpid()}-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")

pytestmark = pytest.mark.timeout(300)  # real processes, beside whatever else the machine does


def run_on_two_hosts(address, port, output_dir, prefixes):
    """The first host has ranks 0 and 1, the second rank 2. Returns [(exit status, what was printed)]."""
    words = [
        "exec=distributed", "tokens=hash", "model.num_threads=1", "transport=gloo", "cluster=1p1d",
        "mode=pd_caching_3", "granularity=by_layer", *WORKLOAD, f"hydra.run.dir={output_dir}",
    ]  # fmt: skip
    own = own_environment(OMP_NUM_THREADS="1")
    agents = []
    for node, (prefix, num_ranks) in enumerate(zip(prefixes, (2, 1), strict=True)):
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
        command += ["--nproc-per-node", str(num_ranks), "--master-addr", address, "--master-port", str(port)]
        command += [str(TESTS.parent / "scripts" / "run.py"), *words]
        agents.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own))
    try:
        printed = [agent.communicate(timeout=LIMIT_S)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, text) for agent, text in zip(agents, printed, strict=True)]


@contextlib.contextmanager
def two_hosts():
    """(the first host's address, a free port there, command prefixes to run something on each)."""
    try:
        with two_namespaces() as prefixes:
            yield ADDRESSES[0], 29701, prefixes
    except NoNamespaces as error:
        print(f"on loopback: {error}")
        yield "127.0.0.1", free_port(), ((), ())


class NoNamespaces(Exception):
    """Two network namespaces need root and veth links."""


@contextlib.contextmanager
def two_namespaces():
    """Command prefixes for two network namespaces with a link between them. Raises NoNamespaces."""
    first, second = NAMESPACES
    ips = [["netns", "add", first], ["netns", "add", second]]
    ips += [["link", "add", "msa", "netns", first, "type", "veth", "peer", "name", "msb", "netns", second]]
    for name, link, address in zip(NAMESPACES, ("msa", "msb"), ADDRESSES, strict=True):
        ips += [["-n", name, "addr", "add", f"{address}/24", "dev", link]]
        ips += [["-n", name, "link", "set", device, "up"] for device in (link, "lo")]
    try:
        for words in ips:
            try:
                subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise NoNamespaces(f"ip {' '.join(words)}: {getattr(error, 'stderr', '') or error}") from error
        yield [["ip", "netns", "exec", name] for name in NAMESPACES]
    finally:
        for name in NAMESPACES:
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_agents_play_one_cluster_and_leave_one_output_directory_with_a_log_of_each_rank(tmp_path):
    output_dir = tmp_path / "out"
    with two_hosts() as (address, port, prefixes):
        ended = run_on_two_hosts(address, port, output_dir, prefixes)
    assert [status for status, _ in ended] == [0, 0], "\n".join(text for _, text in ended)
    names = sorted(path.name for path in output_dir.iterdir())
    assert [name for name in names if name.endswith(".log")] == ["rank-0.log", "rank-1.log", "rank-2.log"]
    assert {"config.yaml", "env.json", "report.json", "requests.jsonl"} <= set(names)
    assert sum("written to" in text for _, text in ended) == 1
    records = map(json.loads, (output_dir / "requests.jsonl").read_text().splitlines())
    assert {record["request_id"]: record["output_token_ids"] for record in records} == expected("hash")
    sent = json.loads((output_dir / "report.json").read_text())["transfers"]
    assert sent["p_to_d"]["tokens"] > 0 and sent["d_to_p"]["tokens"] > 0
