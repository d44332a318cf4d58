"""Corpus preparation against the tokenizer library's own batch encoding of the same text, and its memory.

python -m tools.benchmarks corpus a.txt b.txt --tokenizer gpt2.json --eos-token "<|endoftext|>" --workers 2

The library encodes batches of 10,000 documents that are in memory already, with as many threads as there are workers;
preparation starts its processes, reads, encodes and writes. Memory is the sum of the peaks of all its processes.
Processor time of both is given, too: it can be compared on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_mdm.data.documents import SEPARATORS

_BATCH = 10_000
_ENCODE = """
import sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2])
texts = open(sys.argv[1], encoding="utf-8").read().split(sys.argv[3])
tokenizer.encode_batch(texts[:100])
began, busy = time.monotonic(), time.process_time()
for start in range(0, len(texts), int(sys.argv[4])):
    tokenizer.encode_batch(texts[start : start + int(sys.argv[4])], add_special_tokens=False)
print(time.monotonic() - began, time.process_time() - busy)
"""


def library(path: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """(seconds, processor seconds)"""
    pattern = SEPARATORS[arguments.documents]
    assert isinstance(pattern, bytes)
    separator = pattern.decode()
    command = [sys.executable, "-c", _ENCODE, path, arguments.tokenizer, separator, str(_BATCH)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(arguments.workers), "TOKENIZERS_PARALLELISM": "true"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    seconds, busy = map(float, output.split())
    return seconds, busy


def preparation(path: str, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """(seconds from start to end, processor seconds, MiB of all processes at their peaks)"""
    program = Path(__file__).parents[1] / "prepare_data.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(program), "corpus", path, "--output", f"{folder}/c"]
        command += ["--tokenizer", arguments.tokenizer, "--eos-token", arguments.eos_token]
        command += ["--workers", str(arguments.workers), "--documents", arguments.documents]
        began = time.monotonic()
        peaks = dict[int, int]()
        used = _processor_seconds()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                peaks.update(_peaks(process.pid))
                time.sleep(0.1)
            if process.returncode:
                raise RuntimeError(process.stderr.read() if process.stderr else "")
        return time.monotonic() - began, _processor_seconds() - used, sum(peaks.values()) / 1024


def _processor_seconds() -> float:
    """Of all child processes that have ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peaks(root: int) -> dict[int, int]:
    """Peak resident KiB of a process and its descendants, as far as they can be read."""
    found = dict[int, int]()
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("VmHWM"):
                found[pid] = int(line.split()[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--eos-token", default="</s>")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--documents", default="paragraph", choices=["line", "paragraph"])
    arguments = parser.parse_args()
    for path in arguments.text:
        megabytes = Path(path).stat().st_size / 1e6
        alone, alone_busy = library(path, arguments)
        seconds, busy, memory = preparation(path, arguments)
        result = {
            "file": path,
            "megabytes": round(megabytes, 1),
            "library_mb_per_second": round(megabytes / alone, 2),
            "preparation_mb_per_second": round(megabytes / seconds, 2),
            "relative_speed": round(alone / seconds, 3),
            "relative_processor_time": round(alone_busy / busy, 3),
            "peak_mib": round(memory),
        }
        print(json.dumps(result), flush=True)
