"""Write the table of docs/distributed.md.

    make docs-distributed

Runs the scripts of tests/distributed, each with the backend that it is for.
"""

import json
import os
import subprocess
import sys
import tempfile

from tools.report import pages

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def results():
    """What each script tells of the engines that it tries."""
    with tempfile.TemporaryDirectory() as directory:
        for command in (
            ("tests/distributed/tensorflow_replicas.py", "2"),
            ("tests/distributed/tensorflow_replicas.py", "3"),
            ("tests/distributed/tensorflow_replicas.py", "4"),
            ("tests/distributed/tensorflow_workers.py", directory),
            ("tests/distributed/jax_devices.py",),
            (*TORCHRUN, "tests/distributed/torch_ddp.py"),
        ):
            print(*command, flush=True)
            output = subprocess.run(
                [sys.executable, *command],
                cwd=pages.ROOT,
                env={**os.environ, "PYTHONPATH": str(pages.ROOT)},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            lines = [line for line in output.splitlines() if "engine" in line]
            yield from map(json.loads, lines)


def table():
    """The table in Markdown."""
    rows = [
        "| engine | devices | largest difference | extra transfers, measuring "
        "step | other steps | extra bytes | bytes of the gradient |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows += [
        "| {engine} | {devices} | {difference:.1e} "
        "| {extra_collectives_measuring} | {extra_collectives_other} "
        "| {extra_bytes:,} | {gradient_bytes:,} |".format(**result)
        for result in results()
    ]
    return "\n".join(rows) + "\n"


def main():
    """Replace the table."""
    pages.replace_table(pages.DOCS / "distributed.md", table())


if __name__ == "__main__":
    main()
