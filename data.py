"""Data sets as lists of (image path, label): loading, few-shot sampling, base/novel split, batches.

    dataset = load_dataset("eurosat")                    # one of BENCHMARKS, or any class folders
    source = few_shot_source(dataset, shots=16, seed=1)  # 16 images of each base class
    loader = train_loader(source.train, train_transform(224), batch_size=4, seed=1)
    for epoch in range(40):
        loader.batch_sampler.set_epoch(epoch)
        for images, labels in loader: ...                # (4, 3, 224, 224), (4,)

Layouts, splits, class names and sampling are those of CoOp (Zhou et al., 2022), so that numbers
can be compared with CoOp, CoCoOp, MaPLe, PromptSRC and Prompt-OT. It can be copied alone.
"""

import collections
import itertools
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, default_collate, default_convert
from torchvision import transforms as T
from torchvision.transforms import functional as TF

Items = list[tuple[str, int]]  # (path of an image, label)
Splits = dict[str, Items]  # one of PARTS -> its items
PathLike = str | os.PathLike
PARTS = ("train", "val", "test")
TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Dataset:
    """What `load_dataset` returns. A data set for evaluation only has an empty `train`."""

    name: str
    classnames: list[str]  # label -> name, "_" already " "
    train: Items = field(repr=False)  # long
    val: Items = field(repr=False)
    test: Items = field(repr=False)
    template: str = TEMPLATE  # for zero-shot classification
    notes: tuple[str, ...] = ()  # what was read as what, and how far numbers can be compared
    root: str = ""  # the folder, as `load_dataset` was given it


def load_dataset(
    root: PathLike, classnames: PathLike | None = None, template: str | None = None
) -> Dataset:
    """The data set in a folder.

    root: one of BENCHMARKS in CoOp's layout, known by its files or its name; or train/, test/ and
    perhaps val/, each with class folders; or class folders, which are split 50 / 20 / 30 %. All
    pictures below a class folder, at any depth, are of that class.
    classnames: a text file for classes not named as their folder: on each line the folder, white
    space, the name ("_" read as " "). ImageNet's is looked for in the folder and in ../imagenet.
    template: for zero-shot classification, with {} for the name; by default the literature's.
    Raises OSError or ValueError, which say what is wrong and what is expected.
    """
    if template is not None and re.fullmatch(r"[^{}]*{}[^{}]*", template) is None:
        raise ValueError(f"the template {template!r} needs one {{}}, where the class name goes")
    folder = Path(os.path.abspath(os.path.expanduser(root)))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {root}")
    b = _find(folder)
    try:
        classes, splits, notes = _read(b, folder)
        names = _names(b, folder, classes, classnames)
        for part, items in splits.items():
            lacking = [names[i] for i in set(range(len(names))) - {label for _, label in items}]
            if lacking and part == "train":
                raise ValueError(f"no train image of class {lacking[0]!r}")
            if lacking and part == "test":
                notes.append(f"classes without a test image: {len(lacking)}, as {lacking[0]!r}")
    except (ValueError, FileNotFoundError, RecursionError) as e:  # of folders a thousand deep
        raise ValueError(f"{root}: {e}; expected is {_expected(b)}") from None
    parts = [splits.get(part, []) for part in PARTS]
    template = template or b.template
    return Dataset(b.name, names, *parts, template, tuple(notes), os.fspath(root))


# ---- Readers: a folder -> its classes, as they are called there; its splits; notes for the user --

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # others may start programs (EPS)
EXTENSIONS = tuple(e for e, name in Image.registered_extensions().items() if name in FORMATS)


def _visible(folder: PathLike) -> list[os.DirEntry]:
    """What is in a folder, by name, without what systems leave there: ._a.jpg, __MACOSX, .git."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith((".", "__"))]
    return sorted(visible, key=lambda entry: entry.name)


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def files_below(folder: PathLike) -> tuple[list[str], list[str]]:
    """Pictures below a folder, at any depth, by extension; and all other files.

    Links to folders, which may lead in a circle, are not followed.
    """
    pictures, others = [], []
    for entry in _visible(folder):
        if entry.is_dir(follow_symlinks=False):
            for found, more in zip((pictures, others), files_below(entry.path)):
                found += more
        else:
            is_picture = entry.name.lower().endswith(EXTENSIONS)
            (pictures if is_picture else others).append(entry.path)
    return pictures, others


def _read_classes(folder: Path, classes: list[str]) -> tuple[Items, list[str]]:
    """The pictures in class folders, a label being the folder's place in `classes`; and notes."""
    if not classes:
        raise FileNotFoundError(f"no class folders in {folder}")
    items, left_out, deep = [], [], 0
    for label, name in enumerate(classes):
        pictures, others = files_below(folder / name)
        if not pictures:
            raise FileNotFoundError(f"no images in {folder / name}")
        items += [(path, label) for path in pictures]
        left_out += others
        deep += sum(os.path.dirname(path) != str(folder / name) for path in pictures)
    notes = [f"files left out, no pictures by their names: {len(left_out)}, as {left_out[:1]}"]
    nested = [f"pictures in sub-folders, of the class of their top folder: {deep}"]
    return items, notes * bool(left_out) + nested * bool(deep)


def _read_folders(folder: Path) -> tuple[list[str], Splits, list[str]]:
    """A folder of class folders, or of train/, val/ and test/ with the same class folders each."""
    names = _folders(folder)
    if names and set(names) <= {b.folder for b in BENCHMARKS}:
        raise ValueError(f"{folder} holds data sets, name one of them: {', '.join(names)}")
    parts = [part for part in PARTS if part in names and _folders(folder / part)]
    if not parts:
        items, notes = _read_classes(folder, names)
        notes.append("split into train, val, test: 50 / 20 / 30 % of each class")
        return names, _split(items, names), notes
    test = "test" if "test" in parts else "val"  # as everybody does with ImageNet
    classes, splits = _folders(folder / test), {}
    notes = [f"folder left out: {folder / n}" for n in names if n not in parts]
    for part in parts:
        if odd := set(classes) ^ set(_folders(folder / part)):
            raise ValueError(f"{part}/ and {test}/ have different classes: {min(odd)!r} is in one")
        items, more = _read_classes(folder / part, classes)
        splits["test" if part == test else part] = items
        notes += more
    return classes, splits, notes


def _split(items: Items, classes: list[str]) -> Splits:
    """50 / 20 / 30 % of each class for train / val / test, rounded as CoOp does.

    Shuffled, since neighbours by name are often alike (frames of a video); the seed is the class's
    name, so that other classes do not matter. Train comes first if images are few, then test.
    """
    splits: Splits = {part: [] for part in PARTS}
    for label, of_class in itertools.groupby(items, key=lambda item: item[1]):
        of_class = list(of_class)
        random.Random(classes[label]).shuffle(of_class)
        n = len(of_class)
        train = max(1, round(0.5 * n))
        val = max(0, min(round(0.2 * n), n - train - 1))
        splits["train"] += of_class[:train]
        splits["val"] += of_class[train : train + val]
        splits["test"] += of_class[train + val :]
    return splits


def _read_split_file(file: Path, images: Path) -> tuple[list[str], Splits]:
    """split_zhou_*.json: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    names: dict[int, str] = {}
    splits: Splits = {part: [] for part in PARTS}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for part, (path, label, name) in ((p, row) for p in PARTS for row in content[p]):
            splits[part].append((os.path.join(images, path), int(label)))
            if names.setdefault(int(label), str(name)) != name:
                raise ValueError(f"label {label} has two names, {names[label]!r} and {name!r}")
        if set(names) != set(range(len(names))):
            raise ValueError(f"labels are not 0, 1, 2, ..., but {str(sorted(names))[:70]}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{file} is not a split file ({type(e).__name__}: {e})") from None
    return [names[label] for label in range(len(names))], splits


def _read_aircraft(folder: Path, images: Path) -> tuple[list[str], Splits]:
    """variants.txt: a name a line; images_variant_*.txt: "id name", the image being id.jpg."""
    classes = _lines(folder / "variants.txt")
    splits: Splits = {part: [] for part in PARTS}
    for part, items in splits.items():
        for line in _lines(folder / f"images_variant_{part}.txt"):
            image, _, name = line.partition(" ")
            if name not in classes:
                raise ValueError(f"{part}: {line!r} does not end with a name of variants.txt")
            items.append((os.path.join(images, f"{image}.jpg"), classes.index(name)))
    return classes, splits


def _lines(file: PathLike) -> list[str]:
    """The lines of a text file that are not empty (and without the mark that editors put first)."""
    if not os.path.isfile(file):  # a pipe or a device might never end
        raise FileNotFoundError(f"no file {file}")
    lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


# ---- The benchmark data sets, in the layout of CoOp ----------------------------------------------

@dataclass(frozen=True)
class Benchmark:
    """What is special about a data set."""

    name: str
    folder: str
    images: str  # the image folder in it
    template: str = TEMPLATE
    files: tuple[str, ...] = ()  # beside the images, if not CoOp's split file
    marks: tuple[str, ...] = ()  # what its folder holds and no other's, beside the split file
    fetch: tuple[str, str] = ()  # torchvision's class, and where it puts this folder's content
    names: dict[str, str] = field(default_factory=dict)  # class folder -> name, if another

    @property
    def split_file(self) -> str:
        """The name of CoOp's split file."""
        return f"split_zhou_{self.name}.json"


DATASETS_MD = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
IMAGENET = ("classnames.txt",)  # beside the images of ImageNet and of its variants
AIRCRAFT = ("variants.txt", *(f"images_variant_{part}.txt" for part in PARTS))
WNID = "n" + 8 * "[0-9]"  # a WordNet id, as a glob
BENCHMARKS = [
    Benchmark("ImageNet", "imagenet", "images", TEMPLATE, IMAGENET, (f"images/train/{WNID}",)),
    Benchmark("Caltech101", "caltech-101", "101_ObjectCategories", marks=("101_ObjectCategories",)),
    Benchmark("OxfordPets", "oxford_pets", "images", "a photo of a {}, a type of pet.",
              fetch=("OxfordIIITPet", "oxford-iiit-pet")),
    Benchmark("StanfordCars", "stanford_cars", "."),
    Benchmark("OxfordFlowers", "oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    Benchmark("Food101", "food-101", "images", "a photo of {}, a type of food.",
              fetch=("Food101", "food-101")),
    Benchmark("FGVCAircraft", "fgvc_aircraft", "images", "a photo of a {}, a type of aircraft.",
              AIRCRAFT, ("variants.txt",), ("FGVCAircraft", "fgvc-aircraft-2013b/data")),
    Benchmark("SUN397", "sun397", "SUN397"),
    Benchmark("DescribableTextures", "dtd", "images", "{} texture.", fetch=("DTD", "dtd/dtd")),
    Benchmark("EuroSAT", "eurosat", "2750", "a centered satellite photo of {}.",
              marks=("2750", "AnnualCrop"), fetch=("EuroSAT", "eurosat"), names={
                  "AnnualCrop": "Annual Crop Land", "Highway": "Highway or Road",
                  "HerbaceousVegetation": "Herbaceous Vegetation Land",
                  "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
                  "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
                  "SeaLake": "Sea or Lake"}),
    Benchmark("UCF101", "ucf101", "UCF-101-midframes", "a photo of a person doing {}.",
              marks=("UCF-101-midframes",)),
    Benchmark("ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val", TEMPLATE,
              IMAGENET, ("imagenetv2-matched-frequency-format-val",)),
    Benchmark("ImageNet-Sketch", "imagenet-sketch", "images", TEMPLATE, IMAGENET,
              (f"images/{WNID}",)),
    Benchmark("ImageNet-A", "imagenet-adversarial", "imagenet-a", TEMPLATE, IMAGENET,
              ("imagenet-a",)),
    Benchmark("ImageNet-R", "imagenet-rendition", "imagenet-r", TEMPLATE, IMAGENET,
              ("imagenet-r",)),
]


def _find(folder: Path) -> Benchmark:
    """The benchmark in a folder, by what it holds or else its name; any other is one of its own."""
    for b in BENCHMARKS:
        if any(any(folder.glob(mark)) for mark in (b.split_file, *b.marks)):
            return b
    return _by_name(folder.name) or Benchmark(folder.name, folder.name, ".")


def _by_name(name: str) -> Benchmark | None:
    """The benchmark of that name, or whose folder has it: "Caltech101", "caltech-101"."""
    return next((b for b in BENCHMARKS if name.lower() in (b.name.lower(), b.folder)), None)


def _expected(b: Benchmark) -> str:
    """What `load_dataset` reads, for error messages."""
    if b not in BENCHMARKS:
        return "folder/class name/image.jpg, or folder/[train and test]/class name/image.jpg"
    content = ", ".join((f"{b.images}/...", *(b.files or [b.split_file])))
    return f"{b.folder}/ with {content}, as in {DATASETS_MD}"


def _read(b: Benchmark, folder: Path) -> tuple[list[str], Splits, list[str]]:
    """Classes, splits and notes of a data set, by the reader for what is in its folder."""
    images = folder / b.images
    if b.files == AIRCRAFT or os.path.exists(folder / b.split_file):
        classes, splits = (_read_aircraft(folder, images) if b.files == AIRCRAFT else
                           _read_split_file(folder / b.split_file, images))
        paths = [path for items in splits.values() for path, _ in items]
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise FileNotFoundError(f"{len(missing)} images are not there, as {missing[0]}")
        return classes, splits, []
    images = images if images.is_dir() else folder
    if b.files == IMAGENET and b.name != "ImageNet":  # its variants have a test set only
        classes = _folders(images)
        items, notes = _read_classes(images, classes)
        return classes, {"test": items}, notes
    classes, splits, notes = _read_folders(images)
    if b in BENCHMARKS and b.name != "ImageNet":
        notes.append(f"no {b.split_file}: not the literature's split, do not compare the numbers")
    return classes, splits, notes


def _names(b: Benchmark, folder: Path, classes: list[str], file: PathLike | None) -> list[str]:
    """What the classes are called, by the file that is given or ImageNet's own."""
    of_imagenet, names = b.files == IMAGENET, b.names
    if of_imagenet and file is None:
        places = [f / "classnames.txt" for f in (folder, folder.parent / "imagenet")]
        file = next((place for place in places if place.is_file()), places[0])
    if file is not None:
        pairs = [line.split(maxsplit=1) for line in _lines(file)]
        names = names | {of: " ".join(name) for of, *name in pairs}
        if b.name == "ImageNetV2":
            names = {str(i): name for i, name in enumerate(names.values())}
        unknown = [name for name in classes if name not in names]
        if unknown and (of_imagenet or unknown == classes):
            raise ValueError(f"{file} has no name for the class folder {unknown[0]!r}")
    names = [" ".join(names.get(name, name).replace("_", " ").split()) for name in classes]
    if len(names) < 2 or "" in names:
        raise ValueError(f"two classes with names are needed at least, not {names}")
    counts = collections.Counter(name.lower() for name in names)  # CLIP does not see case
    twice = [name for name, count in counts.items() if count > 1]
    if twice and not of_imagenet:  # CLIP's list has "missile" and "sunglasses" twice
        raise ValueError(f"two classes have the name {twice[0]!r}")
    return names


def download(name: str, root: PathLike) -> str:
    """Fetches a benchmark with torchvision into root/<its folder>, which is returned.

    Where CoOp has a split file it must be added by hand. Raises ValueError for a data set that
    torchvision cannot fetch, OSError if it fails.
    """
    b = _by_name(name)
    if b is None or not b.fetch:
        fetchable = ", ".join(b.name for b in BENCHMARKS if b.fetch)
        raise ValueError(f"{name} cannot be downloaded, only {fetchable}; see {DATASETS_MD}")
    root = Path(os.path.expanduser(root))
    target = root / b.folder
    if (target / b.images).is_dir():
        return str(target)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="download-") as staging:
        try:
            getattr(torchvision.datasets, b.fetch[0])(staging, download=True)
        except Exception as e:  # no network, wrong checksum, cut off: each has its own class
            raise OSError(f"cannot download {b.name} with torchvision ({e})") from None
        target.mkdir(exist_ok=True)
        for part in (*b.files, b.images):  # images last: once they are there, all is
            shutil.move(Path(staging, b.fetch[1], part), target / part)
    return str(target)


# ---- Protocol: sampling, base and novel classes, what is tested ----------------------------------

def few_shot(items: Items, shots: int, rng: random.Random) -> Items:
    """`shots` random items of each class, all of a class that has fewer; shots = 0: all items.

    With rng = random.Random(seed), and train sampled before val (min(shots, 4) of each class),
    these are CoOp's shots for that seed: labels come in order of first appearance.
    """
    if shots < 1:
        return list(items)
    by_label = collections.defaultdict(list)
    for item in items:
        by_label[item[1]].append(item)
    chosen = (rng.sample(of, shots) if len(of) >= shots else of for of in by_label.values())
    return list(itertools.chain(*chosen))


def few_shot_source(dataset: Dataset, shots: int, seed: int, classes: str = "base") -> Dataset:
    """`shots` training images a class, of the "base" or "all" classes; in CoOp's order: the shots
    of all classes are drawn first, and then reduced to the base."""
    if not dataset.train:
        raise ValueError(f"{dataset.root} has no training images; --eval-data can test on it")
    source = replace(dataset, train=few_shot(dataset.train, shots, random.Random(seed)))
    return base_novel(source)[0] if classes == "base" else source


def base_novel(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """The first half of the classes (the larger, if odd) and the rest, each relabelled from 0."""
    n = len(dataset.classnames)
    middle = math.ceil(n / 2)
    return _classes(dataset, 0, middle, "base"), _classes(dataset, middle, n, "novel")


def _classes(dataset: Dataset, start: int, stop: int, name: str) -> Dataset:
    classnames, notes = dataset.classnames[start:stop], dataset.notes
    if len(classnames) == 1:
        notes += (f"one {name} class only, {classnames[0]!r}: always 100 %",)
    parts = {part: [(path, y - start) for path, y in getattr(dataset, part) if start <= y < stop]
             for part in PARTS}
    name = f"{dataset.name} {name}"
    return replace(dataset, name=name, classnames=classnames, notes=notes, **parts)


def evaluation_targets(
    dataset: Dataset, classes: list[str], others: Iterable[Dataset] = ()
) -> dict[str, dict[str, Dataset]]:
    """What prompts tuned on "base" or "all" `classes` are tested on, by name.

    {"base": {"base": ..., "novel": ...}, "all": {dataset.name: dataset}}; `others` belong to the
    last of the two. A data set whose name is taken goes by its folder.
    """
    targets: dict[str, dict[str, Dataset]] = {}
    if "base" in classes:
        targets["base"] = dict(zip(("base", "novel"), base_novel(dataset)))
        for name, half in targets["base"].items():
            if not half.test:
                raise ValueError(f"no test image of a {name} class")
    if "all" in classes:
        targets["all"], others = {}, [dataset, *others]
    last = list(targets.values())[-1]
    for other in others:
        taken = other.name in ("base", "novel", *last)
        last[other.root if taken else other.name] = other
    return targets


# ---- Images --------------------------------------------------------------------------------------

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
BICUBIC = T.InterpolationMode.BICUBIC
AUGMENTS = ("field", "gentle", "none")
Transform = Callable[[Image.Image], Tensor]


def train_transform(size: int, augment: str = "field", mean=MEAN, std=STD) -> Transform:
    """RGB image -> (3, size, size), by one of AUGMENTS.

    "field": random crop of 8 to 100 % of the area and random flip, as everywhere in the field;
    "gentle": 60 to 100 % and no flip, for digits and letters; "none": as `test_transform`.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"augment is one of {', '.join(AUGMENTS)}, not {augment!r}")
    if augment == "none":
        return test_transform(size, mean, std)
    smallest, flips = (0.08, 0.5) if augment == "field" else (0.6, 0.0)
    crop = T.RandomResizedCrop(size, scale=(smallest, 1.0), interpolation=BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(flips), T.ToTensor(), T.Normalize(mean, std)])


def test_transform(size: int, mean=MEAN, std=STD) -> Transform:
    """The smaller edge to `size`, the centre cut out: RGB image -> (3, size, size)."""
    resize = T.Resize(size, interpolation=BICUBIC)
    return T.Compose([resize, T.CenterCrop(size), T.ToTensor(), T.Normalize(mean, std)])


class ImageError(ValueError):
    """An image that cannot be read; the message names the file."""


def open_image(path: str) -> Image.Image:
    """The decoded image as RGB, turned as its EXIF says; of an animation, the first frame.

    What is transparent is shown on white. Grey values of 16 or 32 bits span the smallest of the
    ranges 0..1, 0..255 and 0..65535 that holds them, or else 0 to the largest of them.
    Raises ImageError for a damaged file, a format not in FORMATS, over 179 million pixels.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("no file")  # to open a pipe would wait for ever
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) > 100 * min(image.size):  # will grow when the shorter becomes 224
                raise ValueError(f"{image.width} x {image.height} pixels")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":
                image = _eight_bits(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as e:  # OSError, SyntaxError, DecompressionBombError, ...: as the format likes
        raise ImageError(f"cannot read the image {path} ({type(e).__name__}: {e})") from None


def check_images(paths: Iterable[str]) -> Iterator[str]:
    """Decodes images before hours of work depend on them; yields each path. Raises ImageError."""
    with ThreadPoolExecutor() as pool:  # decoders free the GIL
        for path, _ in zip(paths, pool.map(lambda path: open_image(path).size, paths)):
            yield path


def find_images(paths: Iterable[PathLike]) -> list[str]:
    """Images as they are, and all that are below folders. ValueError if there are none."""
    found = (files_below(path)[0] if os.path.isdir(path) else [os.fspath(path)] for path in paths)
    images = list(itertools.chain(*found))
    if not images:
        raise ValueError(f"no images in {', '.join(map(str, paths))}")
    return images


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of mode I;16, I or F, which Pillow would clip at 255."""
    values = TF.pil_to_tensor(image.convert("F")).nan_to_num(0, 0, 0)  # (1, H, W)
    largest = values.max().item()
    white = next((limit for limit in (1, 255, 65535) if largest <= limit), largest)
    return TF.to_pil_image((values * (255 / white)).round().clamp(0, 255).byte())


# ---- Batches -------------------------------------------------------------------------------------

class Images(torch.utils.data.Dataset):
    """Items as pairs (transformed image, label); an index is a pair (epoch, number of the item).

    What the transform draws from torch's generator depends on (seed, epoch, number) alone: neither
    the number of workers nor the batch, the process or an interruption changes it.
    """

    def __init__(self, items: Items, transform: Transform, seed: int = 0, skip: bool = False):
        self.items, self.transform, self.seed, self.skip = items, transform, seed, skip

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        path, label = self.items[index[1]]
        with torch.random.fork_rng(devices=[]):  # leaves the process's own generator alone
            torch.default_generator.manual_seed(_seed_of(self.seed, *index))
            return self.transform(open_image(path)), label

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[Tensor] | ImageError | None:
        """A batch, or an ImageError for ImageLoader: DataLoader would put it in a traceback.

        With `skip`, a batch of the images that can be read, None if there are none.
        """
        pairs = []
        for index in indices:
            try:
                pairs.append(self[index])
            except ImageError as error:
                if not self.skip:
                    return error
        return default_collate(pairs) if pairs else None


def _seed_of(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine."""
    return random.Random(repr(numbers)).getrandbits(63)


class EpochBatches(Sampler):
    """The batches of an epoch, a permutation, as lists of (epoch, number of an item).

    The last incomplete batch is dropped if there is a full one. Of `world` processes each gets
    its contiguous share of every batch; together they see what one process sees alone.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.n, self.batch_size, self.seed, self.epoch = n, min(n, batch_size), seed, 0
        share, rest = divmod(self.batch_size, world)
        if rest or not share:
            raise ValueError(f"batches of {self.batch_size} images cannot be shared by {world} "
                             "processes: the batch size must be a multiple of their number")
        self.own = slice(rank * share, (rank + 1) * share)

    def set_epoch(self, epoch: int) -> None:
        """To be called before the loader is iterated: each epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_seed_of(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        for batch in order.split(self.batch_size)[: len(self)]:
            yield [(self.epoch, i) for i in batch[self.own].tolist()]


class ImageLoader(DataLoader):
    """A DataLoader that raises ImageError as it is, and whose workers live on between epochs."""

    def __init__(self, images: Images, batches: Sampler, workers: int):
        workers = min(workers, len(batches))  # each of them computes with one thread
        super().__init__(
            images, batch_sampler=batches, collate_fn=default_convert, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the process's own
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in super().__iter__():
            if isinstance(batch, ImageError):
                raise batch
            if batch is not None:
                yield batch


def train_loader(
    items: Items, transform: Transform, batch_size: int, seed: int, workers: int = 0,
    rank: int = 0, world: int = 1,
) -> DataLoader:
    """An epoch of shuffled batches (B, 3, H, W), (B,), each time that it is iterated.

    Call `loader.batch_sampler.set_epoch(epoch)` before. Raises ValueError if a batch (all items
    where they are fewer) cannot be shared equally by `world` processes.
    """
    batches = EpochBatches(len(items), batch_size, seed, rank, world)
    return ImageLoader(Images(items, transform, seed), batches, workers)


def test_loader(
    items: Items, transform: Transform, batch_size: int, workers: int = 0, skip: bool = False
) -> DataLoader:
    """The items in order, in batches (B, 3, H, W), (B,), of which the last may be smaller.

    skip: leave out images that cannot be read.
    """
    batches = BatchSampler([(0, i) for i in range(len(items))], batch_size, drop_last=False)
    return ImageLoader(Images(items, transform, skip=skip), batches, workers)
