"""Data sets as lists of (image path, label): loading, few-shot sampling, base/novel split, batches.

The file stands alone and knows nothing of a model.

    dataset = load_dataset("eurosat")                  # one of BENCHMARKS, or any folder of classes
    base, novel = base_novel(dataset)
    train = few_shot(base.train, 16, random.Random(1))
    for images, labels in train_loader(train, 224, batch_size=4, seed=1, epochs=range(40)):
        ...                                            # (B, 3, 224, 224), (B,), all 40 epochs

Layouts, splits, class names and sampling are those of CoOp (Zhou et al., 2022), so that numbers
can be compared with CoOp, CoCoOp, MaPLe, PromptSRC and Prompt-OT.
"""

import collections
import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision import transforms as T
from torchvision.transforms import functional as TF

Item = tuple[str, int]  # (path of an image, label)
Row = tuple[str, int, str]  # the same with the class's name, as split files have it
Splits = dict[str, list[Row]]  # one of PARTS -> rows
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Dataset:
    """What `load_dataset` returns. An evaluation-only data set has an empty `train`."""

    name: str
    classnames: list[str]  # label -> name, "_" already " "
    train: list[Item] = field(repr=False)  # long
    val: list[Item] = field(repr=False)
    test: list[Item] = field(repr=False)
    template: str = "a photo of a {}."  # zero-shot template of the literature
    shift: Callable[[Image.Image], Image.Image] | None = None  # changes the test images
    notes: tuple[str, ...] = ()  # what the user should know before believing the numbers


def load_dataset(
    root: str | os.PathLike, classnames_file: str | os.PathLike | None = None
) -> Dataset:
    """The data set in a folder.

    root: a data set of BENCHMARKS in CoOp's layout, known by its files or its name; or a folder
    with train/, test/ and perhaps val/, each with class sub-folders; or a folder of class
    sub-folders, split 50/20/30 %. A class is named as its folder, "_" read as " ". With
    ":inverted", ":noisy" or ":rotated" behind it: the same with `shift` set.
    classnames_file: ImageNet's classnames.txt, if it is neither in the folder nor in ../imagenet.
    Raises FileNotFoundError (further lines show the expected tree) or ValueError.
    """
    root, shift = _split_shift(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    benchmark, home = _find(Path(os.path.abspath(root)))
    notes: list[str] = []
    try:
        if benchmark:
            splits = benchmark.read(benchmark, home, notes, classnames_file)
        else:
            splits = _read_folders(home, {}, notes)
        dataset = _assemble(benchmark.name if benchmark else home.name, splits, notes)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}\n{benchmark.tree() if benchmark else OWN_TREE}") from None
    except ValueError as e:
        raise ValueError(f"{root}: {e}") from None
    if benchmark:
        dataset = replace(dataset, template=benchmark.template)
    if shift:
        dataset = replace(dataset, name=f"{dataset.name}:{shift}", shift=SHIFTS[shift])
    return dataset


def _assemble(name: str, splits: Splits, notes: list[str]) -> Dataset:
    """Checks that labels and class names fit together in all splits, and drops the names."""
    names: dict[int, str] = {}
    for _, label, classname in itertools.chain(*splits.values()):
        if names.setdefault(label, classname) != classname:
            raise ValueError(f"label {label} has two names, {names[label]!r} and {classname!r}")
    if gaps := [label for label in range(len(names)) if label not in names]:
        raise ValueError(f"labels are not 0, 1, 2, ...: no image has label {gaps[0]}")
    classnames = [" ".join(names[i].replace("_", " ").split()) for i in range(len(names))]
    if len(classnames) < 2:
        raise ValueError(f"two classes are needed at least, not {len(classnames)} {classnames}")
    counts = collections.Counter(c.lower() for c in classnames)  # case is lost in CLIP's tokens
    twice = [c for c, count in counts.items() if count > 1]
    if twice and not name.startswith("ImageNet"):
        raise ValueError(f"two classes have the name {twice[0]!r}")
    if twice:  # "missile" and "sunglasses" are so in CLIP's list, and in all published numbers
        notes.append(f"names that two classes share: {', '.join(twice)}")
    lists = {part: [(path, y) for path, y, _ in splits.get(part, [])] for part in PARTS}
    for part in ("train", "test"):
        lacking = sorted(set(names) - {label for _, label in lists[part]}) if lists[part] else []
        if lacking and part == "train":
            raise ValueError(f"no train image of class {classnames[lacking[0]]!r}")
        if lacking:
            first = classnames[lacking[0]]
            notes.append(f"{len(lacking)} classes have no test image, the first is {first!r}")
    return Dataset(name, classnames, **lists, notes=tuple(notes))


# --------------------------------------------------------------------------------------------------
# Readers: a folder -> the rows of its splits

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def _folders(folder: Path) -> list[str]:
    """Names of the sub-folders, sorted, without hidden ones and those of tools (__MACOSX)."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__")))


def _class_folders(folder: Path, names: dict[str, str], notes: list[str]) -> list[Row]:
    """The images of class sub-folders; label = rank of the folder's name.

    names: folder -> class name where they differ; a folder with the name "" is left out.
    """
    classes = [c for c in _folders(folder) if names.get(c, c)] if folder.is_dir() else []
    if not classes:
        raise FileNotFoundError(f"no class folders in {folder}")
    rows, skipped = [], []
    for label, c in enumerate(classes):
        images = []
        for entry in sorted(os.scandir(folder / c), key=lambda entry: entry.name):
            if entry.name.startswith("."):  # among them macOS's "._picture.jpg", which are none
                continue
            is_image = os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file()
            (images if is_image else skipped).append(entry.path)
        if not images:
            raise FileNotFoundError(f"no images in {folder / c}")
        rows += [(path, label, names.get(c, c)) for path in images]
    if skipped:
        notes.append(f"{len(skipped)} files skipped, no images by their names: {skipped[0]}, ...")
    return rows


def _read_folders(folder: Path, names: dict[str, str], notes: list[str]) -> Splits:
    """A folder with train/, val/, test/, each with class sub-folders, or of class sub-folders."""
    parts = [p for p in PARTS if (folder / p).is_dir() and _folders(folder / p)]
    if not parts:
        return _split(_class_folders(folder, names, notes))
    splits = {p: _class_folders(folder / p, names, notes) for p in parts}
    if "test" not in splits and "val" in splits:  # as everybody does with ImageNet
        splits["test"] = splits.pop("val")
        notes.append(f"no test/ in {folder}: val/ is the test set")
    if "test" not in splits:
        raise FileNotFoundError(f"{folder} has train/, but neither test/ nor val/")
    classes = {p: {name for _, _, name in rows} for p, rows in splits.items()}
    for p in classes:
        if odd := sorted(classes[p] ^ classes["test"]):
            raise ValueError(f"{p}/ and test/ have different classes: {odd[0]!r} is in one only")
    return splits


def _split(rows: list[Row]) -> Splits:
    """50 / 20 / 30 % of each class for train / val / test, rounded as CoOp does.

    Files are shuffled, since neighbours by name are often alike or come in periods (frames of a
    video, copies); the seed is the class's name, so that other classes do not matter. In a class
    of few images train comes first, then test, then val.
    """
    splits: Splits = {part: [] for part in PARTS}
    for name, of_class in itertools.groupby(rows, key=lambda row: row[2]):
        of_class = list(of_class)
        random.Random(name).shuffle(of_class)
        n = len(of_class)
        train = max(1, round(0.5 * n))
        val = max(0, min(round(0.2 * n), n - train - 1))
        splits["train"] += of_class[:train]
        splits["val"] += of_class[train : train + val]
        splits["test"] += of_class[train + val :]
    return splits


def _read_json(b: "Benchmark", home: Path, notes: list[str], _) -> Splits:
    """split_zhou_*.json: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    file, images = home / b.split_file, home / b.images
    if not file.exists():
        splits = _read_folders(images if images.is_dir() else home, b.names, notes)
        notes.append(f"no {file.name}: not the literature's split, so do not compare the numbers")
        return splits
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        splits = {
            part: [
                (os.path.join(images, path), int(label), str(name))
                for path, label, name in content[part]
            ]
            for part in PARTS
        }
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} is not a split file ({type(e).__name__}: {e})") from None
    _check_exist(file, itertools.chain(*splits.values()))
    return splits


def _read_aircraft(b: "Benchmark", home: Path, notes: list[str], _) -> Splits:
    """variants.txt: a name a line; images_variant_*.txt: "id name", the image being id.jpg."""
    labels = {name: label for label, name in enumerate(_lines(home / "variants.txt"))}
    splits: Splits = {}
    for part in PARTS:
        file = home / f"images_variant_{part}.txt"
        splits[part] = []
        for line in _lines(file):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise ValueError(f"{file}: {line!r} does not end with a name of variants.txt")
            path = os.path.join(home, b.images, f"{image}.jpg")
            splits[part].append((path, labels[name], name))
        _check_exist(file, splits[part])
    return splits


def _read_imagenet(b: "Benchmark", home: Path, notes: list[str], classnames_file) -> Splits:
    """Folders named by wnid or, in V2, by line of classnames.txt, which gives the class names.

    ImageNet itself has train/ and val/, and val/ is its test set; the variants have a test set
    only. (CoOp leaves the order of ImageNet's files to the file system; here they are sorted.)
    """
    images = home / b.images if (home / b.images).is_dir() else home
    beside = [folder / "classnames.txt" for folder in (home, images, home.parent / "imagenet")]
    file = Path(classnames_file or next((f for f in beside if f.is_file()), beside[0]))
    names = dict(line.split(" ", 1) for line in _lines(file) if " " in line)  # wnid -> name
    if b.name == "ImageNetV2":
        names = {str(i): name for i, name in enumerate(names.values())}
    else:
        names = dict(sorted(names.items()))
    if b.name == "ImageNet":
        splits = _read_folders(images, {}, notes)
    else:
        splits = {"test": _class_folders(images, {}, notes)}
    folders = {folder for _, _, folder in splits["test"]}
    if unknown := sorted(folders - set(names)):
        raise ValueError(f"{file} has no name for the class folder {unknown[0]!r}")
    labels = {folder: i for i, folder in enumerate(f for f in names if f in folders)}
    return {
        part: [(path, labels[folder], names[folder]) for path, _, folder in rows]
        for part, rows in splits.items()
    }


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _check_exist(file: Path, rows: Iterable[Row]) -> None:
    """Lists each folder once, instead of asking for each file: 0.1 s for 50,000 images."""

    @functools.cache
    def files(folder: str) -> set[str]:
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()

    missing = [p for p, _, _ in rows if os.path.basename(p) not in files(os.path.dirname(p))]
    if missing:
        raise FileNotFoundError(
            f"{file} names {len(missing)} images that are not there, the first is {missing[0]}"
        )


# --------------------------------------------------------------------------------------------------
# The benchmark data sets, in the layout of CoOp


@dataclass(frozen=True)
class Benchmark:
    """One data set: where its images are, who reads it, and what is special about it."""

    name: str
    folder: str
    images: str  # the image folder in it
    read: Callable = _read_json
    template: str = "a photo of a {}."  # for zero-shot classification, in the literature
    files: tuple[str, ...] = ()  # beside the images, if not CoOp's split file
    marks: tuple[str, ...] = ()  # what its folder holds and no other's, beside the split file
    names: dict[str, str] = field(default_factory=dict)  # class folder -> name, "" = left out
    fetch: tuple[str, str] | None = None  # torchvision's class, where it puts this folder's content

    @property
    def split_file(self) -> str:
        """Name of CoOp's split file."""
        return f"split_zhou_{self.name}.json"

    def is_in(self, folder: Path) -> bool:
        """Whether the content of `folder` shows that it is this data set."""
        return any(any(folder.glob(mark)) for mark in (self.split_file, *self.marks))

    def tree(self) -> str:
        """The expected tree, for error messages."""
        content = (f"{self.images}/...", *(self.files or [self.split_file]))
        lines = "".join(f"\n        {name}" for name in content)
        return f"{self.name} is expected as\n    {self.folder}/{lines}\nsee {DATASETS_MD}"


DATASETS_MD = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
CLASSNAMES = ("classnames.txt",)
WNID = "n" + 8 * "[0-9]"  # a WordNet id, as a glob
CALTECH_NAMES = {
    "airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike",
    "BACKGROUND_Google": "", "Faces_easy": "",
}
CARS_NAMES = {"cars_train": "", "cars_test": "", "devkit": ""}  # folders, but not of classes
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}

BENCHMARKS = [
    Benchmark("ImageNet", "imagenet", "images", _read_imagenet,
              files=CLASSNAMES, marks=(f"images/train/{WNID}",)),
    Benchmark("Caltech101", "caltech-101", "101_ObjectCategories",
              marks=("101_ObjectCategories",), names=CALTECH_NAMES),
    Benchmark("OxfordPets", "oxford_pets", "images",
              template="a photo of a {}, a type of pet.",
              fetch=("OxfordIIITPet", "oxford-iiit-pet")),
    Benchmark("StanfordCars", "stanford_cars", ".", names=CARS_NAMES),
    Benchmark("OxfordFlowers", "oxford_flowers", "jpg",
              template="a photo of a {}, a type of flower."),
    Benchmark("Food101", "food-101", "images", template="a photo of {}, a type of food.",
              fetch=("Food101", "food-101")),
    Benchmark("FGVCAircraft", "fgvc_aircraft", "images", _read_aircraft,
              template="a photo of a {}, a type of aircraft.",
              files=("variants.txt", *(f"images_variant_{part}.txt" for part in PARTS)),
              marks=("variants.txt",),
              fetch=("FGVCAircraft", "fgvc-aircraft-2013b/data")),
    Benchmark("SUN397", "sun397", "SUN397"),
    Benchmark("DescribableTextures", "dtd", "images", template="{} texture.",
              fetch=("DTD", "dtd/dtd")),
    Benchmark("EuroSAT", "eurosat", "2750", template="a centered satellite photo of {}.",
              marks=("2750", "AnnualCrop"), names=EUROSAT_NAMES,
              fetch=("EuroSAT", "eurosat")),
    Benchmark("UCF101", "ucf101", "UCF-101-midframes",
              template="a photo of a person doing {}.", marks=("UCF-101-midframes",)),
    Benchmark("ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val",
              _read_imagenet, files=CLASSNAMES,
              marks=("imagenetv2-matched-frequency-format-val",)),
    Benchmark("ImageNet-Sketch", "imagenet-sketch", "images", _read_imagenet,
              files=CLASSNAMES, marks=(f"images/{WNID}",)),
    Benchmark("ImageNet-A", "imagenet-adversarial", "imagenet-a", _read_imagenet,
              files=CLASSNAMES, marks=("imagenet-a",)),
    Benchmark("ImageNet-R", "imagenet-rendition", "imagenet-r", _read_imagenet,
              files=CLASSNAMES, marks=("imagenet-r",)),
]
OWN_TREE = """a data set of your own is expected as
    folder/[train/ and test/, if it is split]
        class name/
            image.jpg"""


def _find(root: Path) -> tuple[Benchmark | None, Path]:
    """The benchmark that `root` is, or holds, or is the image folder of; and its own folder."""
    for b in BENCHMARKS:
        if root.name == b.images and b.is_in(root.parent):
            return b, root.parent
    for b in BENCHMARKS:  # what a folder holds tells more than its name
        if b.is_in(root):
            return b, root
    inside = [b for b in BENCHMARKS if (root / b.folder).is_dir()]
    if len(inside) > 1:
        names = ", ".join(b.folder for b in inside)
        raise ValueError(f"{root} holds several data sets, name one of them: {names}")
    if inside:
        return inside[0], root / inside[0].folder
    return _by_name(root.name), root


def _by_name(name: str) -> Benchmark | None:
    """The benchmark of that name, or whose folder has it: "Caltech101", "caltech-101"."""

    def plain(name: str) -> str:
        return re.sub("[^a-z0-9]", "", name.lower())

    known = {plain(n): b for b in BENCHMARKS for n in (b.name, b.folder)}
    return known.get(plain(name))


def download(name: str, root: str | os.PathLike) -> Path:
    """Fetches a benchmark with torchvision into root/<its folder>, which is returned.

    Where CoOp has a split file it must be added by hand. Raises ValueError for a data set that
    torchvision cannot fetch, OSError if it fails.
    """
    b = _by_name(name)
    if b is None or not b.fetch:
        fetchable = ", ".join(b.name for b in BENCHMARKS if b.fetch)
        by_hand = f"; get it by hand\n{b.tree()}" if b else ""
        raise ValueError(f"{name} cannot be downloaded, only {fetchable}{by_hand}")
    root = Path(root).expanduser()
    target = root / b.folder
    if (target / b.images).is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    dataset_class = getattr(torchvision.datasets, b.fetch[0])
    with tempfile.TemporaryDirectory(dir=root, prefix="download-") as staging:
        try:
            dataset_class(staging, download=True)
        except Exception as e:  # no network, wrong checksum, cut off: each has its own class
            url = getattr(dataset_class, "_URL", f"torchvision.datasets.{b.fetch[0]}")
            reason = " ".join(str(e).split()) or type(e).__name__
            raise OSError(f"cannot download {b.name} from {url} ({reason})") from None
        target.mkdir(exist_ok=True)
        for part in (*b.files, b.images):  # images last: once they are there, all is
            shutil.move(Path(staging, b.fetch[1], part), target / part)
    return target


# --------------------------------------------------------------------------------------------------
# Protocol: sampling, base and novel classes


def few_shot(items: list[Item], shots: int, rng: random.Random) -> list[Item]:
    """`shots` random items of each class, all of a class that has fewer; shots = 0: all items.

    With rng = random.Random(seed), and train sampled before val (min(shots, 4) of each class),
    these are CoOp's shots for that seed: labels come in order of first appearance.
    """
    if shots < 1:
        return list(items)
    by_label = collections.defaultdict(list)
    for item in items:
        by_label[item[1]].append(item)
    chosen = []
    for of_label in by_label.values():
        chosen += rng.sample(of_label, shots) if len(of_label) >= shots else of_label
    return chosen


def base_novel(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """The first half of the classes (the larger, if odd) and the rest, each relabelled from 0.

    CoOp's base shots are sampled from all classes: sample first, split then.
    """
    n = len(dataset.classnames)
    middle = math.ceil(n / 2)
    return _classes(dataset, 0, middle, "base"), _classes(dataset, middle, n, "novel")


def _classes(dataset: Dataset, start: int, stop: int, name: str) -> Dataset:
    parts = {
        part: [(path, y - start) for path, y in getattr(dataset, part) if start <= y < stop]
        for part in PARTS
    }
    notes = dataset.notes
    if stop - start == 1:
        notes += (f"one {name} class only, {dataset.classnames[start]!r}: always 100 %",)
    return replace(
        dataset, name=f"{dataset.name} {name}", classnames=dataset.classnames[start:stop],
        notes=notes, **parts,
    )


# --------------------------------------------------------------------------------------------------
# Images: transforms, shifts, reading

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TO_TENSOR = [T.ToTensor(), T.Normalize(MEAN, STD)]
BICUBIC = T.InterpolationMode.BICUBIC


def train_transform(size: int) -> Callable[[Image.Image], Tensor]:
    """Random crop of 8 to 100 % of the area and random flip: RGB image -> (3, size, size)."""
    crop = T.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(0.5), *TO_TENSOR])


def test_transform(size: int) -> Callable[[Image.Image], Tensor]:
    """The smaller edge to `size`, the centre cut out: RGB image -> (3, size, size)."""
    return T.Compose([T.Resize(size, interpolation=BICUBIC), T.CenterCrop(size), *TO_TENSOR])


def noisy(image: Image.Image, sd: float = 0.2) -> Image.Image:
    """Gaussian noise on each value, `sd` in units of the full scale, seeded by the pixels."""
    generator = torch.Generator().manual_seed(zlib.crc32(image.tobytes()))
    pixels = TF.pil_to_tensor(image)  # (3, H, W), 0 to 255
    noise = 255 * sd * torch.randn(pixels.shape, generator=generator)
    return TF.to_pil_image((pixels + noise).round().clamp(0, 255).byte())


def rotated(image: Image.Image, degrees: float = 30) -> Image.Image:
    """Counter-clockwise about the centre, black where nothing comes from."""
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC)


SHIFTS = {"inverted": ImageOps.invert, "noisy": noisy, "rotated": rotated}


def _split_shift(root: str | os.PathLike) -> tuple[Path, str | None]:
    """"digits:noisy" -> (digits, "noisy"), unless there is a folder of that name."""
    path, colon, shift = os.fspath(root).rpartition(":")
    if os.path.exists(root) or not colon or shift not in SHIFTS:
        return Path(root).expanduser(), None
    return Path(path).expanduser(), shift


class ImageError(ValueError):
    """An image that cannot be read; one line, even when it comes through a DataLoader worker."""

    def __str__(self) -> str:
        return super().__str__().strip().split("ImageError: ")[-1]  # workers add their traceback


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image, not yet decoded. Whatever fails in the `with` block becomes an ImageError."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as e:  # OSError, SyntaxError, DecompressionBombError, ...: as the format likes
        raise ImageError(f"cannot read the image {path} ({e})") from None


def open_image(path: str) -> Image.Image:
    """The decoded image as RGB. Raises ImageError, which names the file."""
    with _opened(path) as image:
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip, not scale
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return image.convert("RGB")


KEEP_BYTES = 2**30  # training images are kept in memory if together they need no more than this


class Images(torch.utils.data.Dataset):
    """Items as pairs (transformed image, label), for evaluation or, with a seed, for training.

    An index gives an item. In training a draw is a pair (epoch, index), and the augmentation
    depends on (seed, epoch, index) alone: neither the number of workers nor the batch, the
    process or an interruption changes a picture.
    """

    def __init__(
        self,
        items: list[Item],
        transform: Callable[[Image.Image], Tensor],
        shift: Callable[[Image.Image], Image.Image] | None = None,
        seed: int | None = None,
    ):
        self.items, self.transform, self.shift, self.seed = items, transform, shift, seed
        self.kept = self._decode_all() if seed is not None and self._fit() else None

    def _fit(self) -> bool:
        """Whether the decoded images fit KEEP_BYTES; looks at file headers until they do not."""
        total = 0
        for path, _ in self.items:
            with _opened(path) as image:
                total += 4 * image.width * image.height  # Pillow holds RGB in 4 bytes a pixel
            if total > KEEP_BYTES:
                return False
        return True

    def _decode_all(self) -> list[Image.Image]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders free the GIL
            return list(pool.map(open_image, [path for path, _ in self.items]))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = (None, draw) if isinstance(draw, int) else draw
        path, label = self.items[index]
        image = self.kept[index] if self.kept else open_image(path)
        if self.shift:
            image = self.shift(image)
        if epoch is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):  # leaves the process's own generator alone
            torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
            return self.transform(image), label


def _mix(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine."""
    return random.Random(repr(numbers)).getrandbits(63)


# --------------------------------------------------------------------------------------------------
# Batches


class EpochBatches(Sampler):
    """Batches of draws (epoch, index), epoch after epoch: each epoch is a permutation.

    The last incomplete batch is dropped if there is a full one. Of `world` processes each gets
    its contiguous share of every batch; together they see what one process sees alone.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, epochs: Iterable[int], rank: int = 0,
        world: int = 1,
    ):
        if min(n, batch_size) < world:
            raise ValueError(
                f"{n} images in batches of {batch_size} are too few for {world} processes"
            )
        self.n, self.batch_size, self.seed, self.epochs = n, batch_size, seed, list(epochs)
        self.rank, self.world = rank, world
        self.steps = max(1, n // batch_size)  # per epoch

    def __len__(self) -> int:
        return self.steps * len(self.epochs)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(self.n, generator=generator)
            for batch in order.split(self.batch_size)[: self.steps]:
                share = batch.tensor_split(self.world)[self.rank]
                yield [(epoch, index) for index in share.tolist()]


def train_loader(
    items: list[Item], size: int, batch_size: int, seed: int, epochs: Iterable[int],
    workers: int = 0, rank: int = 0, world: int = 1, augment: bool = True,
) -> DataLoader:
    """All batches of all `epochs`, (B, 3, size, size) and (B,), from one start of the workers.

    `loader.batch_sampler.steps` is the number of batches of an epoch.
    """
    transform = train_transform(size) if augment else test_transform(size)
    images = Images(items, transform, seed=seed)
    batches = EpochBatches(len(items), batch_size, seed, epochs, rank, world)
    return _loader(images, min(workers, len(batches)), batch_sampler=batches)


def test_loader(
    items: list[Item], size: int, batch_size: int, workers: int = 0,
    shift: Callable[[Image.Image], Image.Image] | None = None,
) -> DataLoader:
    """The items in order, in batches of (B, 3, size, size) and (B,)."""
    images = Images(items, test_transform(size), shift)
    return _loader(images, min(workers, math.ceil(len(items) / batch_size)), batch_size=batch_size)


def _loader(images: Images, workers: int, **batching) -> DataLoader:
    return DataLoader(
        images,
        num_workers=workers,  # each of them computes with one thread
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader would draw from the process's generator
        **batching,
    )
