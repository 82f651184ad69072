import gzip
from pathlib import Path

import pytest
import torch

RAW = Path(__file__).resolve().parent.parent / "data" / "MNIST" / "raw"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums in one order, also in the processes that the tests start with OMP_NUM_THREADS=1."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder for --data-dir: MNIST's first 1,100 training and 600 test images."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in RAW.glob("*.gz"):
        n, images = 1100 if "train" in path.name else 600, "images" in path.name
        with gzip.open(path) as file:
            header, content = file.read(16 if images else 8), file.read(n * (784 if images else 1))
        (raw / path.stem).write_bytes(header[:4] + n.to_bytes(4, "big") + header[8:] + content)
    return raw.parent.parent
