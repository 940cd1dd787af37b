"""`python -m robustmail.bench` is `robustmail bench`."""

import runpy
import sys

sys.argv[:1] = ["robustmail", "bench"]
runpy.run_module("robustmail", run_name="__main__")
