"""Trains the demo's tiny CLIP from scratch on images of characters and their names.

    python demo/glyphs.py | xargs apt-get install -y --no-install-recommends    # on Debian 12
    python demo/pretrain.py             # 45 minutes on one CPU core. Run it again to resume.
    python demo/pretrain.py --evaluate  # only measures demo/tiny-clip.pt

A training pair is a character in one of 578 font faces, distorted, and a caption such as "a photo
of a capital letter b.". The loss is CLIP's: in a batch of n pairs, each image must select its own
caption out of n, and each caption its image (Radford et al., 2021, figure 3). The demo's data sets
are not trained on. They are read to print zero-shot accuracy, which is also measured on distorted
digits in fonts that are held out of training.
"""

import argparse
import functools
import math
import random
import string
import sys
import time
import unicodedata
import zipfile
from pathlib import Path

import glyphs
import numpy as np
import torch
import torch.nn.functional as F
from glyphs import CHARACTERS, DIGITS
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # promptot.py is in the folder above
from clip_model import CLIP, load, tokenize  # noqa: E402 (found there)
from data import MEAN, STD, open_image, test_transform  # noqa: E402 (found there)

SIZE, TEXT_WIDTH = 32, 128

# ---- Captions ------------------------------------------------------------------------------------
# Characters of a group can look the same, so none is a wrong answer for another.
LOOKALIKES = """
0OoΟο 1lIΙιi 3З 4Ч AΑ BΒβ Cc EΕ ΓГ HΗ KkΚκ ΛЛ MmΜ NΝ nη ΠπП PpΡρ Ss Σ∑ TtΤτ uυμ VvUν Wwω XxΧχ×
YyΥγ ZzΖ aα Θθ ΦφФ Ψψ
""".split()
TEMPLATES = """
{} / {}. / a {} / a {}. / the {} / the {}. / a photo of a {} / a photo of a {}. / a photo of a {}. /
a photo of a {}. / a photo of the {} / a photo of the {}. / a photo of one {}. / a picture of a {} /
a picture of a {}. / an image of a {} / an image of a {}. / an image of the {} / a scan of a {} /
a scan of a {}. / a drawing of a {} / a drawing of a {}. / a sketch of the {}. /
a close-up photo of a {}. / a cropped photo of a {}. / a blurry photo of a {}. /
a low resolution photo of a {}. / a bad photo of a {}. / a good photo of the {}. /
a black and white photo of a {}. / a bright photo of a {}. / a rendering of a {}. /
a handwritten {} / a handwritten {}. / a printed {} / a printed {}. / a hand drawn {}. /
a sign with a {}. / this is a {} / this is a {}. / this is a photo of a {}. /
there is a {} in the photo. / it shows the {}. / a small picture of a {}. / one character: {} /
the character {} / a character, the {}. / it is a {}. / my photo of a {}. / some {}. /
a {} on paper. / a white {} on black. / a photo of my {}. / just a {}
"""
TEMPLATES = [" ".join(template.split()) for template in TEMPLATES.split("/")]


def names(character: str) -> list[tuple[str, str]]:
    """Names of a character, each with all characters it is right for: "letter a" for a and A."""
    both = character.lower() + character.upper()
    if character.isdigit():
        word = DIGITS[int(character)]
        phrases = [f"{noun} {word}" for noun in ("digit", "number", "numeral", "figure")]
        return [(name, character) for name in [word] * 3 + phrases + [f"digit {character}"]]
    official = unicodedata.name(character).lower().replace("latin ", "")
    if character in string.ascii_letters:
        case = "capital" if character.isupper() else "small"
        synonym = "uppercase" if character.isupper() else "lowercase"
        letter = character.lower()
        exact = [f"{case} letter {letter}"] * 3 + [f"{synonym} letter {letter}", f"{case} {letter}"]
        loose = [f"letter {letter}", f"letter {letter}", f"latin letter {letter}"]
        return [(name, character) for name in exact] + [(name, both) for name in loose]
    if character in glyphs.GREEK + glyphs.CYRILLIC:
        loose = official.replace("capital ", "").replace("small ", "")
        return [(official, character)] * 2 + [(loose, both), (loose.replace("letter ", ""), both)]
    return [(name, character) for name in (official, official, official.replace(" sign", ""))]


class Captions:
    """All captions as token ids, and which characters each name fits.

    Training uses a small vocabulary of the tokens that occur, about 200 instead of 49,408, in the
    same order. `used` (V,) has their ids in CLIP's vocabulary.
    """

    def __init__(self):
        table = [(name, CHARACTERS.index(c), fits) for c in CHARACTERS for name, fits in names(c)]
        self.of_character = [  # character -> its names
            [i for i, row in enumerate(table) if row[1] == k] for k in range(len(CHARACTERS))
        ]
        self.fits = torch.tensor([[c in row[2] for c in CHARACTERS] for row in table])  # (N, K)
        tokens = tokenize([t.format(row[0]) for row in table for t in TEMPLATES])
        self.used = tokens.unique()
        self.tokens = self.renumber(tokens).reshape(len(table), len(TEMPLATES), -1)  # (N, T, 77)

    def renumber(self, tokens: Tensor) -> Tensor:
        """CLIP's token ids -> ids in the small vocabulary. End of text still has the highest."""
        return torch.searchsorted(self.used, tokens)

    def draw(self, characters: list[int], rng: random.Random) -> tuple[Tensor, Tensor]:
        """A random caption for each of n characters: token ids (n, 77) and fits (n, K)."""
        name = [rng.choice(self.of_character[c]) for c in characters]
        template = [rng.randrange(len(TEMPLATES)) for _ in characters]
        return self.tokens[name, template], self.fits[name]


def lookalikes() -> Tensor:
    """(K, K), true where two different characters can look the same."""
    alike = torch.zeros(len(CHARACTERS), len(CHARACTERS), dtype=torch.bool)
    for group in LOOKALIKES:
        members = [CHARACTERS.index(c) for c in group]
        alike[torch.tensor(members)[:, None], torch.tensor(members)] = True
    return alike.fill_diagonal_(False)


# ---- Distortion: makes printed characters look like handwriting that was scanned -----------------
def distort(clean: Tensor, strength: float) -> Tensor:
    """Characters (B, CANVAS, CANVAS) in 0..1 -> normalised images (B, 3, SIZE, SIZE).

    strength: 0..1, scales every effect. At full strength from the start, the loss stays at the
    value for guessing for hundreds of steps.
    """
    x = stroke(clean[:, None], strength)
    x = F.grid_sample(x, warp(len(x), strength), mode="bilinear", align_corners=False)
    x = coarsen(x, strength)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (colour(x, strength) - mean) / std


def chance(n: int, p: float) -> Tensor:
    """(n, 1, 1, 1), true with probability p."""
    return torch.rand(n, 1, 1, 1) < p


def uniform(n: int, low: float, high: float, channels: int = 1) -> Tensor:
    """(n, channels, 1, 1), uniform between low and high."""
    return low + (high - low) * torch.rand(n, channels, 1, 1)


def stroke(x: Tensor, strength: float) -> Tensor:
    """Thicker or thinner lines: (B, 1, S, S) -> (B, 1, S, S)."""
    n = len(x)
    thick = F.max_pool2d(x, 3, 1, 1)
    x = torch.where(chance(n, 0.15 * strength), -F.max_pool2d(-x, 3, 1, 1), x)
    x = torch.where(chance(n, 0.6 * strength), thick, x)
    return torch.where(chance(n, 0.35 * strength), F.max_pool2d(x, 3, 1, 1), x)


def warp(n: int, strength: float) -> Tensor:
    """Grids (n, SIZE, SIZE, 2) for rotation, shear, scale, aspect, shift, elastic distortion."""
    turn, shear, aspect = strength * torch.randn(3, n) * torch.tensor([[0.16], [0.2], [0.12]])
    zoom = torch.exp(strength * (0.45 * torch.rand(n) - 0.15))  # > 1 draws larger
    cos, sin = turn.cos(), turn.sin()
    wide, high = torch.exp(aspect) / zoom, torch.exp(-aspect) / zoom
    shift = 0.07 * strength * torch.randn(2, n)
    affine = torch.stack([wide * cos, -sin + shear, shift[0], sin, high * cos, shift[1]], dim=1)
    grid = F.affine_grid(affine.reshape(n, 2, 3), [n, 1, SIZE, SIZE], align_corners=False)
    knots = torch.randn(n, 2, 4, 4) * uniform(n, 0.0, 0.16 * strength)
    elastic = F.interpolate(knots, (SIZE, SIZE), mode="bicubic", align_corners=False)
    return grid + elastic.permute(0, 2, 3, 1)


def coarsen(x: Tensor, strength: float) -> Tensor:
    """Blur, and low resolution, 8 x 8 or 12 x 12 pixels: (B, 1, S, S) -> (B, 1, S, S)."""

    def through(side: int) -> Tensor:
        small = F.adaptive_avg_pool2d(x, side)
        big = F.interpolate(small, x.shape[-2:], mode="bicubic", antialias=True)
        return big.clamp(0, 1)

    n = len(x)
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    y = torch.where(chance(n, 0.4 * strength), blurred, x)
    y = torch.where(chance(n, 0.25), through(12), y)
    y = torch.where(chance(n, 0.45), through(8), y)
    return y / y.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.1)  # like a scanner's exposure


def colour(x: Tensor, strength: float) -> Tensor:
    """(B, 1, S, S) -> RGB (B, 3, S, S), mostly light on dark, some tinted or inverted."""
    n = len(x)
    x = x.clamp(min=1e-4) ** torch.exp(0.35 * strength * torch.randn(n, 1, 1, 1))  # contrast
    grey = uniform(n, 1 - 0.4 * strength, 1).expand(n, 3, 1, 1)
    tinted = chance(n, 0.3 * strength)
    ink = torch.where(tinted, uniform(n, 0.5, 1, 3), grey)
    paper = torch.where(tinted, uniform(n, 0, 0.4, 3), uniform(n, 0, 0.2 * strength))
    y = paper + (ink - paper) * x
    y = torch.where(chance(n, 0.15 * strength), 1 - y, y)
    return (y + strength * uniform(n, 0, 0.1) * torch.randn_like(y[:, :1])).clamp(0, 1)


# ---- Training ------------------------------------------------------------------------------------
class Glyphs:
    """Draws random faces for characters, half of them from the handwritten packages."""

    def __init__(self, images: np.ndarray, owners: list[str]):
        self.images = torch.from_numpy(images)  # (faces, K, CANVAS, CANVAS) uint8
        has = images.any(axis=(2, 3))  # (faces, K)
        hand = np.array([owner in glyphs.HANDWRITTEN for owner in owners])
        self.faces = [  # character -> its handwritten faces, its printed faces
            [np.flatnonzero(column & group).tolist() for group in (hand, ~hand)] for column in has.T
        ]

    def draw(self, characters: list[int], rng: random.Random) -> Tensor:
        """(n, CANVAS, CANVAS) in 0..1."""
        faces = []
        for character in characters:
            hand, printed = self.faces[character]
            faces.append(rng.choice(hand if hand and rng.random() < 0.5 else printed))
        return self.images[faces, characters].float() / 255


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor, ambiguous: Tensor) -> Tensor:
    """CLIP's symmetric loss for features (n, D) of n pairs.

    ambiguous: (n, n), true where an image also fits the caption of another pair. Such pairs are
    left out.
    """
    logits = logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    logits = logits.masked_fill(ambiguous, float("-inf"))  # (image, caption)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def initialise(clip: CLIP) -> None:
    """Sets random weights as OpenAI's code does.

    Biases, layer norms and the patch convolution stay as PyTorch initialised them.
    """
    nn.init.constant_(clip.logit_scale, math.log(1 / 0.07))
    nn.init.normal_(clip.token_embedding.weight, std=0.02)
    nn.init.normal_(clip.positional_embedding, std=0.01)
    for parameter in (clip.visual.class_embedding, clip.visual.positional_embedding):
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for tower, projection in ((clip, clip.text_projection), (clip.visual, clip.visual.proj)):
        width, blocks = len(projection), tower.transformer.resblocks
        nn.init.normal_(projection, std=width**-0.5)
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * len(blocks)) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * len(blocks)) ** -0.5)


def make_optimizer(model: CLIP) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """100 steps of warm-up, then a cosine to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / args.steps, 1)))
    return args.lr * min((step + 1) / 100, cosine)


def draw_batch(rng: random.Random, n: int) -> list[int]:
    """Indices of n characters: each digit twice, and others without repetition."""
    return [*range(10), *range(10), *rng.sample(range(10, len(CHARACTERS)), n - 20)]


def new_model(vocabulary: int) -> CLIP:
    """An untrained tiny CLIP: 6 image layers, 4 text layers, 64 dimensions."""
    model = CLIP(64, SIZE, 8, 128, 6, TEXT_WIDTH, 4, vocab_size=vocabulary)
    initialise(model)
    return model


def train(args: argparse.Namespace, faces: Glyphs, captions: Captions, held_out: Tensor) -> CLIP:
    """Trains for args.steps steps. Resumes from args.checkpoint if it exists."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model, alike = new_model(len(captions.used)), lookalikes()
    optimizer = make_optimizer(model)
    first, start = restore(args.checkpoint, model, optimizer, rng), time.time()
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        strength = min(1.0, 0.15 + 0.85 * step / (0.4 * args.steps))
        characters = draw_batch(rng, args.batch_size)
        tokens, fits = captions.draw(characters, rng)
        images = distort(faces.draw(characters, rng), strength)
        ambiguous = (fits[:, characters] | alike[characters][:, characters]).T  # (image, caption)
        ambiguous.fill_diagonal_(False)
        image, text = model.encode_image(images), model.encode_text(tokens)
        loss = contrastive_loss(image, text, model.logit_scale, ambiguous)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            minutes = (time.time() - start) / 60
            print(f"step {step + 1:5}  {minutes:4.1f} min  loss {loss:.3f}", end="  ")
            print(report(model, captions, held_out), flush=True)
            store(args.checkpoint, model, optimizer, rng, step + 1)
    return model


def store(path: Path, model: CLIP, optimizer, rng: random.Random, step: int) -> None:
    """Saves all that training depends on. The old file stays until the new one is complete."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng.getstate(),
        "torch_rng": torch.get_rng_state(),
        "step": step,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def restore(path: Path, model: CLIP, optimizer, rng: random.Random) -> int:
    """Loads what `store` saved, if it exists, and returns the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    rng.setstate(state["rng"])
    torch.set_rng_state(state["torch_rng"])
    return state["step"]


# ---- Evaluation ----------------------------------------------------------------------------------
@torch.no_grad()
def classify(
    model: CLIP, images: Tensor, classnames: list[str], captions: Captions | None
) -> Tensor:
    """Class indices (n,) of images (n, 3, SIZE, SIZE), with "a photo of a {class}.".

    captions: those that the model is trained on; None if it has CLIP's full vocabulary.
    """
    tokens = tokenize([f"a photo of a {name}." for name in classnames])
    tokens = captions.renumber(tokens) if captions else tokens
    text = F.normalize(model.encode_text(tokens), dim=-1)
    return (model.encode_image(images) @ text.T).argmax(dim=-1)


@functools.cache
def read_folder(folder: str) -> tuple[Tensor, list[str]]:
    """All images (n, 3, SIZE, SIZE) of a data set, and the class name of each."""
    paths = sorted((HERE / folder).glob("*/*.png"))
    transform = test_transform(SIZE)
    images = torch.stack([transform(open_image(path)) for path in paths])
    return images, [path.parent.name.replace("_", " ") for path in paths]


def accuracy(model: CLIP, captions: Captions | None, folder: str, only: list[str] = ()) -> float:
    """Zero-shot accuracy in % on a data set, or on some of its classes, among themselves."""
    images, labels = read_folder(folder)
    classnames = sorted(only or set(labels))
    rows = [i for i, label in enumerate(labels) if label in classnames]
    found = classify(model, images[rows], classnames, captions)
    return 100 * sum(classnames[f] == labels[i] for f, i in zip(found, rows)) / len(rows)


def held_out_images() -> Tensor:
    """Each digit of each held-out font with 8 distortions, always the same: (n, 10, 3, S, S)."""
    faces = [glyphs.face_of(package) for package in glyphs.HELD_OUT]
    images = np.stack([glyphs.render(face, digit) for face in faces for digit in string.digits])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clean = torch.from_numpy(images).float().repeat(8, 1, 1) / 255
        return distort(clean, strength=1.0).unflatten(0, (-1, 10))


def report(model: CLIP, captions: Captions | None, held_out: Tensor) -> str:
    """Accuracies in %. In brackets: the first and the last five digits in alphabetical order."""
    found = classify(model, held_out.flatten(0, 1), DIGITS, captions).reshape(-1, 10)
    fonts = 100 * (found == torch.arange(10)).float().mean().item()
    parts = [f"held-out fonts {fonts:4.1f}"]
    for folder in ("digits", "scans"):
        halves = (), sorted(DIGITS)[:5], sorted(DIGITS)[5:]
        whole, base, novel = (accuracy(model, captions, folder, only) for only in halves)
        parts.append(f"{folder} {whole:4.1f} ({base:4.1f} / {novel:4.1f})")
    return "  ".join([*parts, f"letters {accuracy(model, captions, 'letters'):4.1f}"])


# ---- The script ----------------------------------------------------------------------------------
def save(model: CLIP, captions: Captions, path: Path) -> None:
    """Writes a CLIP state dict in fp16 with the full vocabulary, compressed.

    Rows of tokens that occur in no caption are zero.
    """
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    table = torch.zeros(49408, TEXT_WIDTH, dtype=torch.half)
    table[captions.used] = state["token_embedding.weight"]
    state |= {"token_embedding.weight": table, "input_resolution": torch.tensor(SIZE)}  # OpenAI's
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:  # torch.save does not compress them
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--evaluate", action="store_true", help="only measure the weights in --out")
    add("--steps", type=int, default=5000, help="training steps (default: 5000)")
    add("--batch-size", type=int, default=128, help="pairs per step (default: 128)")
    add("--lr", type=float, default=2e-3, help="highest learning rate (default: 0.002)")
    add("--seed", type=int, default=1, help="random seed (default: 1)")
    add("--report", type=int, default=250, help="steps between reports (default: 250)")
    path = {"type": Path, "metavar": "FILE"}
    add("--out", **path, default=HERE / "tiny-clip.pt", help="weights")
    add("--checkpoint", **path, default=HERE / "pretrain-checkpoint.pt", help="to resume from")
    add("--glyphs", **path, default=HERE / "pretrain-glyphs.npz", help="rendered characters")
    args = parser.parse_args()
    torch.set_num_threads(1)  # other numbers of threads round differently
    held_out = held_out_images()
    if not args.evaluate:
        if not args.glyphs.exists():
            images, owners = glyphs.render_packages(glyphs.TRAINED)
            np.savez(args.glyphs, glyphs=glyphs.drop_oddities(images), owners=owners)
        cache = np.load(args.glyphs)
        faces, captions = Glyphs(cache["glyphs"], cache["owners"].tolist()), Captions()
        save(train(args, faces, captions, held_out), captions, args.out)
    print(report(load(args.out), None, held_out))


if __name__ == "__main__":
    main()
