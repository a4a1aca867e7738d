"""Full precision and any number of quantized pipelines on equal seeds; the same as `quantdm evaluate table`.

    python eval/evaluate.py digits-dit recipes/digits-dit-3.0bit-a16.yaml kmeans-channel-4 -o tables/dit
    python eval/evaluate.py path/to/pixart 3bit=exports/pixart-3bit 4bit=exports/pixart-4bit -o tables/pixart \
        --protocol coco.yaml --images 5000 --seeds 1 --features inception-pytorch-fid,dinov2:path --clip path

Writes one table as Markdown, JSON and CSV, with a hashed manifest; run it again to go on.
"""

import sys

from quantdm.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate", "table"]
    main()
