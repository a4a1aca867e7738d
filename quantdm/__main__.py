"""python -m quantdm"""

from quantdm.cli.main import main

main()
