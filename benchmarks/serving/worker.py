"""One process in which SGLang's load generators run one after another: to import them takes longer than many a load.

Started as a script by :class:`benchmarks.serving.bench.Worker`. It imports the modules that are named, then reads one
JSON object a line: ``argv`` (module, then the module's own arguments), ``log``, ``home``, ``done``. The command's
output goes to ``log``, its exit code to ``done``. It ends with its input.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path


def execute(argv: list[str]) -> int:
    """Exit code of one command line."""
    sys.argv = argv
    try:
        importlib.import_module(argv[0]).cli_main()
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(modules: list[str]) -> None:
    sys.stdout.reconfigure(line_buffering=True)
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        os.environ["HOME"] = job["home"]
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        code = execute(job["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        done = Path(job["done"])
        scratch = done.with_name(f".{done.name}")
        scratch.write_text(str(code))
        scratch.replace(done)


if __name__ == "__main__":
    main(sys.argv[1:])
