"""Writes the demo's two data sets: real handwritten digits, and printed letters from other fonts.

    pip install scikit-learn pillow
    python demo/glyphs.py | xargs apt-get install -y --no-install-recommends    # for letters/
    python demo/make_data.py

digits/   1,797 scans of handwritten digits, 8 x 8 pixels, from the UCI Machine Learning Repository
          ("Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998, CC BY 4.0),
          as scikit-learn ships them. A cell of a scan counts the ink in a 4 x 4 block: 0 to 16.
letters/  26 capital letters in 20 type families that `pretrain.py` keeps out of training.

Both are folders of class sub-folders; their names, "_" read as a space, are the class names. The
result is the same on every run (for letters/, with the same versions of the font packages).
"""

import random
import string
from pathlib import Path

from PIL import Image, ImageFilter

from glyphs import DIGITS, HELD_OUT, face_of, render

HERE = Path(__file__).parent


def write_digits(folder: Path) -> None:
    """folder/three/0042.png is scan 42 of scikit-learn's array; grey 0 (paper) to 255 (ink)."""
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


if __name__ == "__main__":
    write_digits(HERE / "digits")
    write_letters(HERE / "letters")
