"""Renders characters in freely licensed fonts. The demo's CLIP is trained on these images.

    python demo/glyphs.py | xargs apt-get install -y --no-install-recommends    # on Debian 12

As a script it prints the names of the font packages. It needs numpy and pillow.
"""

import functools
import random
import string
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# ---- Fonts ---------------------------------------------------------------------------------------
# Debian packages, without the prefix fonts-. Their licences are in demo/README.md. Not used: fonts
# under other licences (GPL, LGPL, CC BY-SA, ...), and cardo, teluguvijayam and ukij-uyghur, where
# some files name another licence than Debian does.
TRAINED = """
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
yozvox-yozfont-cute yozvox-yozfont-edu yrsa-rasa yusei-magic clear-sans jetbrains-mono
motoya-l-cedar motoya-l-maruberi open-sans roboto-unhinted agave fanwood go kiloji konatu lindenhill
roadgeek aoyagi-kouzan-t aoyagi-soseki fantasma goudybookletter mona ocr-a ocr-b prociono tuffy
""".split()
HANDWRITTEN = """
aoyagi-kouzan-t aoyagi-soseki bajaderka breip bwht dkg-handwriting ecolier-court havana humor-sans
joscelyn kalapi kiloji klee kristi ldco nanum-extra navilu seto smc-chilanka stick
tomsontalks woowa-bm yozvox-yozfont-cute yozvox-yozfont-edu yusei-magic
""".split()  # wholly or partly drawn by hand: used for half of the images
# Not trained on, nor known to be related to a font that is: package -> part of a font file's name.
HELD_OUT = {
    "arapey": "Arapey-Regular.",
    "cantarell": "Cantarell-Regular",
    "comfortaa": "Comfortaa-Regular",
    "comic-neue": "ComicNeue-Regular",
    "courier-prime": "Courier Prime Bold.",
    "dancingscript": "DancingScript-Regular",
    "dosis": "Dosis-SemiBold",
    "ebgaramond": "EBGaramond12-Italic",
    "firacode": "FiraCode-Medium",
    "jura": "Jura-Medium",
    "kaushanscript": "KaushanScript-Regular",
    "league-spartan": "LeagueSpartan-Bold",
    "lobstertwo": "LobsterTwo-Regular",
    "national-park": "NationalPark-Regular",
    "play": "Play-Regular",
    "quattrocento": "Quattrocento",
    "quicksand": "Quicksand-Light",
    "roboto-slab": "RobotoSlab-Bold",
    "vollkorn": "Vollkorn-Regular",
    "yanone-kaffeesatz": "YanoneKaffeesatz-Regular",
}
PER_FAMILY, PER_PACKAGE = 4, 32  # most faces, so that none outweighs the others

# ---- Characters ----------------------------------------------------------------------------------
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GREEK = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρστυφχψω"
CYRILLIC = "БГДЖЗИЛПФЦЧШЩЭЮЯ"
SYMBOLS = "!?&@#$%*+=<>/\\()[]{}§¶€£¥©®™±÷×√∞∑∫←→↑↓"
LATIN = [string.ascii_uppercase, string.ascii_lowercase]
SCRIPTS = [string.digits, *LATIN, GREEK, CYRILLIC, SYMBOLS]
CHARACTERS = "".join(SCRIPTS)  # K = 165

# ---- Faces and glyphs ----------------------------------------------------------------------------
CANVAS, INK = 48, 40  # side of a glyph's image, and of the longer side of its ink, in pixels


def font_files(package: str) -> list[Path]:
    """The font files of Debian's package, sorted, without duplicates in other formats."""
    listing = subprocess.run(["dpkg", "-L", f"fonts-{package}"], capture_output=True, text=True)
    paths = [Path(line) for line in sorted(listing.stdout.split("\n"))]
    fonts = {p.stem: p for p in paths if p.suffix.lower() in (".ttf", ".otf", ".ttc")}
    return list(fonts.values())


@functools.cache
def face_of(package: str) -> ImageFont.FreeTypeFont:
    """The face used of a held-out package."""
    path = next((p for p in font_files(package) if HELD_OUT[package] in p.name), None)
    if path is None:
        raise SystemExit(f"fonts-{package} is not installed: see the first lines of demo/glyphs.py")
    return ImageFont.truetype(str(path), 64, layout_engine=ImageFont.Layout.BASIC)


def render(face: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Light on dark, centred, scaled to INK: (CANVAS, CANVAS) uint8. Zeros if there is no ink."""
    canvas = Image.new("L", (CANVAS, CANVAS))
    left, top, right, bottom = face.getbbox(character)
    if not (0 < right - left < 400 and 0 < bottom - top < 400):
        return np.asarray(canvas)
    glyph = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(glyph).text((2 - left, 2 - top), character, font=face, fill=255)
    if glyph.getbbox():
        glyph = glyph.crop(glyph.getbbox())
        scale = INK / max(glyph.size)
        width, height = (max(1, round(side * scale)) for side in glyph.size)
        glyph = glyph.resize((width, height), Image.Resampling.BILINEAR)
        canvas.paste(glyph, ((CANVAS - width) // 2, (CANVAS - height) // 2))
    return np.asarray(canvas)


def render_face(path: Path) -> tuple[str, np.ndarray] | None:
    """Family and glyphs (K, CANVAS, CANVAS) of a font file. Glyphs it does not have are zero."""
    try:
        face = ImageFont.truetype(str(path), 64, layout_engine=ImageFont.Layout.BASIC)
        missing = render(face, "\U0010fffe")  # not a character: drawn as the font's empty box
        glyphs = np.stack([render(face, character) for character in CHARACTERS])
    except (OSError, ValueError):
        return None
    glyphs[(glyphs == missing).all(axis=(1, 2))] = 0
    return face.getname()[0], glyphs


def render_packages(packages: list[str]) -> tuple[np.ndarray, list[str]]:
    """All faces of the packages: glyphs (faces, K, CANVAS, CANVAS), and the package of each face.

    Leaves out faces without digits, faces with the same digits as an earlier one (fonts for other
    scripts often borrow their digits), and faces beyond PER_FAMILY and PER_PACKAGE.
    """
    glyphs, owners, families, seen = [], [], [], set()
    for package in packages:
        paths = font_files(package)
        random.Random(0).shuffle(paths)  # PER_PACKAGE should not favour names that begin with A
        for path in paths:
            family, pictures = render_face(path) or ("", None)
            if families.count(family) >= PER_FAMILY or owners.count(package) >= PER_PACKAGE:
                continue
            if pictures is None or not pictures[:10].any(axis=(1, 2)).all():
                continue
            digits = (pictures[:10, ::6, ::6] >> 6).tobytes()
            if digits not in seen:
                seen.add(digits)
                glyphs.append(pictures)
                owners.append(package)
                families.append(family)
    return np.stack(glyphs), owners


def shape(glyph: np.ndarray) -> np.ndarray:
    """A glyph's ink, stretched to a square and blurred: a unit vector (144,). 0 if blank."""
    box = Image.fromarray(glyph).getbbox()
    if box is None:
        return np.zeros(144, np.float32)
    square = Image.fromarray(glyph).crop(box).resize((12, 12), Image.Resampling.BOX)
    vector = np.asarray(square.filter(ImageFilter.BoxBlur(1)), np.float32).ravel()
    return vector / np.linalg.norm(vector)


def drop_oddities(glyphs: np.ndarray) -> np.ndarray:
    """Sets to zero, in each face, the scripts whose characters look unlike those of other faces.

    These are ornaments, and fonts with one alphabet in place of another. A script stays if at least
    40 % of its characters are closest to the mean over all faces of the same character.
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
