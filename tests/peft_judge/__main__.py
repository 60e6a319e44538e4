"""PEFT's own LoRA tests with and without the drop-in; exits 1 if that shows: `make peft-judge`.

The sdist of PEFT holds the tests. Each test must end as it ends without us, each fused call and its gradients must be
PEFT's, and there must be some. Then the judge is judged: with a fault planted, a selection must find it.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import models
from judge import FAULTS

# What of PEFT's tests is about LoRA, runs on a CPU, and needs of the hub no more than a model's architecture.
FILES = (
    "arrow", "bdlora", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models",
    "initialization", "lora_conversion", "lora_variants", "lorafa", "loraplus", "low_level_api", "mixed", "seq_classifier",
    "target_parameters", "tuners_utils", "velora", "xlora",
)  # fmt: skip
SELECTION = "(lora or mixed or hotswap or low_level or arrow) and not (adalora or randlora or vblora or gralora)"
PLANTED = ("custom_models",), "LoraConfig and (test_merge_layers or test_disable_adapters_with_merging)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sdist", type=Path, help="peft-X.tar.gz, of the version that is installed")
    parser.add_argument("--work", type=Path, required=True, help="for PEFT's sources, the tiny models and the results")
    parser.add_argument("--jobs", default="2", help="pytest-xdist's -n")
    parser.add_argument("--files", choices=FILES, nargs="+", default=FILES, help="of PEFT's tests, all by default")
    parser.add_argument("--only", default=SELECTION, help="pytest's -k")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(options.sdist) as archive:
        archive.extractall(options.work, filter="data")
    root = options.work / options.sdist.name.removesuffix(".tar.gz")
    (root / "tests" / "__init__.py").touch()
    models.write(options.work / "hub")
    plain, fused = (run(root, options.jobs, how, options.files, options.only) for how in ("plain", "fused"))
    faults = compare(plain, fused)
    ran = {test.split("::")[0] for test in plain["outcomes"]}
    faults += [f"test_{name}.py: no test ran" for name in options.files if f"tests/test_{name}.py" not in ran]
    for fault in FAULTS:
        seen = run(root, options.jobs, fault, *PLANTED)
        print(f"planted, {fault}: found in {len(seen['wrong'])} of {seen['calls']} fused calls")
        if not seen["wrong"]:
            faults.append(f"the planted fault was not found: {fault}")
    print("\n".join(faults) or "PEFT's tests see no difference")
    return bool(faults)


def compare(plain, fused) -> list[str]:
    """Prints a line a file; returns what is wrong."""
    rows = collections.defaultdict(collections.Counter)
    faults = []
    for test in sorted(plain["outcomes"].keys() | fused["outcomes"].keys()):
        without, ours = (seen["outcomes"].get(test, "missing") for seen in (plain, fused))
        rows[test.split("::")[0].split("/")[-1]][ours] += 1
        if without != ours:
            faults.append(f"{test}: {without} without us, {ours} with us")
    for name, row in rows.items():
        print(f"{name:34}" + "".join(f" {row[outcome]:5} {outcome}" for outcome in ("passed", "skipped", "failed")))
    print(f"{fused['calls']} fused calls ({fused['mixed']} of mixed batches), {fused['gradients']} gradients compared")
    for reason, times in sorted(fused["not_fused"].items(), key=lambda item: -item[1]):
        print(f"{times:6} calls not fused: {reason}")
    if not (fused["calls"] and fused["mixed"] and fused["gradients"]):
        faults.append("some kind of fused call was never judged")
    return faults + fused["wrong"]


def run(root, jobs, how, files, only) -> dict:
    """The outcomes of PEFT's tests, and what the judge saw."""
    here = Path(__file__).resolve().parent
    seen = root.parent / f"seen-{how.replace(' ', '-').replace('.', '')}"
    environment = os.environ | {
        "JUDGE": how, "JUDGE_OUT": str(seen), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(root.parent / "hub"),
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
    }  # fmt: skip
    for old in root.parent.glob(f"{seen.name}.*"):
        old.unlink()
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(root), "-p", "plugin", "-p",
        "no:cacheprovider", "-n", jobs, "-k", only, *(f"tests/test_{name}.py" for name in files),
    ]  # fmt: skip
    with open(f"{seen}.log", "w") as log:
        subprocess.run(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    total = {"outcomes": {}, "calls": 0, "mixed": 0, "gradients": 0, "not_fused": collections.Counter(), "wrong": []}
    for part in root.parent.glob(f"{seen.name}.*"):
        if part.suffix != ".log":
            for name, value in json.loads(part.read_text()).items():
                total[name] = total[name] | value if name == "outcomes" else total[name] + type(total[name])(value)
    return total


if __name__ == "__main__":
    sys.exit(main())
