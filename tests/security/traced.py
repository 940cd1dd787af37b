"""A process that runs commands and writes down what they read, wrote, ran, started and connected to."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import tempfile
from typing import Any

seen: dict[str, Any] = {"read": set(), "written": set(), "run": set(), "started": [], "connected": [], "said": []}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def hook(event: str, args: tuple[Any, ...]) -> None:
    """Of every open, exec, import, process and connection."""
    if event == "open" and isinstance(args[0], (str, bytes)):
        writes = bool(set(args[1] or "") & set("wax+")) or bool((args[2] or 0) & WRITING)
        seen["written" if writes else "read"].add(os.path.abspath(os.fsdecode(args[0])))
    elif event == "exec" and not args[0].co_filename.startswith("<"):  # as dataclasses make functions
        seen["run"].add(os.path.abspath(args[0].co_filename))
    elif event == "import" and args[1]:
        seen["run"].add(os.path.abspath(args[1]))
    elif event == "subprocess.Popen":
        seen["started"].append([os.fsdecode(word) for word in args[1]])
    elif event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"):
        seen["started"].append([event, str(args[0])])
    elif event == "socket.connect":
        seen["connected"].append(str(args[1]))


if __name__ == "__main__":
    verbs, path = json.loads(sys.argv[1]), sys.argv[2]
    tempfile.gettempdir()  # Python writes a file once to find out which folder is for temporary files
    sys.addaudithook(hook)
    from robustmail.cli.main import main
    from robustmail.evaluation import sanity_checks
    from robustmail.report import margin_figures

    # What more images and more pictures open, these do.
    sanity_checks.SAMPLE = 8
    margin_figures.PICTURES = {"paths": margin_figures.PICTURES["paths"]}

    for words, _ in verbs:
        sys.argv = ["robustmail", *shlex.split(words)]
        out, said, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            try:
                main()
            except SystemExit as left:
                code = int(left.code or 0)
        seen["said"].append([code, said.getvalue()])
    found = {name: sorted(value) if isinstance(value, set) else value for name, value in seen.items()}
    with open(path, "w") as file:
        json.dump(found, file)
