"""What decoding takes of the memory: one picture, and many at once."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared_engine import ImageError
from shared_engine.images import decode
from shared_engine.images.decode import MemoryBudget
from shared_engine.images.encode import encode_data_url
from shared_engine.images.tiles import cut_tiles
from tests.support.image_files import FORMATS, SIDE, exif

WIDTH, HEIGHT = 3_072, 2_048
MOST = 12
"""Bytes per pixel: stored, converted to RGB, and turned or laid over white."""
LARGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"png {mode}": (mode, "PNG", {}) for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16")},
    **{
        f"tiff {mode}": (mode, "TIFF", {"compression": "tiff_adobe_deflate"})
        for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16")
    },
    **{f"jpeg {mode}": (mode, "JPEG", {}) for mode in ("L", "RGB", "CMYK")},
    "jpeg progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg turned": ("RGB", "JPEG", {"exif": exif(6)}),
    "png upside down": ("RGB", "PNG", {"exif": exif(3)}),
    "webp": ("RGB", "WEBP", {"lossless": True, "method": 0}),
    "gif": ("P", "GIF", {}),
}
MEASURE = """
import json
from pathlib import Path
from shared_engine.images import decode, encode, tiles

def read(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

tiles.cut_tiles(Path(PATHS[0]).read_bytes(), 6)
out = {}
for path in PATHS:
    file = Path(path).read_bytes()
    opened = decode.open_image(file)
    for use in (lambda file: tiles.cut_tiles(file, 2, 256), encode.encode_data_url):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present value again
        before = read("VmRSS")
        use(file)
        out.setdefault(path, []).append(read("VmHWM") - before)
    out[path].append(opened.bytes_needed)
print(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_is_within_the_estimate(tmp_path: Path, python: Callable[[str], str]) -> None:
    paths = []
    for name, (mode, kind, options) in LARGE.items():
        paths.append(tmp_path / name)
        Image.new(mode, (WIDTH, HEIGHT)).save(paths[-1], kind, **options)
    peaks = json.loads(python(f"PATHS = {[str(path) for path in paths]}\n{MEASURE}"))
    for path in paths:
        *taken, needed = peaks[str(path)]
        pixels = WIDTH * HEIGHT
        assert needed <= pixels * (MOST + (12 if path.name == "webp" else 6)), path.name
        assert max(taken) < 1.1 * needed + 10e6, (path.name, taken, needed)


@pytest.mark.parametrize("name", ["png", "png palette", "webp", "tiff cmyk", "jpeg progressive"])
def test_a_lazy_pil_image_counts_like_its_file(name: str) -> None:
    file = FORMATS[name][0]
    with Image.open(BytesIO(file)) as lazy:
        opened = decode.open_image(lazy)
        assert opened.bytes_needed >= decode.open_image(file).bytes_needed


class Spy(MemoryBudget):
    """A budget that remembers the most that was lent, and to how many."""

    def __init__(self, capacity: int) -> None:
        self.most = self.threads = self.most_threads = 0
        super().__init__(capacity)

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        with super().hold(size):
            with self._changed:
                self.threads += 1
                self.most = max(self.most, self.capacity - self.free)
                self.most_threads = max(self.most_threads, self.threads)
            try:
                yield
            finally:
                with self._changed:
                    self.threads -= 1


@pytest.mark.parametrize("pictures", [0.5, 1, 2.5, 100])
def test_threads_share_the_budget(pictures: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a picture is enough for one: it goes alone."""
    file = FORMATS["webp"][0]
    spy = Spy(int(pictures * decode.open_image(file).bytes_needed))
    monkeypatch.setattr(decode, "_IN_FLIGHT", spy)
    expected = cut_tiles(file, 6, SIDE)

    def use(file: bytes) -> None:
        if len(file) < 99:
            with pytest.raises(ImageError):
                encode_data_url(file)
        else:
            assert encode_data_url(file)
            assert np.array_equal(cut_tiles(file, 6, SIDE), expected)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, [file, file[:98]] * 32))
    assert spy.most <= spy.capacity
    assert spy.most_threads <= max(1, pictures)
    assert (spy.free, spy.threads) == (spy.capacity, 0)


def test_a_large_request_is_not_overtaken() -> None:
    budget, order = MemoryBudget(10), []

    def work(size: int) -> None:
        with budget.hold(size):
            order.append(size)

    with budget.hold(5):
        threads = []
        for size in (10, 4, 3, 99):
            threads.append(threading.Thread(target=work, args=(size,)))
            threads[-1].start()
            while len(budget._waiting) < len(threads):
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join(10)
    assert (order[0], sorted(order[1:3]), order[3]) == (10, [3, 4], 99)
    assert budget.free == 10


def test_an_interrupted_request_leaves_the_queue() -> None:
    budget = MemoryBudget(10)

    class GivenUp(BaseException):
        pass

    def give_up(*_: object) -> None:
        raise GivenUp

    with budget.hold(10):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(budget._changed, "wait_for", give_up)
            with pytest.raises(GivenUp), budget.hold(1):
                pass
        assert budget.free == 0
    with budget.hold(10):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_can_decode(python: Callable[[str], str]) -> None:
    code = """
import os, signal
from shared_engine.images import decode, tiles
from tests.support.image_files import PICTURE

with decode._IN_FLIGHT.hold(2**40), decode._LOADING:
    if (child := os.fork()) == 0:
        signal.alarm(100)  # its pipe would keep the test for ever
        tiles.cut_tiles(PICTURE, 2)
        os._exit(7)
    print(os.waitpid(child, 0)[1] >> 8)
"""
    assert python(code) == "7\n"
