"""python -m robustmail"""

from robustmail.cli.main import main

main()
