"""python -m robustmail"""

from robustmail.cli import main

main()
