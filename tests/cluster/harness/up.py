"""Start a real Kubernetes on this machine, run a command against it, and leave nothing behind.

    unshare --mount --net --pid --fork --kill-child --mount-proc python3 up.py COMMAND...

Run as root. The namespaces made by `unshare` hold everything: no address, rule or process is seen
outside, and when the command ends all of it is gone. COMMAND gets KUBECONFIG. Environment: KUBE
(the binary built from main.go beside this file), ROOT (a scratch folder), NODES (2), STORE (a root
folder of containerd with the images that every node has).
"""

import json
import os
import pathlib
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request

KUBE = os.environ["KUBE"]
ROOT = pathlib.Path(os.environ.get("ROOT", "/tmp/daruma-cluster"))
NODES = int(os.environ.get("NODES", "2"))
STORE = pathlib.Path(os.environ["STORE"])
API_ADDRESS = os.environ["ADDRESS"]
DEADLINE_S = 60


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def spawn(name: str, *args: str) -> None:
    with (ROOT / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            args, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    (ROOT / "pids" / name).write_text(
        str(process.pid)
    )  # so that a test can stop or freeze one component


def component(name: str, *args: str, log: str | None = None) -> None:
    spawn(log or name, KUBE, name, *args)


def network() -> None:
    """Addresses on a bridge without ports, and a default route: kubelet looks for them."""
    for args in (
        "link set lo up",
        "link add nodes0 type bridge",
        f"addr add {API_ADDRESS}/24 dev nodes0",
        *(f"addr add 10.245.0.{i + 1}/24 dev nodes0" for i in range(NODES)),
        "link set nodes0 up",
        "route add default dev nodes0",
    ):
        subprocess.run(["ip", *args.split()], check=True)
    pathlib.Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def credentials(server: str) -> dict[str, str]:
    users = {
        "admin": ("admin", "system:masters"),
        "controller-manager": ("system:kube-controller-manager", ""),
        "scheduler": ("system:kube-scheduler", ""),
        "proxy": ("system:kube-proxy", "system:masters"),
        **{f"node{i}": (f"system:node:node{i}", "system:nodes") for i in range(NODES)},
    }
    tokens = {name: secrets.token_hex(16) for name in users}
    rows = [
        f"{tokens[n]},{user},{n}" + (f",{group}" if group else "")
        for n, (user, group) in users.items()
    ]
    (ROOT / "tokens.csv").write_text("\n".join(rows) + "\n")
    subprocess.run(
        ["openssl", "genrsa", "-out", str(ROOT / "sa.key"), "2048"], check=True, capture_output=True
    )
    for name, token in tokens.items():
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [
                {"name": "test", "cluster": {"server": server, "insecure-skip-tls-verify": True}}
            ],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }
        (ROOT / f"{name}.kubeconfig").write_text(json.dumps(config))
    return tokens


def control_plane() -> None:
    api, etcd, peer = free_port(), free_port(), free_port()
    server = f"https://127.0.0.1:{api}"
    tokens = credentials(server)
    client_url, peer_url = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
    component(
        "etcd",
        "--data-dir",
        f"{ROOT}/etcd",
        "--unsafe-no-fsync",
        "--listen-client-urls",
        client_url,
        "--advertise-client-urls",
        client_url,
        "--listen-peer-urls",
        peer_url,
        "--initial-advertise-peer-urls",
        peer_url,
        "--initial-cluster",
        f"default={peer_url}",
    )
    component(
        "kube-apiserver",
        "--etcd-servers",
        client_url,
        "--secure-port",
        str(api),
        "--bind-address",
        "0.0.0.0",
        "--advertise-address",
        API_ADDRESS,
        "--cert-dir",
        f"{ROOT}/certs",
        "--token-auth-file",
        f"{ROOT}/tokens.csv",
        "--authorization-mode",
        "Node,RBAC",
        "--enable-admission-plugins",
        "NodeRestriction",
        "--service-cluster-ip-range",
        "10.96.0.0/16",
        "--service-account-issuer",
        "https://kubernetes.default.svc",
        "--service-account-signing-key-file",
        f"{ROOT}/sa.key",
        "--service-account-key-file",
        f"{ROOT}/sa.key",
        "--allow-privileged",
        "--kubelet-preferred-address-types",
        "InternalIP",
    )
    wait_ready(server, tokens["admin"])
    config = f"{ROOT}/controller-manager.kubeconfig"
    component(
        "kube-controller-manager",
        "--kubeconfig",
        config,
        "--authentication-kubeconfig",
        config,
        "--authorization-kubeconfig",
        config,
        "--service-account-private-key-file",
        f"{ROOT}/sa.key",
        "--use-service-account-credentials",
        "--root-ca-file",
        f"{ROOT}/certs/apiserver.crt",
        "--leader-elect=false",
        "--secure-port",
        "0",
        "--node-monitor-grace-period",
        "16s",
        "--node-monitor-period",
        "1s",
    )
    component(
        "kube-scheduler",
        "--kubeconfig",
        f"{ROOT}/scheduler.kubeconfig",
        "--leader-elect=false",
        "--secure-port",
        "0",
    )
    component(
        "kube-proxy",
        "--kubeconfig",
        f"{ROOT}/proxy.kubeconfig",
        "--hostname-override",
        "node0",
        "--cluster-cidr",
        "10.244.0.0/16",
        "--proxy-mode",
        "iptables",
        "--conntrack-max-per-core",
        "0",
        "--conntrack-tcp-timeout-established",
        "0",
        "--conntrack-tcp-timeout-close-wait",
        "0",
        "--healthz-bind-address",
        "127.0.0.1:10256",
        "--metrics-bind-address",
        "127.0.0.1:10249",
    )


def wait_ready(server: str, token: str) -> None:
    request = urllib.request.Request(
        server + "/readyz", headers={"Authorization": "Bearer " + token}
    )
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(request, context=ssl._create_unverified_context(), timeout=2)
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
        else:
            return
    sys.exit(f"the API server was not ready within {DEADLINE_S} s; see {ROOT}/kube-apiserver.log")


def pod_network() -> None:
    bridge = {
        "type": "bridge",
        "bridge": "pods0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": "10.244.0.0/16"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": f"{ROOT}/ipam",
        },
    }
    (ROOT / "cni").mkdir()
    (ROOT / "cni/10-pods.conflist").write_text(
        json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]})
    )


CONTAINERD = """
version = 2
root = "{folder}/containerd"
state = "{folder}/state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "daruma.dev/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{root}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""


def cgroup(name: str) -> str:
    """A cgroup of the node's own: kubelets that share one kill each other's pods as orphans.

    So its name is this cluster's too: another may run beside it.
    """
    top = pathlib.Path("/sys/fs/cgroup")
    for controller in [top] if (top / "cgroup.controllers").exists() else list(top.iterdir()):
        (controller / name).mkdir(exist_ok=True)
        for knob in (
            "cpuset.cpus",
            "cpuset.mems",
        ):  # version 1 starts them empty, which admits no process
            if (controller / knob).exists() and not (top / "cgroup.controllers").exists():
                (controller / name / knob).write_text((controller / knob).read_text())
    return f"/{name}"


def link_store(store: pathlib.Path, target: pathlib.Path) -> None:
    """Give a node its images: links to what was unpacked once; copies of the databases alone.

    Layers and blobs are never written again, so nodes may share them; to remove one removes its
    link.
    """
    shared = [
        store / "io.containerd.content.v1.content/blobs/sha256",
        store / "io.containerd.snapshotter.v1.overlayfs/snapshots",
    ]

    def linked(folder: str, names: list[str]) -> list[str]:
        return names if pathlib.Path(folder) in shared else []

    shutil.copytree(store, target, ignore=linked)
    for folder in shared:
        for entry in folder.iterdir():
            (target / entry.relative_to(store)).symlink_to(entry)


def node(i: int) -> None:
    folder = ROOT / f"node{i}"
    folder.mkdir()
    sock = folder / "containerd.sock"
    link_store(STORE, folder / "containerd")
    (folder / "containerd.toml").write_text(CONTAINERD.format(folder=folder, root=ROOT))
    spawn(f"containerd{i}", "containerd", "--config", f"{folder}/containerd.toml")
    end = time.monotonic() + DEADLINE_S
    while not sock.exists():
        if time.monotonic() > end:
            sys.exit(f"containerd did not start; see {ROOT}/containerd{i}.log")
        time.sleep(0.05)
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup(f"{ROOT.parent.name}-node{i}"),
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "failCgroupV1": False,
        "containerRuntimeEndpoint": f"unix://{sock}",
        "imageServiceEndpoint": f"unix://{sock}",
        "oomScoreAdj": 0,
        "address": f"10.245.0.{i + 1}",
        "port": free_port(),
        "readOnlyPort": 0,
        "healthzPort": 0,
        "evictionHard": {
            "memory.available": "0%",
            "nodefs.available": "0%",
            "imagefs.available": "0%",
            "nodefs.inodesFree": "0%",
        },
        "imageGCHighThresholdPercent": 100,
        "resolvConf": "",
        "clusterDNS": ["10.96.0.10"],
        "clusterDomain": "cluster.local",
        "nodeStatusUpdateFrequency": "4s",
        "nodeLeaseDurationSeconds": 10,
        "podLogsDir": f"{folder}/podlogs",
        "makeIPTablesUtilChains": False,
    }
    (folder / "kubelet.yaml").write_text(json.dumps(config))
    component(
        "kubelet",
        "--config",
        f"{folder}/kubelet.yaml",
        "--kubeconfig",
        f"{ROOT}/node{i}.kubeconfig",
        "--root-dir",
        f"{folder}/kubelet",
        "--cert-dir",
        f"{folder}/pki",
        "--hostname-override",
        f"node{i}",
        "--node-ip",
        f"10.245.0.{i + 1}",
        log=f"kubelet{i}",
    )


def main() -> int:
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "pids").mkdir(parents=True)
    network()
    control_plane()
    pod_network()
    for i in range(NODES):
        node(i)
    return subprocess.call(
        sys.argv[1:] or ["bash"], env={**os.environ, "KUBECONFIG": f"{ROOT}/admin.kubeconfig"}
    )


if __name__ == "__main__":
    sys.exit(main())
