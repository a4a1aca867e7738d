"""How far two sets of real images are apart: Fashion-MNIST, training against test images, at 1,000, 5,000 and 10,000.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
    python eval/fashion_floor.py fashion --features pyramid
    python eval/fashion_floor.py fashion --features efficientnet-lite0 --sizes 1000,5000

What a figure of equal distributions is at a number of images: the floor below which nothing can be told. Frechet
distance, the same extrapolated, and KID, on disjoint real images of one kind. Writes eval/results/fashion_floor.json.
"""

import argparse
import datetime
import gzip
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.errors import QuantDMError
from quantdm.files import digest, read_json, write_json
from quantdm.machine import one_torch_thread, versions
from quantdm.metrics.feature_sets import FeatureSet, feature_set
from quantdm.metrics.features import FeatureSpace, open_features
from quantdm.metrics.images import BATCH, ImageSet
from quantdm.metrics.measure import set_figures

OUT = Path(__file__).parent / "results" / "fashion_floor.json"
FILES = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
STEP = 500  # images per cached part: a stopped run goes on there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the package was unpacked")
    parser.add_argument("--features", default="pyramid")
    parser.add_argument("--sizes", default="1000,5000,10000")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    space = open_features(arguments.features)
    record = read_json(OUT, version=1) if OUT.is_file() else {"version": 1, "floors": {}}
    with one_torch_thread():
        parts = {split: features_of(arguments.folder, split, space, max(sizes)) for split in FILES}
        for size in sizes:
            mine, other = (first(parts[split], size) for split in FILES)
            names = ["fd", "kid", *(["fd_infinity"] if size >= 5000 else [])]
            found = {key: figure.record() for key, figure in set_figures(names, mine, other).items()}
            kept = ("title", "value", "notes", "protocol")
            told = {key: {name: value[name] for name in kept} for key, value in found.items()}
            record["floors"].setdefault(arguments.features, {})[str(size)] = told
            print(size, {key: value["value"] for key, value in found.items()}, flush=True)
            machine = {"versions": versions(), "machine": platform.machine(), "date": datetime.date.today().isoformat()}
            write_json(OUT, record | machine)


def features_of(folder: Path, split: str, space: FeatureSpace, count: int) -> list[FeatureSet]:
    """Return the features of the first images of a split, in parts."""
    images = read_idx(folder, FILES[split])[:count]
    parts = images.split(STEP)
    return [feature_set(as_set(part, f"{split} {i * STEP}"), space, keep=True) for i, part in enumerate(parts)]


def as_set(images: torch.Tensor, name: str) -> ImageSet:
    """Return images in memory as a set."""
    names = tuple(f"{i:06d}" for i in range(len(images)))
    return ImageSet(name, names, lambda: iter(images.split(BATCH)), lambda: digest(images))


def first(parts: list[FeatureSet], size: int) -> FeatureSet:
    """Return the union of the parts that hold the first `size` images."""
    found: Any = None
    for part in parts[: size // STEP]:
        found = part if found is None else found + part
    return found


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """Read grey images of an idx file: four numbers of four bytes, then pixels; return uint8 [N, 1, H, W].

    Raises:
        QuantDMError: there is no such file below the folder, or it is no idx file of images.
    """
    path = next(iter(sorted(folder.rglob(name))), None)
    if path is None:
        raise QuantDMError(f"{folder}: holds no {name}; expected the unpacked package dataset-fashion-mnist")
    with gzip.open(path) as file:
        data = file.read()
    kind, count, height, width = np.frombuffer(data, ">i4", 4)
    if kind != 2051 or len(data) != 16 + count * height * width:
        raise QuantDMError(f"{path}: is no idx file of images")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=16).copy()).reshape(count, 1, height, width)


if __name__ == "__main__":
    main()
