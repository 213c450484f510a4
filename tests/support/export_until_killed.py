"""Run by the kill tests: writes a checkpoint over and over, in the order of an export, ``config.json`` last.

Usage: export_until_killed.py SOURCE_A SOURCE_B OUTPUT MODE [STEP]. With the mode ``replace`` the two sources replace
each other at OUTPUT; with ``anew`` OUTPUT is moved away before each export. With STEP the process kills itself there.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from sglp_llm.checkpoint import publish
from sglp_llm.tensor_files import read_index, writer

writer.CHUNK_BYTES = 2**20


def main(source_a: str, source_b: str, output: str, mode: str, step: str = "") -> None:
    steps = 0
    trash = Path(output).parents[1] / "trash"

    def passed(_: int = 0) -> None:
        nonlocal steps
        steps += 1
        if str(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    rename = publish._renameat2

    def rename_in_sight(*arguments: object) -> None:
        passed()
        rename(*arguments)
        passed()

    publish._renameat2 = rename_in_sight
    print("ready", flush=True)
    while True:
        for source in (Path(source_a), Path(source_b)):
            index = read_index(source)
            if mode == "anew":
                shutil.rmtree(trash, ignore_errors=True)
                if Path(output).exists():
                    Path(output).rename(trash)
            with publish.atomic_folder(Path(output), overwrite=mode != "anew") as folder:
                shards = writer.group_by_size(index.tensors.items(), 10 * 2**20)
                writer.write_shards(folder, shards, index.metadata, passed)
                shutil.copy(source / "config.json", folder)
                passed()


if __name__ == "__main__":
    main(*sys.argv[1:])
