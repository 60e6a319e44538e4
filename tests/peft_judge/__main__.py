"""PEFT's own LoRA tests with and without the drop-in; exits 1 if that shows: `make peft-judge`.

The sdist of PEFT holds the tests. Each test must end as it ends without us, each fused call and its gradients must be
PEFT's, and there must be some. Then the judge is judged: with a fault planted, a selection must find it.
It goes file by file and keeps what each gave, so that a run that was stopped goes on where it was.
"""

import argparse
import collections
import functools
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import models
import peft
import torch
from judge import FAULTS

# What of PEFT's tests is about LoRA, runs on a CPU, and needs of the hub no more than a model's architecture.
FILES = (
    "arrow", "bdlora", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models",
    "initialization", "lora_conversion", "lora_variants", "lorafa", "loraplus", "low_level_api", "mixed", "seq_classifier",
    "target_parameters", "velora",
)  # fmt: skip
SELECTION = "(lora or mixed or hotswap or low_level or arrow) and not (adalora or randlora or vblora or gralora)"
PLANTED = "custom_models", "LoraConfig and (test_merge_layers or test_disable_adapters_with_merging)"
HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path, help="peft-X.tar.gz, of the version that is installed")
    parser.add_argument(
        "--work",
        type=lambda path: Path(path).resolve(),
        required=True,
        help="for PEFT's sources, the tiny models and the results",
    )
    parser.add_argument("--jobs", default="2", help="pytest-xdist's -n; 0: one process")
    parser.add_argument("--files", choices=FILES, nargs="+", default=FILES, help="of PEFT's tests, all by default")
    parser.add_argument("--only", default=SELECTION, help="pytest's -k")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(options.sdist) as archive:
        archive.extractall(options.work, filter="data")
    root = options.work / options.sdist.name.removesuffix(".tar.gz")
    (root / "tests" / "__init__.py").touch()
    models.write(options.work / "hub")
    faults, total = [], collections.Counter()
    for name in options.files:
        plain, fused = (run(root, options.jobs, how, name, options.only) for how in ("plain", "fused"))
        faults += compare(name, plain, fused)
        for what in ("calls", "mixed", "gradients"):
            total[what] += fused[what]
        total += {f"not fused: {reason}": times for reason, times in fused["not_fused"].items()}
    print("\n".join(f"{times:8,} {what}" for what, times in total.most_common()))
    faults += [f"no {what} were judged" for what in ("calls", "mixed", "gradients") if not total[what]]
    for fault in FAULTS:
        seen = run(root, options.jobs, fault, *PLANTED)
        print(f"planted, {fault}: found in {len(seen['wrong'])} of {seen['calls']} fused calls")
        if not seen["wrong"]:
            faults.append(f"the planted fault was not found: {fault}")
    print("\n".join(faults) or "PEFT's tests see no difference")
    return bool(faults)


def compare(name, plain, fused) -> list[str]:
    """Prints a line for the file; returns what is wrong."""
    row = collections.Counter(fused["outcomes"].values())
    print(
        f"{name:28}" + "".join(f" {row[outcome]:5} {outcome}" for outcome in ("passed", "skipped", "failed"))
        + f" {fused['calls']:6} fused calls {fused['gradients']:6} gradients"
        + f" {plain['seconds']:5.0f} s without us, {fused['seconds']:.0f} s with us",
        flush=True,
    )  # fmt: skip
    faults = [
        f"{name}: pytest stopped with {seen['status']}" for seen in (plain, fused) if seen["status"] not in (0, 1)
    ]
    for test in sorted(plain["outcomes"].keys() | fused["outcomes"].keys()):
        without, ours = (seen["outcomes"].get(test, "missing") for seen in (plain, fused))
        if without != ours:
            faults.append(f"{test}: {without} without us, {ours} with us")
    return faults + fused["wrong"]


def run(root, jobs, how, name, only) -> dict:
    """The outcomes of a file of PEFT's tests, and what the judge saw: from the last time, if nothing has changed since."""
    seen = root.parent / how.replace(" ", "-") / name
    record, digest = seen.with_suffix(".json"), _digest(how, only)
    if record.exists() and (found := json.loads(record.read_text()))["digest"] == digest:
        return found
    seen.parent.mkdir(exist_ok=True)
    for old in seen.parent.glob(f"{name}.*"):
        old.unlink()
    environment = os.environ | {
        "JUDGE": how, "JUDGE_OUT": str(seen), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(root.parent / "hub"),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(root), "-p", "plugin", "-p",
        "no:cacheprovider", "-n", jobs, "-k", only, f"tests/test_{name}.py",
    ]  # fmt: skip
    started = time.monotonic()
    with open(f"{seen}.log", "w") as log:
        done = subprocess.run(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    total = {"outcomes": {}, "calls": 0, "mixed": 0, "gradients": 0, "not_fused": collections.Counter(), "wrong": []}
    for part in seen.parent.glob(f"{name}.part-*"):
        for what, value in json.loads(part.read_text()).items():
            total[what] = total[what] | value if what == "outcomes" else total[what] + type(total[what])(value)
    total |= {"digest": digest, "status": done.returncode, "seconds": time.monotonic() - started}
    if done.returncode in (0, 1):  # tests ran, whatever they said
        record.write_text(json.dumps(total))
    return total


@functools.cache
def _digest(how, only) -> str:
    """Of what the results depend on."""
    sources = [HERE / "plugin.py", HERE / "models.py"]
    if how != "plain":
        sources += [HERE / "judge.py", *sorted((HERE.parents[1] / "lora_kernels").rglob("*.py"))]
    texts = [only, peft.__version__, torch.__version__, *(source.read_text() for source in sources)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
