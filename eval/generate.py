"""Images or latents to a folder, one generator per image; the same as `quantdm evaluate generate`.

    python eval/generate.py digits-dit -o images/fp --images 1000
    python eval/generate.py digits-dit --recipe recipes/digits-dit-3.0bit-a16.yaml -o images/3bit --images 1000
    accelerate launch --num_processes 4 eval/generate.py path/to/pixart --protocol coco.yaml -o images/fp --images 10000

Run it again to go on; every process makes its share and writes to the same folder.
"""

import sys

from quantdm.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate", "generate"]
    main()
