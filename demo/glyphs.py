"""Characters drawn in freely licensed fonts: the pictures that the demo's CLIP is made from.

    python demo/glyphs.py | xargs apt-get install -y --no-install-recommends    # on Debian 12

prints the font packages. Needs numpy and pillow.
"""

import functools
import random
import string
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# --------------------------------------------------------------------------------------------------
# Fonts: Debian's packages fonts-NAME, by the licence of the font files in them, as each package's
# /usr/share/doc/fonts-NAME/copyright states it (GPL there is about Debian's own files). Where a
# choice is left, the licence named here is the one chosen. Not used: fonts that are only under
# others (GPL, LGPL, CC BY-SA, Bitstream Vera, ...), and cardo, teluguvijayam and ukij-uyghur, some
# files of which name another licence in themselves than Debian does.

OFL = """
3270 aksharyogini2 allerta anonymous-pro apropal averia-gwf averia-sans-gwf averia-serif-gwf
babelstone-modern bajaderka bebas-neue blankenburg breip bwht cabinsketch century-catalogue
cherrybomb cmu compagnon croscore crosextra-caladea crosextra-carlito dkg-handwriting dotgothic16
ecolier-court elstob essays1743 eurofurence evertype-conakry fantasque-sans gamaliel gemunu-libre
georgewilliams gfs-artemisia gfs-didot gfs-neohellenic gfs-solomos gfs-theokritos gnutypewriter
gotico-antiqua havana hosny-amiri hosny-thabit humor-sans inconsolata inter joscelyn junction
junicode kalapi karmilla klaudia-berenika klee kristi ldco le-murmure league-mono leckerli-one
lemonada levien-museum liberation2 lxgw-wenkai manchufont manrope meera-inimai millimetre monofur
mononoki morisawa-bizud-gothic morisawa-bizud-mincho mplus nanum nanum-eco nanum-extra
naver-d2coding navilu noto-core noto-mono oflb-asana-math okolaks oldstandard opendin oxygen
radisnoir rampart reggae rit-sundar rocknroll routed-gothic sawarabi-mincho senamirmir-washra seto
sil-abyssinica sil-akatab sil-alkalami sil-andika sil-annapurna sil-charis sil-dai-banna sil-doulos
sil-galatia sil-gentium sil-gentium-basic sil-harmattan sil-lateef sil-mingzat sil-mondulkiri
sil-mondulkiri-extra sil-nuosusil sil-padauk sil-scheherazade sil-sophia-nubian sil-tagmukay
sil-taiheritagepro smc-chilanka smiley-sans sora stick stix tomsontalks triod-postnaja woowa-bm
yozvox-yozfont-cute yozvox-yozfont-edu yrsa-rasa yusei-magic
"""
APACHE = "clear-sans jetbrains-mono motoya-l-cedar motoya-l-maruberi open-sans roboto-unhinted"
BSD_MIT = "agave fanwood go kiloji konatu lindenhill roadgeek"
PUBLIC_DOMAIN = """
aoyagi-kouzan-t aoyagi-soseki fantasma goudybookletter mona ocr-a ocr-b prociono tuffy
"""  # fantasma: CC0
TRAINED = " ".join([OFL, APACHE, BSD_MIT, PUBLIC_DOMAIN]).split()
HANDWRITTEN = """
aoyagi-kouzan-t aoyagi-soseki bajaderka breip bwht dkg-handwriting ecolier-court havana humor-sans
joscelyn kalapi kiloji klee kristi ldco nanum-extra navilu seto smc-chilanka stick
tomsontalks woowa-bm yozvox-yozfont-cute yozvox-yozfont-edu yusei-magic
""".split()  # wholly or partly drawn by hand: half of all pictures
# Never trained on, nor a known derivative: package -> a part of one font file's name. All are
# under the OFL but roboto-slab, which is under the Apache licence.
HELD_OUT = {
    "arapey": "Arapey-Regular.", "cantarell": "Cantarell-Regular",
    "comfortaa": "Comfortaa-Regular", "comic-neue": "ComicNeue-Regular",
    "courier-prime": "Courier Prime Bold.", "dancingscript": "DancingScript-Regular",
    "dosis": "Dosis-SemiBold", "ebgaramond": "EBGaramond12-Italic", "firacode": "FiraCode-Medium",
    "jura": "Jura-Medium", "kaushanscript": "KaushanScript-Regular",
    "league-spartan": "LeagueSpartan-Bold", "lobstertwo": "LobsterTwo-Regular",
    "national-park": "NationalPark-Regular", "play": "Play-Regular",
    "quattrocento": "Quattrocento", "quicksand": "Quicksand-Light",
    "roboto-slab": "RobotoSlab-Bold", "vollkorn": "Vollkorn-Regular",
    "yanone-kaffeesatz": "YanoneKaffeesatz-Regular",
}  # fmt: skip
PER_FAMILY, PER_PACKAGE = 4, 32  # no family outweighs the others

# --------------------------------------------------------------------------------------------------
# Characters

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GREEK = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρστυφχψω"
CYRILLIC = "БГДЖЗИЛПФЦЧШЩЭЮЯ"
SYMBOLS = "!?&@#$%*+=<>/\\()[]{}§¶€£¥©®™±÷×√∞∑∫←→↑↓"
LATIN = [string.ascii_uppercase, string.ascii_lowercase]
SCRIPTS = [string.digits, *LATIN, GREEK, CYRILLIC, SYMBOLS]
CHARACTERS = "".join(SCRIPTS)  # K = 165 of them

# --------------------------------------------------------------------------------------------------
# Faces and glyphs

CANVAS, INK = 48, 40  # pixels: side of a glyph's picture, and of the ink's longer side in it


def font_files(package: str) -> list[Path]:
    """The font files that Debian's fonts-`package` has installed, sorted; one of each name."""
    listing = subprocess.run(["dpkg", "-L", f"fonts-{package}"], capture_output=True, text=True)
    paths = [Path(line) for line in sorted(listing.stdout.split("\n"))]
    fonts = {p.stem: p for p in paths if p.suffix.lower() in (".ttf", ".otf", ".ttc")}
    return list(fonts.values())


@functools.cache
def face_of(package: str) -> ImageFont.FreeTypeFont:
    """The face that stands for a held-out package."""
    path = next((p for p in font_files(package) if HELD_OUT[package] in p.name), None)
    if path is None:
        raise SystemExit(f"fonts-{package} is not installed: see the first lines of demo/glyphs.py")
    return ImageFont.truetype(str(path), 64, layout_engine=ImageFont.Layout.BASIC)


def render(face: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Light on dark, ink centred and scaled to INK: (CANVAS, CANVAS) uint8; None without ink."""
    left, top, right, bottom = face.getbbox(character)
    if not (0 < right - left < 400 and 0 < bottom - top < 400):
        return None
    glyph = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(glyph).text((2 - left, 2 - top), character, font=face, fill=255)
    glyph = glyph.crop(glyph.getbbox() or (0, 0, 0, 0))
    if not all(glyph.size):
        return None
    scale = INK / max(glyph.size)
    size = [max(1, round(side * scale)) for side in glyph.size]
    canvas = Image.new("L", (CANVAS, CANVAS))
    corner = ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2)
    canvas.paste(glyph.resize(size, Image.Resampling.BILINEAR), corner)
    return np.asarray(canvas)


def render_face(path: Path) -> tuple[str, np.ndarray] | None:
    """A font file -> its family and its glyphs (K, CANVAS, CANVAS), zeros where it has none."""
    try:
        face = ImageFont.truetype(str(path), 64, layout_engine=ImageFont.Layout.BASIC)
        missing = render(face, "\U0010fffe")  # a code without a character: shows the font's box
        glyphs = [render(face, character) for character in CHARACTERS]
    except (OSError, ValueError):
        return None
    none = np.zeros((CANVAS, CANVAS), np.uint8)
    boxed = [g is None or (missing is not None and (g == missing).all()) for g in glyphs]
    return face.getname()[0], np.stack([none if b else g for g, b in zip(glyphs, boxed)])


def render_packages(packages: list[str]) -> tuple[np.ndarray, list[str]]:
    """All faces of the packages: glyphs (faces, K, CANVAS, CANVAS), and each face's package.

    Faces whose digits equal those of a face before them (a script's font often borrows its digits
    from another) are left out, and so is what exceeds PER_FAMILY and PER_PACKAGE.
    """
    glyphs, owners, families, seen = [], [], [], set()
    for package in packages:
        paths = font_files(package)
        random.Random(0).shuffle(paths)  # the cap should not favour the start of the alphabet
        for path in paths:
            family, pictures = render_face(path) or ("", None)
            if families.count(family) >= PER_FAMILY or owners.count(package) >= PER_PACKAGE:
                continue
            if pictures is None or not pictures[:10].any(axis=(1, 2)).all():
                continue
            key = (pictures[:10, ::6, ::6] >> 6).tobytes()
            if key not in seen:
                seen.add(key)
                glyphs.append(pictures), owners.append(package), families.append(family)
    return np.stack(glyphs), owners


def shape(glyph: np.ndarray) -> np.ndarray:
    """A glyph's ink stretched to a square and blurred, as a unit vector (144,); 0 for a blank."""
    box = Image.fromarray(glyph).getbbox()
    if box is None:
        return np.zeros(144, np.float32)
    square = Image.fromarray(glyph).crop(box).resize((12, 12), Image.Resampling.BOX)
    vector = np.asarray(square.filter(ImageFilter.BoxBlur(1)), np.float32).ravel()
    return vector / np.linalg.norm(vector)


def drop_oddities(glyphs: np.ndarray) -> np.ndarray:
    """Blanks, in each face, the scripts whose characters look like no other face's. Same shapes.

    Such are ornaments, and fonts that put one alphabet in the place of another. A script of a face
    stays if at least 40 % of its characters are nearest to the mean of their own kind.
    """
    shapes = np.stack([[shape(glyph) for glyph in face] for face in glyphs])  # (faces, K, 144)
    has, glyphs, start = shapes.any(axis=-1), glyphs.copy(), 0
    for script in SCRIPTS:
        part = slice(start, start + len(script))
        mean = shapes[:, part].mean(axis=0)
        mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
        right = (shapes[:, part] @ mean.T).argmax(axis=-1) == np.arange(len(script))
        share = (right & has[:, part]).sum(axis=1) / np.maximum(has[:, part].sum(axis=1), 1)
        glyphs[share < 0.4, part] = 0
        start += len(script)
    return glyphs


if __name__ == "__main__":
    print(*(f"fonts-{name}" for name in [*TRAINED, *HELD_OUT]))
