"""Frechet and kernel distances of folders, archives, tensors and pipelines; the same as `quantdm evaluate fid`.

python eval/fid.py ref val2017.zip --side 512 --rgb -o coco.safetensors       # statistics, once
python eval/fid.py calc images/quantized --ref coco.safetensors               # FID of a folder
python eval/fid.py calc digits-dit --images 2000 --ref digits.safetensors     # of a pipeline
python eval/fid.py compare images/quantized images/fp --features digits       # equal seeds: in pairs, too
python eval/fid.py ref shard-*.safetensors -o all.safetensors                 # merge what processes computed
python eval/fid.py metrics                                                    # what there is, what is missing
"""

import sys

from quantdm.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["evaluate", "fid"]
    main()
