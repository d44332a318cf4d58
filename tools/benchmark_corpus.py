"""Corpus preparation against the tokenizer library's own batch encoding of the same text, and its memory.

python tools/benchmark_corpus.py a.txt b.txt --tokenizer gpt2.json --eos-token "<|endoftext|>" --workers 2

The library encodes batches of 10,000 documents that are in memory already, with as many threads as there are workers;
preparation starts its processes, reads, encodes and writes. Memory is the sum of the peaks of all its processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_mdm.data.documents import SEPARATORS
from megatron_mdm.parallel.program import run_program

_BATCH = 10_000
_ENCODE = """
import sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2])
texts = open(sys.argv[1], encoding="utf-8").read().split(sys.argv[3])
tokenizer.encode_batch(texts[:100])
began = time.monotonic()
for start in range(0, len(texts), int(sys.argv[4])):
    tokenizer.encode_batch(texts[start : start + int(sys.argv[4])], add_special_tokens=False)
print(time.monotonic() - began)
"""


def library_seconds(path: str, arguments: argparse.Namespace) -> float:
    separator = SEPARATORS[arguments.documents].decode()
    command = [sys.executable, "-c", _ENCODE, path, arguments.tokenizer, separator, str(_BATCH)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(arguments.workers), "TOKENIZERS_PARALLELISM": "true"}
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def preparation(path: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """(seconds from start to end, MiB of all processes at their peaks)"""
    program = Path(__file__).with_name("prepare_data.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(program), "corpus", path, "--output", f"{folder}/c"]
        command += ["--tokenizer", arguments.tokenizer, "--eos-token", arguments.eos_token]
        command += ["--workers", str(arguments.workers), "--documents", arguments.documents]
        began, peaks = time.monotonic(), dict[int, int]()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                peaks.update(_peaks(process.pid))
                time.sleep(0.1)
            if process.returncode:
                raise RuntimeError(process.stderr.read() if process.stderr else "")
        return time.monotonic() - began, sum(peaks.values()) / 1024


def _peaks(root: int) -> dict[int, int]:
    """Peak resident KiB of a process and its descendants, as far as they can be read."""
    found, waiting = dict[int, int](), [root]
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
    parser.add_argument("--memory-only", action="store_true", help="without the library's own encoding")
    arguments = parser.parse_args()
    for path in arguments.text:
        megabytes = Path(path).stat().st_size / 1e6
        library = 0.0 if arguments.memory_only else library_seconds(path, arguments)
        seconds, memory = preparation(path, arguments)
        result = {
            "file": path,
            "megabytes": round(megabytes, 1),
            "library_mb_per_second": round(megabytes / library, 2) if library else None,
            "preparation_mb_per_second": round(megabytes / seconds, 2),
            "relative_speed": round(library / seconds, 3) if library else None,
            "peak_mib": round(memory),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_program(main)
