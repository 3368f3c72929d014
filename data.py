"""Data sets as lists of (image path, label): loading, few-shot sampling, base/novel split, batches.

    dataset = load_dataset("eurosat")                    # one of BENCHMARKS, or any class folders
    source = few_shot_source(dataset, shots=16, seed=1)  # 16 images of each base class
    loader = train_loader(source.train, train_transform(224), batch_size=4, seed=1)
    for epoch in range(40):
        loader.batch_sampler.set_epoch(epoch)
        for images, labels in loader: ...                # (4, 3, 224, 224), (4,)

Layouts, splits, class names and sampling are those of CoOp (Zhou et al., 2022), so that numbers
can be compared with CoOp, CoCoOp, MaPLe, PromptSRC and Prompt-OT. Nothing here knows of a model:
copy this file alone.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
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
    classnames: a text file, "folder name" on each line, for classes not named as their folder
    ("_" read as " "). ImageNet's classnames.txt is looked for in the folder and in ../imagenet.
    template: for zero-shot classification, {} being the class; None: the data set's own.
    Raises OSError or ValueError, which say what is wrong and what is expected.
    """
    if template is not None and not re.fullmatch(r"[^{}]*\{\}[^{}]*", template):
        raise ValueError(f"the template {template!r} needs one {{}}, where the class name goes")
    folder = Path(os.path.abspath(os.path.expanduser(root)))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {root}")
    benchmark, home = _find(folder)
    try:
        classes, splits, notes = _read(benchmark, home)
        names = _names(benchmark, home, classnames, classes)
        notes += _check(benchmark, names, splits)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}; expected is {_expected(benchmark)}") from None
    except ValueError as e:
        raise ValueError(f"{root}: {e}") from None
    items = [splits.get(part, []) for part in PARTS]
    template = template or benchmark.template
    return Dataset(benchmark.name, names, *items, template, tuple(notes), os.fspath(root))


def _check(b: "Benchmark", classnames: list[str], splits: Splits) -> list[str]:
    """Whether all classes have a name and images; what is not ideal is returned as notes."""
    if len(classnames) < 2 or "" in classnames:
        raise ValueError(f"two classes with names are needed at least, not {classnames}")
    counts = collections.Counter(name.lower() for name in classnames)  # CLIP does not see case
    twice = [name for name, count in counts.items() if count > 1]
    if twice and b.files != CLASSNAMES:
        raise ValueError(f"two classes have the name {twice[0]!r}")
    # "missile" and "sunglasses" are twice in CLIP's list for ImageNet, and in published numbers.
    notes = [f"names that two classes share: {', '.join(twice)}"] if twice else []
    for part in ("train", "test"):
        lacking = set(range(len(classnames))) - {label for _, label in splits.get(part, [])}
        if lacking and part == "train" and splits.get("train"):
            raise ValueError(f"no train image of class {classnames[min(lacking)]!r}")
        if lacking and part == "test":
            first = classnames[min(lacking)]
            notes.append(f"classes without a test image: {len(lacking)}, {first!r} the first")
    return notes


# --------------------------------------------------------------------------------------------------
# Readers: a folder -> its classes, by folder's or file's names, its splits, and notes for the user

FORMATS = {  # all that is decoded: others may start programs (EPS: Ghostscript)
    "JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "BMP": (".bmp",), "GIF": (".gif",),
    "WEBP": (".webp",), "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm"),
}
EXTENSIONS = tuple(itertools.chain(*FORMATS.values()))
PART_OF = {"train": "train", "training": "train", "val": "val", "valid": "val",
           "validation": "val", "test": "test", "testing": "test"}


def _visible(folder: PathLike) -> list[os.DirEntry]:
    """What is in a folder, by name, without what systems leave there: ._a.jpg, __MACOSX, .git."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith((".", "__"))]
    return sorted(visible, key=lambda entry: entry.name)


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def find_pictures(folder: PathLike) -> tuple[list[str], list[str]]:
    """All pictures below a folder, by the ends of their names, and all other files.

    Links are followed, but to no folder that was read already or that `folder` lies in.
    """
    pictures, others, folders = [], [], [os.fspath(folder)]
    seen = set(map(str, Path(os.path.realpath(folder)).parents))
    for here in folders:  # which grows on the way
        real = os.path.realpath(here)
        for entry in _visible(here) if real not in seen else []:
            if entry.is_dir():
                folders.append(entry.path)
            else:
                is_picture = entry.name.lower().endswith(EXTENSIONS) and entry.is_file()
                (pictures if is_picture else others).append(entry.path)
        seen.add(real)
    return pictures, others


def _read_classes(folder: Path, classes: list[str]) -> tuple[Items, list[str]]:
    """The pictures in class folders, whose places in `classes` are the labels; notes."""
    if not classes:
        raise FileNotFoundError(f"no class folders in {folder}")
    items, deep = [], []
    left_out = [e.path for e in _visible(folder) if e.name.lower().endswith(EXTENSIONS)]
    for label, name in enumerate(classes):
        here = os.path.join(folder, name)
        pictures, others = find_pictures(here)
        if not pictures:
            raise FileNotFoundError(f"no images in {here}")
        items += [(path, label) for path in pictures]
        deep += [path for path in pictures if os.path.dirname(path) != here]
        left_out += others
    notes = {"files left out, no pictures of a class": left_out,
             "pictures in sub-folders, which count as their class folder's": deep}
    return items, [f"{note}: {len(of)}, {of[0]} ..." for note, of in notes.items() if of]


def _read_folders(folder: Path, no_classes: Iterable[str] = ()) -> tuple[list, Splits, list[str]]:
    """A folder of class folders, or of train/, val/ and test/ with the same class folders each."""
    names = [name for name in _folders(folder) if name not in no_classes]
    parts = {PART_OF[name.lower()]: name for name in names
             if name.lower() in PART_OF and _folders(folder / name)}
    if not names or len(parts) < 2 and not PART_OF.keys() >= {name.lower() for name in names}:
        items, notes = _read_classes(folder, names)  # where a class may be called "train"
        notes.append("split into train, val, test: 50 / 20 / 30 % of each class")
        return names, _split(items, names), notes
    notes = [f"folder left out: {folder / n}" for n in names if n not in parts.values()]
    if "test" not in parts and "val" in parts:  # as everybody does with ImageNet
        parts["test"] = parts.pop("val")
        notes.append(f"no test/ in {folder}: {parts['test']}/ is the test set")
    if "test" not in parts:
        raise FileNotFoundError(f"{folder} has neither test/ nor val/ with class folders")
    classes, splits = _folders(folder / parts["test"]), {}
    for part, name in parts.items():
        if odd := set(classes) ^ set(_folders(folder / name)):
            raise ValueError(f"{name}/ and test/ have different classes: {min(odd)!r} in one only")
        splits[part], more_notes = _read_classes(folder / name, classes)
        notes += more_notes
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


def _read_aircraft(home: Path, images: Path) -> tuple[list[str], Splits]:
    """variants.txt: a name a line; images_variant_*.txt: "id name", the image being id.jpg."""
    classes = _lines(home / "variants.txt")
    splits: Splits = {part: [] for part in PARTS}
    for part, items in splits.items():
        for line in _lines(home / f"images_variant_{part}.txt"):
            image, _, name = line.partition(" ")
            if name not in classes:
                raise ValueError(f"{part}: {line!r} does not end with a name of variants.txt")
            items.append((os.path.join(images, f"{image}.jpg"), classes.index(name)))
    return classes, splits


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty (and without the mark that editors put first)."""
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


# --------------------------------------------------------------------------------------------------
# The benchmark data sets, in the layout of CoOp


@dataclass(frozen=True)
class Benchmark:
    """What is special about a data set."""

    name: str
    folder: str
    images: str  # the image folder in it
    files: tuple[str, ...] = ()  # beside the images, if not CoOp's split file
    marks: tuple[str, ...] = ()  # what its folder holds and no other's, beside the split file
    template: str = TEMPLATE
    names: dict[str, str] = field(default_factory=dict)  # class folder -> name, "": no class
    fetch: tuple[str, str] = ()  # torchvision's class, and where it puts this folder's content

    @property
    def split_file(self) -> str:
        return f"split_zhou_{self.name}.json"


DATASETS_MD = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
CLASSNAMES = ("classnames.txt",)
AIRCRAFT = ("variants.txt", *(f"images_variant_{part}.txt" for part in PARTS))
WNID = "n" + 8 * "[0-9]"  # a WordNet id, as a glob
BENCHMARKS = [
    Benchmark("ImageNet", "imagenet", "images", CLASSNAMES, (f"images/train/{WNID}",)),
    Benchmark("Caltech101", "caltech-101", "101_ObjectCategories", (), ("101_ObjectCategories",),
              names={"airplanes": "airplane", "Faces": "face", "Leopards": "leopard",
                     "Motorbikes": "motorbike", "BACKGROUND_Google": "", "Faces_easy": ""}),
    Benchmark("OxfordPets", "oxford_pets", "images", template="a photo of a {}, a type of pet.",
              fetch=("OxfordIIITPet", "oxford-iiit-pet")),
    Benchmark("StanfordCars", "stanford_cars", ".",
              names={"cars_train": "", "cars_test": "", "devkit": ""}),
    Benchmark("OxfordFlowers", "oxford_flowers", "jpg",
              template="a photo of a {}, a type of flower."),
    Benchmark("Food101", "food-101", "images", template="a photo of {}, a type of food.",
              fetch=("Food101", "food-101")),
    Benchmark("FGVCAircraft", "fgvc_aircraft", "images", AIRCRAFT, ("variants.txt",),
              "a photo of a {}, a type of aircraft.",
              fetch=("FGVCAircraft", "fgvc-aircraft-2013b/data")),
    Benchmark("SUN397", "sun397", "SUN397"),
    Benchmark("DescribableTextures", "dtd", "images", template="{} texture.",
              fetch=("DTD", "dtd/dtd")),
    Benchmark("EuroSAT", "eurosat", "2750", (), ("2750", "AnnualCrop"),
              "a centered satellite photo of {}.", fetch=("EuroSAT", "eurosat"), names={
                  "AnnualCrop": "Annual Crop Land", "Highway": "Highway or Road",
                  "HerbaceousVegetation": "Herbaceous Vegetation Land",
                  "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
                  "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
                  "SeaLake": "Sea or Lake"}),
    Benchmark("UCF101", "ucf101", "UCF-101-midframes", (), ("UCF-101-midframes",),
              "a photo of a person doing {}."),
    Benchmark("ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val", CLASSNAMES,
              ("imagenetv2-matched-frequency-format-val",)),
    Benchmark("ImageNet-Sketch", "imagenet-sketch", "images", CLASSNAMES, (f"images/{WNID}",)),
    Benchmark("ImageNet-A", "imagenet-adversarial", "imagenet-a", CLASSNAMES, ("imagenet-a",)),
    Benchmark("ImageNet-R", "imagenet-rendition", "imagenet-r", CLASSNAMES, ("imagenet-r",)),
]


def _find(root: Path) -> tuple[Benchmark, Path]:
    """The benchmark that `root` is the image folder of, or is, or holds; and its own folder.

    What a folder holds tells more than its name. Any other folder is a benchmark of its own.
    """
    for places in (
        [(b, root.parent) for b in BENCHMARKS if root.name == b.images],
        [(b, root) for b in BENCHMARKS],
        [(b, root / b.folder) for b in BENCHMARKS],  # by its content: a class may be called "dtd"
    ):
        found = [(b, home) for b, home in places
                 if any(any(home.glob(mark)) for mark in (b.split_file, *b.marks))]
        if len(found) > 1:
            folders = ", ".join(b.folder for b, _ in found)
            raise ValueError(f"{root} holds several data sets, name one of them: {folders}")
        if found:
            return found[0]
    return _by_name(root.name) or Benchmark(root.name, root.name, "."), root


def _by_name(name: str) -> Benchmark | None:
    """The benchmark of that name, or whose folder has it: "Caltech101", "caltech-101"."""
    return next((b for b in BENCHMARKS if name.lower() in (b.name.lower(), b.folder)), None)


def _expected(b: Benchmark) -> str:
    """What `load_dataset` reads, for error messages."""
    if b not in BENCHMARKS:
        return "folder/class name/image.jpg, or folder/[train and test]/class name/image.jpg"
    content = ", ".join((f"{b.images}/...", *(b.files or [b.split_file])))
    return f"{b.folder}/ with {content}, as in {DATASETS_MD}"


def _read(b: Benchmark, home: Path) -> tuple[list[str], Splits, list[str]]:
    """Classes, splits and notes of a data set, by the reader for what is in its folder."""
    images = home / b.images
    if b.files == AIRCRAFT or os.path.exists(home / b.split_file):
        classes, splits = (_read_aircraft(home, images) if b.files == AIRCRAFT else
                           _read_split_file(home / b.split_file, images))
        paths = [path for items in splits.values() for path, _ in items]
        if missing := [path for path in paths if not os.path.exists(path)]:
            raise FileNotFoundError(f"no image {missing[0]}, and {len(missing) - 1} more missing")
        return classes, splits, []
    images = images if images.is_dir() else home
    if b.files == CLASSNAMES and b.name != "ImageNet":  # its variants have a test set only
        # by length first: ImageNetV2's folders are the numbers 0 to 999
        classes = sorted(_folders(images), key=lambda name: (len(name), name))
        items, notes = _read_classes(images, classes)
        return classes, {"test": items}, notes
    no_classes = [folder for folder, name in b.names.items() if not name]
    classes, splits, notes = _read_folders(images, no_classes)
    if b in BENCHMARKS and b.name != "ImageNet":
        notes.append(f"no {b.split_file}: not the literature's split, do not compare the numbers")
    return classes, splits, notes


def _names(b: Benchmark, home: Path, given: PathLike | None, classes: list[str]) -> list[str]:
    """What the classes are called, by the file that is given or ImageNet's own."""
    of_imagenet, names = b.files == CLASSNAMES, {}
    if of_imagenet and given is None:
        beside = [f / "classnames.txt" for f in (home, home / b.images, home.parent / "imagenet")]
        given = next((file for file in beside if file.is_file()), beside[0])
    if given is not None:
        pairs = [line.partition("\t" if "\t" in line else " ") for line in _lines(Path(given))]
        names = {folder.strip(): name.strip() or folder for folder, _, name in pairs}
        if b.name == "ImageNetV2":
            names = {str(i): name for i, name in enumerate(names.values())}
        unknown = [name for name in classes if name not in names]
        if unknown and (of_imagenet or unknown == classes):
            raise ValueError(f"{given} has no name for the class folder {unknown[0]!r}")
    names = b.names | names
    return [" ".join(names.get(name, name).replace("_", " ").split()) for name in classes]


def download(name: str, root: PathLike) -> Path:
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
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="download-") as staging:
        try:
            getattr(torchvision.datasets, b.fetch[0])(staging, download=True)
        except Exception as e:  # no network, wrong checksum, cut off: each has its own class
            raise OSError(f"cannot download {b.name} with torchvision ({_in_line(e)})") from None
        target.mkdir(exist_ok=True)
        for part in (*b.files, b.images):  # images last: once they are there, all is
            shutil.move(Path(staging, b.fetch[1], part), target / part)
    return target


def _in_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --------------------------------------------------------------------------------------------------
# Protocol: sampling, base and novel classes, what is tested


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
    if "all" in classes:
        targets["all"], others = {}, [dataset, *others]
    taken = {"base", "novel"}
    for other in others:
        name = other.root if other.name in taken else other.name
        taken.add(name)
        list(targets.values())[-1][name] = other
    return targets


# --------------------------------------------------------------------------------------------------
# Images

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


# Pillow refuses images of more than 179 million pixels, but only warns from 90 million on.
warnings.simplefilter("error", Image.DecompressionBombWarning)
MAX_ASPECT = 100  # longer to shorter edge: where the shorter becomes 224, so much the longer grows


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image, not yet decoded. Whatever fails in the `with` block becomes an ImageError."""
    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels")
            yield image
    except Exception as e:  # OSError, SyntaxError, DecompressionBombError, ...: as the format likes
        raise ImageError(f"cannot read the image {path} ({_in_line(e)})") from None


def open_image(path: str) -> Image.Image:
    """The decoded image as RGB, turned as its EXIF says; of an animation, the first frame.

    What is transparent is shown on white. Grey values of 16 or 32 bits span the smallest of the
    ranges 0..255, 0..65535 and 0..2^31 (floats also 0..1) that holds them.
    Raises ImageError for a file that is damaged, of no format in FORMATS, or absurdly large.
    """
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of mode I;16, I or F, which Pillow would clip at 255, as mode L."""
    values = TF.pil_to_tensor(image.convert("F")).nan_to_num(0, posinf=0, neginf=0)  # (1, H, W)
    largest = values.max().item()
    ranges = (1, 255, 65535, 2**31) if image.mode == "F" else (255, 65535, 2**31)
    full = next((limit for limit in ranges if largest <= limit), largest)
    return TF.to_pil_image((values * (255 / full)).round().clamp(0, 255).byte())


def check_images(paths: Iterable[str], decode: bool = False) -> Iterator[str]:
    """Looks at images before a run depends on them; yields each path that is found to be good.

    At the headers only or, with `decode`, at the whole images. Raises ImageError at a bad one.
    """
    for path in paths:
        if decode:
            open_image(path)
        else:
            with _opened(path):
                pass
        yield path


# --------------------------------------------------------------------------------------------------
# Batches


class Images(torch.utils.data.Dataset):
    """Items as pairs (transformed image, label); an index is a pair (epoch, number of the item).

    With a seed, what the transform draws from torch's generator depends on (seed, epoch, number)
    alone: neither the number of workers nor the batch, the process or an interruption changes it.
    """

    def __init__(self, items: Items, transform: Transform, seed: int | None = None):
        self.items, self.transform, self.seed = items, transform, seed

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int]:
        path, label = self.items[index[1]]
        if self.seed is None:
            return self.transform(open_image(path)), label
        with torch.random.fork_rng(devices=[]):  # leaves the process's own generator alone
            torch.default_generator.manual_seed(_seed_of(self.seed, *index))
            return self.transform(open_image(path)), label

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[Tensor] | ImageError:
        """A batch, for DataLoader. It would wrap a worker's error in the text of a traceback, so
        an ImageError is handed on as a value, which ImageLoader raises."""
        try:
            return default_collate([self[index] for index in indices])
        except ImageError as error:
            return error


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
    items: Items, transform: Transform, batch_size: int, workers: int = 0
) -> DataLoader:
    """The items in order, in batches (B, 3, H, W), (B,), of which the last may be smaller."""
    batches = BatchSampler([(0, i) for i in range(len(items))], batch_size, drop_last=False)
    return ImageLoader(Images(items, transform), batches, workers)
