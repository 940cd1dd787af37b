"""Run the command line: `python -m robustmail`."""

import os
import sys

PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not sys.flags.safe_path and sys.path and os.path.abspath(sys.path[0]) != PACKAGE_PARENT:
    del sys.path[0]  # the current folder, put there by -m: a folder torch/ in it must not be imported

from robustmail.cli.main import main  # noqa: E402

main()
