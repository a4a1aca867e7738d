"""python -m quantdm.cli"""

from quantdm.cli.main import main

main()
