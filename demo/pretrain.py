"""Pre-trains the demo's tiny CLIP from scratch on drawn characters and their names.

    python demo/glyphs.py | xargs apt-get install -y --no-install-recommends    # on Debian 12
    python demo/pretrain.py             # an hour on one CPU core; goes on where it was interrupted
    python demo/pretrain.py --evaluate  # only measures demo/tiny-clip.pt

A pair is a character drawn in one of 578 faces, distorted, and a caption such as "a photo of a
capital letter b.". The loss is CLIP's: in a batch of n pairs each picture must pick its caption
among n, and each caption its picture (Radford et al., 2021, figure 3). Nothing is learned from
the demo's data: digits/, scans/ and letters/ are read to print zero-shot accuracy, beside that on
distorted digits of the fonts held out of training.
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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # clip_model.py and data.py lie beside this folder
from clip_model import CLIP, load, tokenize  # noqa: E402
from data import MEAN, STD, open_image, test_transform  # noqa: E402
from glyphs import (  # noqa: E402
    CHARACTERS, CYRILLIC, DIGITS, GREEK, HANDWRITTEN, HELD_OUT, TRAINED, drop_oddities, face_of,
    render, render_packages,
)

SIZES = dict(
    embed_dim=64, image_resolution=32, patch_size=8, vision_width=128, vision_layers=6,
    text_width=128, text_layers=4,
)

# --------------------------------------------------------------------------------------------------
# Captions

# Seen alone, the characters of a group can be the same picture: neither is wrong for the other.
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
    """The names of a character, each with the characters that it fits ("letter a" fits a and A)."""
    both = character.lower() + character.upper()
    if character.isdigit():
        word = DIGITS[int(character)]
        exact = [word] * 3 + [f"digit {word}", f"number {word}", f"numeral {word}"]
        return [(name, character) for name in exact + [f"figure {word}", f"digit {character}"]]
    official = unicodedata.name(character).lower().replace("latin ", "")
    if character in string.ascii_letters:
        case = "capital" if character.isupper() else "small"
        synonym = "uppercase" if character.isupper() else "lowercase"
        letter = character.lower()
        exact = [f"{case} letter {letter}"] * 3 + [f"{synonym} letter {letter}", f"{case} {letter}"]
        loose = [f"letter {letter}", f"letter {letter}", f"latin letter {letter}"]
        return [(name, character) for name in exact] + [(name, both) for name in loose]
    if character in GREEK + CYRILLIC:
        loose = official.replace("capital ", "").replace("small ", "")
        return [(official, character)] * 2 + [(loose, both), (loose.replace("letter ", ""), both)]
    return [(name, character) for name in (official, official, official.replace(" sign", ""))]


class Captions:
    """All captions as token ids, and which characters each name fits.

    Ids are renumbered, in CLIP's order, to those that occur: the vocabulary table has 200 rows in
    training instead of 49,408. `used` (V,) has the original ids.
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
        """CLIP's token ids -> rows of the small table. The end of text keeps the highest id."""
        return torch.searchsorted(self.used, tokens)

    def draw(self, characters: list[int], rng: random.Random) -> tuple[Tensor, Tensor]:
        """A random caption for each of n characters: token ids (n, 77) and fits (n, K)."""
        name = [rng.choice(self.of_character[c]) for c in characters]
        template = [rng.randrange(len(TEMPLATES)) for _ in characters]
        return self.tokens[name, template], self.fits[name]


def lookalikes() -> Tensor:
    """(K, K), true where two different characters may be the same picture."""
    alike = torch.zeros(len(CHARACTERS), len(CHARACTERS), dtype=torch.bool)
    for group in LOOKALIKES:
        members = [CHARACTERS.index(c) for c in group]
        alike[torch.tensor(members)[:, None], torch.tensor(members)] = True
    return alike.fill_diagonal_(False)


# --------------------------------------------------------------------------------------------------
# Distortion: a printed glyph becomes something that a hand and a scanner might have made


def distort(glyphs: Tensor, strength: float, size: int = 32) -> Tensor:
    """Glyphs (B, CANVAS, CANVAS) in 0..1 -> normalised pictures (B, 3, size, size).

    `strength` 0..1 scales every effect. At full strength from the start the loss does not leave
    the plateau of guessing for hundreds of steps.
    """
    x = stroke(glyphs[:, None], strength)
    x = F.grid_sample(x, warp(len(x), strength, size), mode="bilinear", align_corners=False)
    x = coarsen(x, strength, size)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (colour(x, strength) - mean) / std


def chance(n: int, p: float) -> Tensor:
    """(n, 1, 1, 1), true with probability p."""
    return torch.rand(n, 1, 1, 1) < p


def uniform(n: int, low: float, high: float, channels: int = 1) -> Tensor:
    """(n, channels, 1, 1), uniform between low and high."""
    return low + (high - low) * torch.rand(n, channels, 1, 1)


def stroke(x: Tensor, strength: float) -> Tensor:
    """Thicker or thinner pens: (B, 1, S, S) -> (B, 1, S, S)."""
    n = len(x)
    thick = F.max_pool2d(x, 3, 1, 1)
    x = torch.where(chance(n, 0.15 * strength), -F.max_pool2d(-x, 3, 1, 1), x)
    x = torch.where(chance(n, 0.6 * strength), thick, x)
    return torch.where(chance(n, 0.35 * strength), F.max_pool2d(x, 3, 1, 1), x)


def warp(n: int, strength: float, size: int) -> Tensor:
    """Sampling grids (n, size, size, 2): rotation, shear, scale, aspect, shift, smooth wobble."""
    turn, shear, aspect = strength * torch.randn(3, n) * torch.tensor([[0.16], [0.2], [0.12]])
    zoom = torch.exp(strength * (0.45 * torch.rand(n) - 0.15))  # > 1 draws larger
    cos, sin = turn.cos(), turn.sin()
    wide, high = torch.exp(aspect) / zoom, torch.exp(-aspect) / zoom
    shift = 0.07 * strength * torch.randn(2, n)
    affine = torch.stack([wide * cos, -sin + shear, shift[0], sin, high * cos, shift[1]], dim=1)
    grid = F.affine_grid(affine.reshape(n, 2, 3), [n, 1, size, size], align_corners=False)
    knots = torch.randn(n, 2, 4, 4) * uniform(n, 0.0, 0.16 * strength)
    wobble = F.interpolate(knots, (size, size), mode="bicubic", align_corners=False)
    return grid + wobble.permute(0, 2, 3, 1)


def coarsen(x: Tensor, strength: float, size: int) -> Tensor:
    """Blur, and low resolution (8 x 8 or 12 x 12 pixels and back): (B, 1, size, size) twice."""

    def through(side: int) -> Tensor:
        small = F.adaptive_avg_pool2d(x, side)
        big = F.interpolate(small, (size, size), mode="bicubic", antialias=True)
        return big.clamp(0, 1)

    n = len(x)
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    y = torch.where(chance(n, 0.4 * strength), blurred, x)
    y = torch.where(chance(n, 0.25), through(12), y)
    y = torch.where(chance(n, 0.45), through(8), y)
    return y / y.amax(dim=(1, 2, 3), keepdim=True).clamp(min=0.1)  # a scanner's automatic exposure


def colour(x: Tensor, strength: float) -> Tensor:
    """Ink (B, 1, S, S) -> colours (B, 3, S, S): light on dark mostly, some tinted or inverted."""
    n = len(x)
    x = x.clamp(min=1e-4) ** torch.exp(0.35 * strength * torch.randn(n, 1, 1, 1))  # contrast
    grey = uniform(n, 1 - 0.4 * strength, 1).expand(n, 3, 1, 1)
    tinted = chance(n, 0.3 * strength)
    ink = torch.where(tinted, uniform(n, 0.5, 1, 3), grey)
    paper = torch.where(tinted, uniform(n, 0, 0.4, 3), uniform(n, 0, 0.2 * strength))
    y = paper + (ink - paper) * x
    y = torch.where(chance(n, 0.15 * strength), 1 - y, y)
    return (y + strength * uniform(n, 0, 0.1) * torch.randn_like(y[:, :1])).clamp(0, 1)


# --------------------------------------------------------------------------------------------------
# Training


class Glyphs:
    """Draws pictures of characters from faces: half of them from the hand-drawn packages."""

    def __init__(self, glyphs: np.ndarray, owners: list[str]):
        self.glyphs = torch.from_numpy(glyphs)  # (faces, K, CANVAS, CANVAS) uint8
        has = glyphs.any(axis=(2, 3))  # (faces, K)
        hand = np.array([owner in HANDWRITTEN for owner in owners])
        self.faces = [  # character -> faces that have it: hand-drawn, printed
            [np.flatnonzero(column & group).tolist() for group in (hand, ~hand)] for column in has.T
        ]

    def draw(self, characters: list[int], rng: random.Random) -> Tensor:
        """(n, CANVAS, CANVAS) in 0..1."""
        faces = []
        for character in characters:
            hand, printed = self.faces[character]
            faces.append(rng.choice(hand if hand and rng.random() < 0.5 else printed))
        return self.glyphs[faces, characters].float() / 255


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, ambiguous: Tensor
) -> Tensor:
    """CLIP's symmetric loss of n pairs.

    image, text: features (n, D). logit_scale: log of the factor on cosines. ambiguous: (n, n),
    true where a picture and another pair's caption fit, too; they are not contrasted.
    """
    logits = logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    logits = logits.masked_fill(ambiguous, float("-inf"))  # row: picture, column: caption
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def initialise(clip: CLIP) -> None:
    """Gives a new model the random weights that OpenAI's code starts CLIP from.

    Deviations fall with a tower's width, those of residual branches also with its depth. Biases,
    layer norms and the patch convolution stay as torch made them.
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


def make_optimizer(model: CLIP, lr: float, steps: int):
    """AdamW with decay on matrices only; 100 warm-up steps, then a cosine to zero."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)

    def factor(step: int) -> float:
        return min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def draw_batch(rng: random.Random, n: int) -> list[int]:
    """n characters: the ten digits twice, the rest different ones of the others."""
    return [*range(10), *range(10), *rng.sample(range(10, len(CHARACTERS)), n - 20)]


def train(args: argparse.Namespace, glyphs: Glyphs, captions: Captions, held_out: Tensor) -> CLIP:
    """Trains for args.steps steps, going on from args.checkpoint if that file is there."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model, alike = CLIP(**SIZES, vocab_size=len(captions.used)), lookalikes()
    initialise(model)
    optimizer, schedule = make_optimizer(model, args.lr, args.steps)
    first, spent = restore(args.checkpoint, model, optimizer, schedule, rng)
    start = time.time() - spent
    for step in range(first, args.steps):
        strength = min(1.0, 0.15 + 0.85 * step / (0.4 * args.steps))
        characters = draw_batch(rng, args.batch_size)
        tokens, fits = captions.draw(characters, rng)
        images = distort(glyphs.draw(characters, rng), strength)
        ambiguous = (fits[:, characters] | alike[characters][:, characters]).T  # picture, caption
        ambiguous.fill_diagonal_(False)
        image, text = model.encode_image(images), model.encode_text(tokens)
        loss = contrastive_loss(image, text, model.logit_scale, ambiguous)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if (step + 1) % args.report == 0 or step + 1 == args.steps:
            seconds = time.time() - start
            line = f"loss {loss:.3f}  scale {model.logit_scale.exp():4.1f}"
            line = f"{line}  {report(model, captions, held_out)}"
            print(f"step {step + 1:5}  {seconds / 60:4.1f} min  {line}", flush=True)
            store(args.checkpoint, model, optimizer, schedule, rng, step + 1, seconds)
    return model


def store(path, model, optimizer, schedule, rng, step: int, seconds: float) -> None:
    """Writes everything that training depends on; first beside the file, so that none is cut."""
    state = dict(
        model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
        rng=rng.getstate(), torch_rng=torch.get_rng_state(), step=step, seconds=seconds,
    )
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def restore(path, model, optimizer, schedule, rng) -> tuple[int, float]:
    """Loads a checkpoint, if there is one. Returns the next step and the seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for part, name in ((model, "model"), (optimizer, "optimizer"), (schedule, "schedule")):
        part.load_state_dict(state[name])
    version, internal, gauss = state["rng"]
    rng.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch_rng"])
    return state["step"], state["seconds"]


# --------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def classify(
    model: CLIP, images: Tensor, classnames: list[str], captions: Captions | None
) -> Tensor:
    """Index of the nearest "a photo of a {class}." of each image (n, 3, 32, 32): (n,).

    captions: those that `model` is being trained on; None if it has CLIP's full vocabulary.
    """
    tokens = tokenize([f"a photo of a {name}." for name in classnames])
    tokens = captions.renumber(tokens) if captions else tokens
    text = F.normalize(model.encode_text(tokens), dim=-1)
    return (model.encode_image(images) @ text.T).argmax(dim=-1)


@functools.cache
def read_folder(folder: Path) -> tuple[Tensor, list[str]]:
    """Class sub-folders -> pictures (n, 3, 32, 32) as at test time, and n class names."""
    paths = sorted(folder.glob("*/*.png"))
    transform = test_transform(SIZES["image_resolution"])
    images = torch.stack([transform(open_image(path)) for path in paths])
    return images, [path.parent.name.replace("_", " ") for path in paths]


def accuracy(model: CLIP, captions: Captions | None, folder: str, only: list[str] = ()) -> float:
    """Zero-shot accuracy in % on a folder; `only`: of the pictures of some classes, among those."""
    images, labels = read_folder(HERE / folder)
    classnames = sorted(only or set(labels))
    rows = [i for i, label in enumerate(labels) if label in classnames]
    found = classify(model, images[rows], classnames, captions)
    return 100 * sum(classnames[f] == labels[i] for f, i in zip(found, rows)) / len(rows)


def held_out_pictures() -> Tensor:
    """Each digit of each held-out face in 8 distortions, always the same: (n, 10, 3, 32, 32)."""
    glyphs = np.stack([np.stack([render(face_of(p), c) for c in string.digits]) for p in HELD_OUT])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clean = torch.from_numpy(glyphs).float().flatten(0, 1).repeat(8, 1, 1) / 255
        return distort(clean, strength=1.0).unflatten(0, (-1, 10))


def report(model: CLIP, captions: Captions | None, held_out: Tensor) -> str:
    """Accuracies in %; in brackets, of the first and the last five digits of the alphabet."""
    found = classify(model, held_out.flatten(0, 1), DIGITS, captions).reshape(-1, 10)
    fonts = 100 * (found == torch.arange(10)).float().mean().item()
    parts = [f"held-out fonts {fonts:4.1f}"]
    for folder in ("digits", "scans"):
        halves = (), sorted(DIGITS)[:5], sorted(DIGITS)[5:]
        whole, base, novel = (accuracy(model, captions, folder, only) for only in halves)
        parts.append(f"{folder} {whole:4.1f} ({base:4.1f} / {novel:4.1f})")
    return "  ".join([*parts, f"letters {accuracy(model, captions, 'letters'):4.1f}"])


# --------------------------------------------------------------------------------------------------


def save(model: CLIP, captions: Captions, path: Path) -> None:
    """Writes an ordinary CLIP state dict: fp16, full vocabulary, deflated.

    Rows of tokens that no caption has are zero: unknown words say nothing, and take no room.
    """
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    table = torch.zeros(49408, SIZES["text_width"], dtype=torch.half)
    table[captions.used] = state["token_embedding.weight"]
    state |= {"token_embedding.weight": table, "input_resolution": torch.tensor(32)}  # as OpenAI's
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in entries:  # torch.save stores them as they are
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=int, default=250, help="steps between reports")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "pretrain-checkpoint.pt")
    parser.add_argument("--glyphs", type=Path, default=HERE / "pretrain-glyphs.npz")
    parser.add_argument("--out", type=Path, default=HERE / "tiny-clip.pt")
    parser.add_argument("--evaluate", action="store_true", help="only measure the file --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    held_out = held_out_pictures()
    if args.evaluate:
        print(report(load(args.out), None, held_out))
        return
    if not args.glyphs.exists():
        glyphs, owners = render_packages(TRAINED)
        np.savez(args.glyphs, glyphs=drop_oddities(glyphs), owners=owners)
    cache = np.load(args.glyphs)
    owners = cache["owners"].tolist()
    print(f"{len(owners)} faces, {len(CHARACTERS)} characters, {len(TEMPLATES)} templates")
    captions = Captions()
    model = train(args, Glyphs(cache["glyphs"], owners), captions, held_out)
    save(model, captions, args.out)
    print(f"{args.out}, {args.out.stat().st_size / 1e6:.2f} MB:")
    print(report(load(args.out), None, held_out))


if __name__ == "__main__":
    main()
