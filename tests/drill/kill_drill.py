"""The kill drill: a run that is killed at random moments and resumed ends with the same weights, bit for bit.

    python tests/drill/kill_drill.py --times 20 --seed 0 --out kill_drill.json
    python tests/drill/kill_drill.py --times 20 --seed 0 --processes 2 --out kill_drill_2.json

Makes a tiny model and a tiny `unlearnjax run` (three candidates, one of which diverges, accumulation over several
steps, dropout, a checkpoint whenever the one before is written), lets it end undisturbed twice, and then so many times:

1. start it in a process of its own, or as one job of several, and kill that, or one of them (SIGKILL, or in a fifth of
   the cases SIGTERM) at a moment drawn uniformly from the time in which the undisturbed run held its folder: before, in
   and after training, in the evaluation, while a checkpoint is written; the job's other processes must end by
   themselves;
   with --disk FOLDER (on a small file system of its own: mount -t tmpfs -o size=32m none FOLDER) a fifth of the cases
   fills that instead, and the run must go on or end by itself;
2. in about half of the cases damage the newest checkpoint: flip one bit of one of its files, or cut a file short;
3. resume, and in about a third of the cases kill that too, at another random moment, before resuming again;
4. compare the SHA-256 of every file of weights, and the curves and scores of the report, with the undisturbed run's.

Prints a line per time and writes a JSON; the exit status is 1 if any time differed. A cycle takes some seconds,
because compiled programs are kept in a temporary folder. Needs nothing but the package (no network, no GPU; CPU is
forced unless JAX_PLATFORMS says otherwise).
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FULL = "full disk"
BOUND = 120  # seconds within which the other processes must end
WORDS = ["Anna", "Boris", "Clara", "David", "Oslo", "Bern", "Rome", "Lima", "river", "garden", "letter", "winter"]
RECIPE = {
    "name": "drill",
    "defaults": {"rank": 4, "alpha": 4, "learning_rate": 1e-2, "dropout": 0.1},
    "candidates": [
        {"name": "slow", "micro_batch": 2, "accumulation": 4},
        {"name": "wild", "micro_batch": 2, "accumulation": 2, "learning_rate": 1e30, "schedule": "constant",
         "warmup_ratio": 0, "objective": "graddiff"},
        {"name": "fast", "micro_batch": 1, "accumulation": 4, "rank": 2, "objective": {"npo": 0.3, "gdr": 0.7}},
    ],
    "adapter": {"targets": ["q", "v"]},
    "training": {"buckets": 1},
    "merges": [{"name": "ties", "method": "ties", "density": 0.5}],
    "evaluation": {"max_new_tokens": 4},
}  # fmt: skip


def make_job(folder, epochs):
    """A model, its data and a recipe as files; returns the command line without --out."""
    import jax
    import jax.numpy as jnp

    from unlearnjax import save_model
    from unlearnjax.data.bpe import train_tokenizer
    from unlearnjax.data.rows import Row, write_rows
    from unlearnjax.models.abstract import init_params
    from unlearnjax.models.config import ModelConfig
    from unlearnjax.models.decoder import build
    from unlearnjax.models.language_model import LanguageModel

    draw = random.Random(0)

    def row(name):
        return Row(f"{name}qa0", f"{draw.choice(WORDS)} {draw.choice(WORDS)}", draw.choice(WORDS), "Task1")

    sides = {side: [row(f"{side}{i}") for i in range(16)] for side in ("forget", "retain")}
    for side, rows in sides.items():
        write_rows(folder / f"{side}.jsonl", rows)
    tokenizer = train_tokenizer([f"{r.input} {r.output}" for rows in sides.values() for r in rows], 300)
    config = ModelConfig("olmo", len(tokenizer), 16, 24, 1, 2, 2, 8, "layer", max_positions=64, eos_token_ids=(1,))
    model = build(config)
    params = init_params(model.abstract(jnp.float32), jax.random.key(0))
    save_model(LanguageModel(params, config, tokenizer, model, "base"), folder / "base")
    recipe = RECIPE | {"defaults": RECIPE["defaults"] | {"epochs": epochs}}
    (folder / "recipe.yml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return [
        sys.executable, "-m", "unlearnjax.cli.main", "run", "--quiet", "--checkpoint-every", "0",
        "--model", str(folder / "base"), "--forget", str(folder / "forget.jsonl"),
        "--retain", str(folder / "retain.jsonl"), "--recipe", str(folder / "recipe.yml"),
    ]  # fmt: skip


def environment(folder):
    """This one's, with compiled programs kept in `folder`."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "HF_HUB_OFFLINE": "1",
    }
    return {"JAX_PLATFORMS": "cpu", **os.environ, **kept}


class Processes:
    """One run: a process, or several that are one job."""

    def __init__(self, argv, own, log):
        self.all = [subprocess.Popen(argv, env=env, stdout=log, stderr=log) for env in own]

    def running(self):
        return any(p.poll() is None for p in self.all)

    def wait(self, timeout=None):
        """The exit statuses. Raises `TimeoutExpired`."""
        end = None if timeout is None else time.monotonic() + timeout
        return [p.wait(None if end is None else max(end - time.monotonic(), 0)) for p in self.all]


class Job:
    """The run under test, and how long it takes undisturbed."""

    def __init__(self, folder, epochs, processes, disk):
        self.folder, self.disk, self.argv, self.environment = (
            folder,
            disk or folder,
            make_job(folder, epochs),
            environment(folder),
        )
        self.processes, self.slowest = processes, 0.0  # seconds that others needed to end after one was killed
        if processes > 1:
            self.argv += ["--mesh", f"candidate=1,fsdp={processes}"]
        first, again = (self.undisturbed(name) for name in ("first", "again"))
        if first[0] != again[0]:
            raise SystemExit("two undisturbed runs differ; there is nothing to compare with")
        self.expected, self.seconds = again

    def start(self, out, *more):
        with (self.folder / f"{out.name}.log").open("a", encoding="utf-8") as log:
            return Processes([*self.argv, "--out", str(out), *more], self.places(), log)

    def places(self):
        """An environment for each process."""
        if self.processes == 1:
            return [self.environment]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        own = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self.processes), "JAX_NUM_CPU_DEVICES": "1"}
        return [{**self.environment, **own, "JAX_PROCESS_ID": str(i)} for i in range(self.processes)]

    def undisturbed(self, name):
        """(what came out, {phase: when it was first seen, seconds after the first file})."""
        out = self.disk / name
        run = self.start(out)
        begin = first_file(run, out, None)
        seen = {}
        while run.running():
            seen.setdefault(phase_of(out), round(time.monotonic() - begin, 2))
            time.sleep(0.01)
        if any(run.wait()):
            raise SystemExit(f"the undisturbed run failed: {self.log_of(out)}")
        return result_of(out), seen

    def log_of(self, out):
        return (self.folder / f"{out.name}.log").read_text(encoding="utf-8")

    def struck(self, out, moment, fault, victim, *more):
        """Run, and send a signal to one of its processes, or fill the disk, `moment` seconds after its first file.

        Returns what it was at, or None if it had ended by itself, and the exit statuses.
        """
        before = stamp(out)
        run = self.start(out, *more)
        begin = first_file(run, out, before)
        try:
            statuses = run.wait(timeout=max(moment - (time.monotonic() - begin), 0))
        except subprocess.TimeoutExpired:
            sent = time.monotonic()
            if fault == FULL:
                fill(self.disk / "ballast")
            else:
                run.all[victim].send_signal(signal.Signals[fault])
            try:
                statuses = run.wait(timeout=BOUND)
            except subprocess.TimeoutExpired:
                raise SystemExit(
                    f"{BOUND} s after one process was killed others are running: {self.log_of(out)}"
                ) from None
            if fault == FULL:
                at = phase_of(out)
                (self.disk / "ballast").unlink()
                return at, statuses
            self.slowest = max(self.slowest, time.monotonic() - sent)
            told = {"SIGTERM": 128 + signal.SIGTERM, "SIGKILL": -signal.SIGKILL}[fault]
            if statuses[victim] not in (0, told):  # 0: it had come to its end
                said = f"after {fault} process {victim} ended with {statuses[victim]}: {self.log_of(out)}"
                raise SystemExit(said) from None
            return phase_of(out), statuses
        if any(statuses):
            raise SystemExit(f"a run failed by itself: {self.log_of(out)}")
        return None, statuses

    def cycle(self, number, draw):
        """One time: kill, perhaps damage, resume, perhaps kill again, resume to the end; returns its record."""
        out = self.disk / f"cycle{number}"
        while True:
            shutil.rmtree(out, ignore_errors=True)
            record = {"moments": [], "faults": [], "processes": [], "at": [], "statuses": [], "damage": None}
            for more in [[], ["--resume"]][: 2 if draw.random() < 1 / 3 else 1]:
                record["moments"].append(round(draw.uniform(0, self.seconds["ended"]), 3))
                faults = ["SIGTERM", "SIGKILL", "SIGKILL", "SIGKILL", "SIGKILL" if self.disk == self.folder else FULL]
                record["faults"].append(draw.choice(faults))
                record["processes"].append(draw.randrange(self.processes))
                struck = self.struck(out, record["moments"][-1], record["faults"][-1], record["processes"][-1], *more)
                for name, own in zip(("at", "statuses"), struck, strict=True):
                    record[name].append(own)
                if record["at"][-1] in (None, "ended"):
                    break
                if record["damage"] is None and draw.random() < 1 / 2:
                    record["damage"] = damage(out / "checkpoints", draw)
            if record["at"][0] not in (None, "ended"):
                break  # else it was faster than its moment, and nothing was put to the test
        if not (out / "report.json").exists() and any(self.start(out, "--resume").wait()):
            raise SystemExit(f"resuming failed: {self.log_of(out)}")
        said = self.log_of(out)
        record["fell_back"] = "damaged" in said
        record["from_the_beginning"] = "from the beginning" in said
        record["identical"] = result_of(out) == self.expected
        shutil.rmtree(out)
        return record


def stamp(out):
    """Changes when a run takes hold of its folder: it writes this file anew, first of all."""
    try:
        return os.stat(out / "checkpoints" / "fingerprint.json").st_ino
    except FileNotFoundError:
        return None


def first_file(run, out, before):
    """Wait until a run has taken hold of its folder; returns the time."""
    while run.running() and stamp(out) == before:
        time.sleep(0.01)
    return time.monotonic()


def fill(path):
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def phase_of(out):
    """What a killed run was at, from what it left."""
    if (out / "report.json").exists():
        return "ended"
    checkpoints = out / "checkpoints"
    if (checkpoints / "evaluation").exists():
        return "evaluating"
    if (out / "candidates").exists():
        return "after training"
    if list(checkpoints.glob(".step-*.part")):
        return "writing a checkpoint"
    return "training" if list(checkpoints.glob("step-*")) else "before the first checkpoint"


def damage(checkpoints, draw):
    """Flip a bit of a file of the newest checkpoint, or cut it short; returns what was done, None if there is none."""
    found = sorted(checkpoints.glob("step-*"))
    files = sorted(p for p in found[-1].rglob("*") if p.is_file() and p.stat().st_size) if found else []
    if not files:
        return None
    # The manifest or the arrays, alike often; among their files by size.
    arrays = draw.random() < 1 / 2
    chosen = [p for p in files if (p.suffix == ".safetensors") == arrays] or files
    path = draw.choices(chosen, [p.stat().st_size for p in chosen])[0]
    content = bytearray(path.read_bytes())
    name = str(path.relative_to(checkpoints))
    if draw.random() < 1 / 4:
        cut = draw.randrange(len(content))
        path.write_bytes(content[:cut])
        return f"{name} cut from {len(content)} bytes to {cut}"
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"{name} bit {bit} of {8 * len(content)} flipped"


def result_of(out):
    """What a run made, by name: digests of all weights, of the generations, and of the report's curves and scores."""
    made = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in ("*.safetensors", "*.csv")
        for path in sorted(out.rglob(pattern))
        if "checkpoints" not in path.parts
    }
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    parts = {name: report[name] for name in ("candidates", "merges", "models", "exported")}
    made["report"] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert [c["status"] for c in report["candidates"]] == ["finished", "diverged", "finished"]
    return made


def hardware():
    import jax

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "device": f"{jax.devices()[0].platform}, {jax.devices()[0].device_kind}", "cpu": cpu, "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "jax": jax.__version__,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of the job, one CPU device each (default: 1)")
    parser.add_argument("--disk", type=Path, help="a folder on a small file system of its own, to be filled")
    parser.add_argument("--epochs", type=int, default=400, help="of the tiny run: how long it trains (default: 400)")
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    draw = random.Random(options.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        job = Job(Path(temporary), options.epochs, options.processes, options.disk)
        print(f"undisturbed, seconds: {json.dumps(job.seconds)}", flush=True)
        cycles = []
        for number in range(options.times):
            cycles.append(job.cycle(number, draw))
            print(number + 1, json.dumps(cycles[-1]), flush=True)
    good = sum(c["identical"] for c in cycles)
    settings = f"--times {options.times} --seed {options.seed} --epochs {options.epochs}"
    settings += f" --processes {options.processes}{'' if options.disk is None else ' --disk FOLDER'}"
    record = {
        "what": "runs struck at random moments, some with a damaged checkpoint as well, resumed to their end",
        "command": f"python tests/drill/kill_drill.py {settings}",
        "hardware": hardware(),
        "times": options.times,
        "identical": good,
        "faults": dict(collections.Counter(fault for c in cycles for fault in c["faults"])),
        "struck_at": dict(collections.Counter(at or "had ended" for c in cycles for at in c["at"])),
        "damaged": sum(c["damage"] is not None for c in cycles),
        "fell_back": sum(c["fell_back"] for c in cycles),
        "undisturbed_seconds": job.seconds,
        "most_seconds_until_all_had_ended": round(job.slowest, 2),
        "files_compared": len(job.expected),
        "seconds": round(time.monotonic() - started),
        "cycles": cycles,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{good} of {options.times} identical to the undisturbed run")
    sys.exit(0 if good == options.times else 1)


if __name__ == "__main__":
    main()
