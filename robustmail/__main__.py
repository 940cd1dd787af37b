"""python -m robustmail"""

import os
import sys

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not sys.flags.safe_path and sys.path and os.path.abspath(sys.path[0]) != HOME:
    del sys.path[0]  # -m puts the current folder there, and a torch/ in somebody's folder is not the one to import

from robustmail.cli.main import main  # noqa: E402

main()
