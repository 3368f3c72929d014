"""Data sets as lists of (image path, label): loading, few-shot sampling, base/novel split, batches.

    dataset = load_dataset("eurosat")                    # one of BENCHMARKS, or any class folders
    source = few_shot_source(dataset, shots=16, seed=1)  # 16 images of each base class
    loader = train_loader(source.train, train_transform(224), batch_size=4, seed=1)
    for epoch in range(40):
        loader.batch_sampler.epoch = epoch
        for images, labels in loader: ...                # (4, 3, 224, 224), (4,)

Layouts, splits, class names and sampling are CoOp's (Zhou et al., 2022), so that results can be
compared with its successors. Not here: downloads, labels in CSV files, several labels per image.
"""

import collections
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, default_collate
from torchvision import transforms as T

Items = list[tuple[str, int]]  # (path of an image, label)
Splits = dict[str, Items]  # "train", "val" or "test" -> items
PathLike = str | os.PathLike
PARTS = ("train", "val", "test")
TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Dataset:
    name: str
    classnames: list[str]  # label -> name
    train: Items = field(repr=False)  # empty if only for evaluation
    val: Items = field(repr=False)
    test: Items = field(repr=False)
    template: str = TEMPLATE  # for zero-shot classification
    notes: tuple[str, ...] = ()  # guesses and omissions, one per line
    root: str = ""


# ---- Benchmarks, in CoOp's layout ----------------------------------------------------------------
DATASETS_MD = "see https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
TORCHVISION = "import torchvision; torchvision.datasets.EuroSAT('.', download=True)"
HOW_TO_GET = {"EuroSAT": f'this downloads it to ./eurosat: python -c "{TORCHVISION}"'}
LAYOUTS = "expected FOLDER/<class>/image.jpg, or FOLDER/train/<class>/ and FOLDER/test/<class>/"


@dataclass(frozen=True)
class Benchmark:
    name: str
    folder: str
    images: str = "."  # the image folder in it
    template: str = TEMPLATE
    names: dict[str, str] = field(default_factory=dict)  # class folder -> name, where they differ

    @property
    def split_file(self) -> str:
        return "variants.txt" if self.name == "FGVCAircraft" else f"split_zhou_{self.name}.json"


IMAGENETS = ("ImageNet", "ImageNetV2", "ImageNet-Sketch", "ImageNet-A", "ImageNet-R")
EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}
BENCHMARKS = [
    Benchmark("ImageNet", "imagenet", "images"),
    Benchmark("Caltech101", "caltech-101", "101_ObjectCategories"),
    Benchmark("OxfordPets", "oxford_pets", "images", "a photo of a {}, a type of pet."),
    Benchmark("StanfordCars", "stanford_cars"),
    Benchmark("OxfordFlowers", "oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    Benchmark("Food101", "food-101", "images", "a photo of {}, a type of food."),
    Benchmark("FGVCAircraft", "fgvc_aircraft", "images", "a photo of a {}, a type of aircraft."),
    Benchmark("SUN397", "sun397", "SUN397"),
    Benchmark("DescribableTextures", "dtd", "images", "{} texture."),
    Benchmark("EuroSAT", "eurosat", "2750", "a centered satellite photo of {}.", EUROSAT),
    Benchmark("UCF101", "ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
    Benchmark("ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val"),
    Benchmark("ImageNet-Sketch", "imagenet-sketch", "images"),
    Benchmark("ImageNet-A", "imagenet-adversarial", "imagenet-a"),
    Benchmark("ImageNet-R", "imagenet-rendition", "imagenet-r"),
]


def load_dataset(
    root: PathLike, classnames: PathLike | None = None, template: str | None = None
) -> Dataset:
    """Reads a benchmark, train/ and test/ with class folders, or class folders, which are split.

    classnames: a text file with lines "folder name". ImageNet's is found automatically.
    template: for zero-shot classification, with {} for the class name.
    Raises OSError or ValueError with one line that says what is wrong.
    """
    if template is not None and not re.fullmatch(r"[^{}]*{}[^{}]*", template):
        raise ValueError(f"the template {template!r} must contain {{}} once, for the class name")
    path = Path(os.path.abspath(os.path.expanduser(root)))
    benchmark = _find_benchmark(path)
    if not path.is_dir():
        problem = f"{root} is a file, not a folder" if path.exists() else f"no folder {root}"
        advice = HOW_TO_GET.get(benchmark.name, DATASETS_MD) if benchmark else LAYOUTS
        raise FileNotFoundError(f"{problem}; {advice}")
    notes: list[str] = []
    if not benchmark:
        folder = Folder(path)
        while not benchmark and not _find_parts(folder) and (inner := _only_parent(folder)):
            folder = inner
            benchmark = _find_benchmark(folder.path)
            notes = [f"read {folder.path}, the only folder with pictures"]
        path = folder.path
        benchmark = benchmark or Benchmark(path.name, path.name)
    if classnames is None and benchmark.name in IMAGENETS:
        places = [folder / "classnames.txt" for folder in (path, path.parent / "imagenet")]
        classnames = next(filter(Path.exists, places), None)
        if classnames is None:
            raise FileNotFoundError(f"no file {places[0]}; {DATASETS_MD}")
    images = path / benchmark.images if (path / benchmark.images).is_dir() else path
    if (path / benchmark.split_file).exists():
        classes, splits = _read_split(path / benchmark.split_file, images)
    else:
        classes, splits = _read_folders(Folder(images), benchmark, classnames, notes)
    names = _class_names(classes, benchmark, classnames, notes)
    counts = collections.Counter(name.lower() for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    if len(names) < 2 or "" in names or (twice and benchmark.name not in IMAGENETS):
        raise ValueError(f"{root}: at least two different class names needed, not {twice or names}")
    lacking = {}
    for part in ("train", "test"):
        labels = {label for _, label in splits[part]}
        absent = [name for label, name in enumerate(names) if label not in labels]
        if labels and absent:
            lacking[part] = f"classes without a {part} image: {len(absent)}, e.g. {absent[0]!r}"
    if "train" in lacking or not splits["test"]:
        raise ValueError(f"{root}: {'; '.join(lacking.values()) or 'no class has a test image'}")
    notes += lacking.values()
    template = template or benchmark.template
    return Dataset(benchmark.name, names, *splits.values(), template, tuple(notes), os.fspath(root))


def _find_benchmark(path: Path) -> Benchmark | None:
    for benchmark in BENCHMARKS:
        by_name = path.name.lower() in (benchmark.folder, benchmark.name.lower())
        by_class = benchmark.name == "EuroSAT" and (path / "AnnualCrop").is_dir()
        if by_name or by_class or (path / benchmark.split_file).exists():
            return benchmark
    return None


# ---- Folders with classes ------------------------------------------------------------------------
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no EPS: it runs Ghostscript
EXTENSIONS = tuple(e for e, name in Image.registered_extensions().items() if name in FORMATS)
UNREADABLE = {".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".dng", ".cr2", ".nef", ".arw"}
HIDDEN = (".", "__")  # systems and tools leave ._a.jpg, __MACOSX, .ipynb_checkpoints
PART_NAMES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
PART_NAMES |= {part: part for part in PARTS}
NOT_CLASSES = {"annotations", "images", "labels", "masks", *(b.folder for b in BENCHMARKS)}


class Folder:
    """The contents of a folder, sorted, without hidden files. Links to parents are ignored."""

    def __init__(self, path: PathLike, parents: frozenset[Path] = frozenset()):
        self.path = Path(path)
        self.pictures: list[str] = []  # at any depth
        self.others: list[str] = []  # other files, at any depth
        self.folders: dict[str, Folder] = {}  # sub-folders with pictures
        self.empty: list[Folder] = []  # sub-folders without pictures
        real = self.path.resolve()
        parents |= {real, *real.parents}
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.name.startswith(HIDDEN):
                continue
            if not entry.is_dir():
                is_picture = entry.name.lower().endswith(EXTENSIONS)
                (self.pictures if is_picture else self.others).append(entry.path)
            elif Path(entry.path).resolve() not in parents:
                inner = Folder(entry.path, parents)
                self.pictures += inner.pictures
                self.others += inner.others
                if inner.pictures:
                    self.folders[entry.name] = inner
                else:
                    self.empty.append(inner)


def _only_parent(folder: Folder) -> Folder | None:
    """Returns the only sub-folder with pictures if it holds folders, so it is not a class."""
    inner = list(folder.folders.values())
    return inner[0] if len(inner) == 1 and inner[0].folders else None


def _find_parts(folder: Folder) -> dict[str, Folder]:
    """Finds split folders ("Training", "seg_test"), if there are any."""
    parts: dict[str, Folder] = {}
    for name in sorted(folder.folders, key=lambda name: name.lower() not in PART_NAMES):
        words = [word for word in re.findall("[a-z]+", name.lower()) if word in PART_NAMES]
        if words:
            parts.setdefault(PART_NAMES[words[0]], folder.folders[name])
    are_parts = len(parts) == len(folder.folders) or any(p.folders for p in parts.values())
    return parts if are_parts else {}  # "train" can also be a class


def _read_folders(folder: Folder, benchmark: Benchmark, names_file, notes: list[str]):
    """Reads class folders, or split folders with class folders. Returns classes and splits."""
    default = "test" if benchmark.name in IMAGENETS[1:] else "train"
    parts = _find_parts(folder) or {default: folder}
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
        if benchmark.name != "ImageNet":
            notes.append(f"no test folder: testing on {parts['test'].path}")
    found = {part: _read_classes(inner, names_file, notes) for part, inner in parts.items()}
    used = [inner.pictures for classes in found.values() for inner in classes.values()]
    if unused := set(folder.pictures).difference(*used):
        notes.append(f"ignored {len(unused)} pictures outside class folders, e.g. {min(unused)}")
    if folder.others:
        notes.append(f"ignored {len(folder.others)} other files, e.g. {folder.others[0]}")
    if benchmark in BENCHMARKS and benchmark.name not in IMAGENETS:
        notes.append(f"no {benchmark.split_file}: results are not comparable with published ones")
    if "test" not in found:
        notes.append("split into train, val and test: 50 / 20 / 30 % of each class")
        return list(found["train"]), _split(found["train"])
    classes = sorted(set().union(*found.values()))
    splits: Splits = {part: [] for part in PARTS}
    for part, folders in found.items():
        for label, name in enumerate(classes):
            if name in folders:
                splits[part] += [(path, label) for path in folders[name].pictures]
    return classes, splits


def _read_classes(folder: Folder, names_file, notes: list[str]) -> dict[str, Folder]:
    """Returns the class folders by name. ValueError if the folders are not classes."""
    while inner := _only_parent(folder):  # seg_train/seg_train/<classes>
        folder = inner
    classes = folder.folders
    names = list(classes)
    for empty in folder.empty:
        if kinds := UNREADABLE & {Path(file).suffix.lower() for file in empty.others}:
            found = f"{empty.path} has only {', '.join(sorted(kinds))} images"
            raise ValueError(f"{found}; convert them to JPEG or PNG")
    no_classes = NOT_CLASSES | {folder.path.name.lower()}
    if no_classes >= {name.lower() for name in names} or any(b.folder in names for b in BENCHMARKS):
        found = f"{folder.path} has {len(folder.pictures)} pictures but no class folders"
        advice = f"{LAYOUTS}; a val/ or test/ without class folders can be moved away"
        raise ValueError(f"{found} (only {', '.join(names) or 'files'}); {advice}")
    common = sorted(set.intersection(*(set(inner.folders) for inner in classes.values())))
    if len(names) > 1 and len(common) > 1 and not names_file:
        advice = f"perhaps --data {folder.path / names[0]} --eval-data {folder.path / names[1]}"
        if PART_NAMES.keys() >= {name.lower() for name in common}:
            advice = f"expected {folder.path / common[-1] / names[0]}"
        found = f"{', '.join(names[:3])} in {folder.path} all hold {', '.join(common[:3])}"
        named = f"if {names[0]} is a class, list the classes in a file: --classnames FILE"
        raise ValueError(f"{found}; {advice}; {named}")
    if folder.empty:
        example = folder.empty[0].path
        notes.append(f"ignored {len(folder.empty)} folders without pictures, e.g. {example}")
    if deep := sum(bool(inner.folders) for inner in classes.values()):
        notes.append(f"{deep} classes have pictures in sub-folders")
    return classes


def _split(classes: dict[str, Folder]) -> Splits:
    """50 / 20 / 30 % of each class, rounded as in CoOp, seeded with the class name."""
    splits: Splits = {part: [] for part in PARTS}
    for label, (name, folder) in enumerate(classes.items()):
        items = [(path, label) for path in folder.pictures]
        random.Random(name).shuffle(items)
        n = len(items)
        train = max(1, round(0.5 * n))  # if images are few, train comes first, then test
        val = max(0, min(round(0.2 * n), n - train - 1))
        splits["train"] += items[:train]
        splits["val"] += items[train : train + val]
        splits["test"] += items[train + val :]
    return splits


# ---- Split files and class names -----------------------------------------------------------------
def _read_lines(file: PathLike) -> list[str]:
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8; save it as UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def _read_split(file: Path, images: Path) -> tuple[list[str], Splits]:
    """Reads classes and splits from a split file: part -> [[path, label, class name], ...]."""
    splits: Splits = {part: [] for part in PARTS}
    names: dict[int, str] = {}
    try:
        rows = _read_aircraft(file) if file.suffix == ".txt" else json.loads(file.read_bytes())
        for part, items in splits.items():
            for path, label, name in rows[part]:
                items.append((os.path.join(images, path.replace("\\", "/")), label))
                if names.setdefault(label, name) != name:
                    raise ValueError(f"label {label} is both {names[label]!r} and {name!r}")
        if sorted(names) != list(range(len(names))):
            raise ValueError("labels are not 0, 1, 2, ...")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{file} is damaged ({e}); {DATASETS_MD}") from None
    paths = [path for items in splits.values() for path, _ in items]
    if missing := [path for path in paths if not os.path.exists(path)]:
        found = f"{len(missing)} of {len(paths)} images in {file} are missing, e.g. {missing[0]}"
        raise FileNotFoundError(f"{found}; they belong in {images}")
    return [names[label] for label in range(len(names))], splits


def _read_aircraft(file: Path) -> dict[str, list]:
    """variants.txt: one name per line. images_variant_train.txt etc.: "id name", for id.jpg."""
    classes = _read_lines(file)
    rows = {part: [] for part in PARTS}
    for part in PARTS:
        for line in _read_lines(file.parent / f"images_variant_{part}.txt"):
            image, name = line.split(maxsplit=1)
            rows[part].append((f"{image}.jpg", classes.index(name), name))
    return rows


def _class_names(classes: list[str], benchmark: Benchmark, file, notes: list[str]) -> list[str]:
    """Takes names from the file, else the benchmark, else the folders."""
    matches = [re.fullmatch(r"(?:n\d{8}|\d+)[._-]+([^\W\d_].*)", name) for name in classes]
    names = {match[0]: match[1] for match in matches if match}  # 001.ak47 -> ak47
    if len({name.lower() for name in names.values()}) < len(classes):
        names = {}
    elif not file:
        notes.append(f"class names without their numbers, e.g. {names[classes[0]]!r}")
    lines = _read_lines(file) if file else []  # "folder name"
    if benchmark.name == "ImageNetV2":  # its folders are line numbers
        lines = [re.sub(r"^[^\s,]+", str(number), line) for number, line in enumerate(lines)]
    folders = "|".join(map(re.escape, sorted(classes, key=len, reverse=True)))  # the longest wins
    pattern = re.compile(rf'"?({folders})"?[\s,]+"?(.+?)"?')
    matches = [pattern.fullmatch(line) for line in lines]
    found = dict(match.groups() for match in matches if match)
    if None in matches and benchmark.name not in IMAGENETS:
        notes.append(f"{matches.count(None)} lines of {file} begin with no class folder")
    unnamed = [name for name in classes if name not in found]
    if file and unnamed and (benchmark.name in IMAGENETS or not found):
        raise ValueError(f"{file} has no line with the class folder {unnamed[0]} and a name")
    names |= benchmark.names | found
    return [" ".join(names.get(name, name).replace("_", " ").split()) for name in classes]


# ---- Protocol: sampling, base and novel classes, evaluation --------------------------------------
def few_shot(items: Items, shots: int, rng: random.Random) -> Items:
    """Samples `shots` items per class, or all if there are fewer. 0 means all items.

    With rng = random.Random(seed), this draws CoOp's samples.
    """
    if shots == 0:
        return list(items)
    by_label = collections.defaultdict(list)
    for item in items:
        by_label[item[1]].append(item)
    sampled: Items = []
    for group in by_label.values():  # in order of first appearance
        sampled += rng.sample(group, shots) if len(group) >= shots else group
    return sampled


def few_shot_source(dataset: Dataset, shots: int, seed: int, classes: str = "base") -> Dataset:
    """Samples training images. As in CoOp, this is done before reduction to the base classes."""
    if not dataset.train:
        raise ValueError(f"{dataset.root} has no training images; use it with --eval-data")
    source = replace(dataset, train=few_shot(dataset.train, shots, random.Random(seed)))
    return base_novel(source)[0] if classes == "base" else source


def base_novel(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """The first half of the classes (rounded up) and the rest, each labelled from 0."""
    n = len(dataset.classnames)
    middle = (n + 1) // 2
    halves = []
    for half, labels in ("base", range(middle)), ("novel", range(middle, n)):
        names = dataset.classnames[labels.start : labels.stop]
        notes = dataset.notes
        if len(names) == 1:
            notes += (f"there is only one {half} class, so its accuracy is always 100 %",)
        parts = {}
        for part in PARTS:
            items = getattr(dataset, part)
            parts[part] = [(path, y - labels.start) for path, y in items if y in labels]
        name = f"{dataset.name} {half}"
        halves.append(replace(dataset, name=name, classnames=names, notes=notes, **parts))
    return halves[0], halves[1]


def evaluation_targets(dataset: Dataset, classes: str, others=()) -> dict[str, Dataset]:
    """Names what to evaluate on. A data set whose name is taken goes by its folder."""
    targets = {dataset.name: dataset}
    if classes == "base":
        targets = dict(zip(("base", "novel"), base_novel(dataset)))
    for name, target in targets.items():
        if not target.test:
            raise ValueError(f"{dataset.root} has no test image of a {name} class")
    for other in others:
        targets[other.root if other.name in targets else other.name] = other
    return targets


# ---- Images --------------------------------------------------------------------------------------
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = T.InterpolationMode.BICUBIC
AUGMENTS = {"field": (0.08, 0.5), "gentle": (0.6, 0.0), "none": None}  # smallest crop, P(flip)
Transform = Callable[[Image.Image], Tensor]


def train_transform(size: int, augment: str = "field", mean=MEAN, std=STD) -> Transform:
    """RGB image -> (3, size, size), with random crops and flips as in AUGMENTS."""
    if augment == "none":
        return test_transform(size, mean, std)
    smallest, flips = AUGMENTS[augment]
    crop = T.RandomResizedCrop(size, scale=(smallest, 1.0), interpolation=BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(flips), T.ToTensor(), T.Normalize(mean, std)])


def test_transform(size: int, mean=MEAN, std=STD) -> Transform:
    """RGB image -> (3, size, size): the shorter edge is resized, then the centre is cropped."""
    resize = T.Resize(size, interpolation=BICUBIC)
    return T.Compose([resize, T.CenterCrop(size), T.ToTensor(), T.Normalize(mean, std)])


def open_image(path: str) -> Image.Image:
    """Reads an image as RGB, or the first frame of an animation. ValueError if it is unreadable.

    EXIF orientation is applied and transparent areas become white. Grey values of 16 or 32 bits
    span the smallest of 0..1, 0..255 and 0..65535 that holds them, or else 0 to their maximum.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("not a file")  # opening a pipe would wait forever
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) > 100 * min(image.size):  # resizing would make it huge
                raise ValueError(f"{image.width} x {image.height} pixels: too elongated")
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # Pillow would clip these at 255
                grey = T.functional.pil_to_tensor(image.convert("F")).nan_to_num(0, 0, 0)
                largest = grey.max().item()
                white = next((limit for limit in (1, 255, 65535) if largest <= limit), largest)
                grey = (grey * (255 / white)).round().clamp(0, 255)
                image = T.functional.to_pil_image(grey.byte())
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as e:  # Pillow raises OSError, SyntaxError, struct.error and more
        reason = str(e).split("\n")[0] or type(e).__name__
        raise ValueError(f"cannot read the image {path} ({reason})") from None


def find_images(paths: list[PathLike]) -> list[str]:
    """Lists the given files and all pictures below the given folders. ValueError if none."""
    found: list[str] = []
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"no file or folder {path}")
        found += Folder(path).pictures if os.path.isdir(path) else [os.fspath(path)]
    if not found:
        raise ValueError(f"no images in {', '.join(map(str, paths))}")
    return found


# ---- Batches -------------------------------------------------------------------------------------
class Images(torch.utils.data.Dataset):
    """Pairs (transformed image, label). An index is a pair (epoch, position of the item).

    Augmentation depends on seed, epoch and position only, not on workers, processes or resuming.
    """

    def __init__(self, items: Items, transform: Transform, seed: int = 0, skip: bool = False):
        self.items, self.transform, self.seed, self.skip = items, transform, seed, skip

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, int] | None:
        path, label = self.items[index[1]]
        with torch.random.fork_rng(devices=[]):  # keeps the state of the global generator
            torch.default_generator.manual_seed(_combine_seeds(self.seed, *index))
            try:
                return self.transform(open_image(path)), label
            except ValueError:
                if self.skip:
                    return None  # `_collate` leaves it out
                raise


def _collate(pairs: list) -> list[Tensor]:
    pairs = [pair for pair in pairs if pair]
    return default_collate(pairs) if pairs else [torch.empty(0), torch.empty(0)]


def _combine_seeds(*numbers: int) -> int:
    return random.Random(repr(numbers)).getrandbits(63)


class EpochBatches:
    """The batches of one epoch in random order, as lists of (epoch, position of an item).

    The last incomplete batch is dropped. Each of `world` processes gets its share of every batch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.n, self.batch_size, self.seed, self.epoch = n, min(n, batch_size), seed, 0
        share = self.batch_size // world
        if share == 0 or self.batch_size % world:
            raise ValueError(f"{world} processes cannot share batches of {self.batch_size} images")
        self.own = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_combine_seeds(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        for batch in order.split(self.batch_size)[: len(self)]:
            yield [(self.epoch, i) for i in batch[self.own].tolist()]


def train_loader(
    items: Items, transform: Transform, batch_size: int, seed: int, workers=0, rank=0, world=1
) -> DataLoader:
    """Yields shuffled batches (B, 3, H, W), (B,). Set `batch_sampler.epoch` before each epoch."""
    batches = EpochBatches(len(items), batch_size, seed, rank, world)
    return _loader(Images(items, transform, seed), batches, workers)


def test_loader(
    items: Items, transform: Transform, batch_size: int, workers: int = 0, skip: bool = False
) -> DataLoader:
    """Yields batches (B, 3, H, W), (B,) in order. skip: leave out unreadable images."""
    batches = BatchSampler([(0, i) for i in range(len(items))], batch_size, drop_last=False)
    return _loader(Images(items, transform, skip=skip), batches, workers)


def _quiet_worker(worker: int) -> None:
    sys.excepthook = lambda *_: None  # errors are raised in the main process, if that still runs


def _loader(images: Images, batches, workers: int) -> DataLoader:
    workers = min(workers, len(batches))
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_quiet_worker,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the default would change the state of the global generator
    )
