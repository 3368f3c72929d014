import collections, hashlib, json, os, pickle, sys, tempfile, urllib.request, zipfile
from pathlib import Path
from typing import NamedTuple
import torch
from torch import Tensor
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# --------------------------------------------------------------------------------------------------
# Weights

URL = "https://openaipublic.azureedge.net/clip/models"
MODELS = {  # name -> SHA-256 and file name of OpenAI's archive
    "ViT-B/32": (
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"
    ),
    "ViT-B/16": (
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"
    ),
    "ViT-L/14": (
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"
    ),
    "ViT-L/14@336px": (
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"
    ),
}


def available_models() -> list[str]:
    """The published models that `load` knows by name."""
    return list(MODELS)


def download(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Path of a published model's archive in the cache, downloaded and checked if it is new there.

    It comes to a temporary file, and gets its name only after its SHA-256 has been checked.
    """
    sha256, file = MODELS[name]
    folder = Path(cache_dir or "~/.cache/clip").expanduser()
    path, url = folder / file, f"{URL}/{sha256}/{file}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False)
    try:
        with part:
            digest = _fetch(url, part)
        if digest != sha256:
            raise OSError(f"what arrived is not the published file (SHA-256 {digest[:12]}...)")
        os.replace(part.name, path)
    except OSError as e:  # URLError and time-outs are OSErrors, too
        raise OSError(
            f"cannot download {url} ({e}); if you have the weights, pass their path as the model"
        ) from None
    finally:
        Path(part.name).unlink(missing_ok=True)
    return path


def _fetch(url: str, file) -> str:
    """Copies a URL to an open file, with progress on stderr; returns the SHA-256 of the content."""
    digest, done = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=30) as response:
        total = int(response.headers.get("Content-Length", 0))
        while chunk := response.read(2**20):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            share = f" of {total / 2**20:.0f}" if total else ""
            print(f"\r{url} {done / 2**20:.0f}{share} MiB", end="", file=sys.stderr)
    print(file=sys.stderr)
    return digest.hexdigest()


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, in the dtype of the file.

    Raises ValueError for a damaged file or one of another kind.
    """
    path = Path(path)
    path.open("rb").close()  # an OSError is about reading; from here on, errors are about content
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _read_torchscript(archive)
                if damaged := archive.testzip():  # torch.load does not compare checksums
                    raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # each reader has its own words for damage; none of them runs code
        kinds = "TorchScript archive, torch.save'd state dict, .safetensors"
        raise ValueError(f"damaged, or none of the known kinds of weights file ({kinds})") from e
    entries = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries):
        raise ValueError("not a state dict (names -> tensors)")
    return state


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """8 bytes: length of a JSON header; the header: dtype, shape, place of each tensor; bytes."""
    data = bytearray(path.read_bytes())  # writable, as torch.frombuffer likes it
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    state, covered = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != covered:
            raise ValueError("gaps or overlaps between tensors")
        raw = torch.frombuffer(data[start + begin : start + end], dtype=torch.uint8)
        state[name] = raw.view(SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        covered = end
    if start + covered != len(data):
        raise ValueError("more bytes than the tensors have")
    return state


STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Node:
    """Stands for a TorchScript module: its attributes are modules, tensors and plain values."""


class _TorchScriptUnpickler(pickle.Unpickler):
    """Reads `data.pkl` of a TorchScript archive. Knows modules, tensors and lists, and no code."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module: str, name: str):
        """What a name in the pickle stands for; UnpicklingError for all that is not listed here."""
        if module.startswith("__torch__"):
            return _Node
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, type_name: value
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a weights file")

    def persistent_load(self, pid: tuple) -> Tensor:
        """A storage, as a flat tensor; it is read from the archive when first asked for."""
        _, dtype, key, _, size = pid  # ("storage", kind, key, device, number of elements)
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            empty = torch.empty(0, dtype=dtype)  # for which frombuffer has no use
            self.storages[key] = torch.frombuffer(raw, dtype=dtype, count=size) if raw else empty
        return self.storages[key]

    @staticmethod
    def rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
        """A tensor of its own from its place in a storage."""
        return storage.as_strided(size, stride, offset).clone()


def _read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive (a zip with data.pkl and raw storages) by name."""
    root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).rsplit("/", 1)[0]
    state = {}

    def collect(node: _Node, prefix: str) -> None:
        for name, value in vars(node).items():
            if isinstance(value, Tensor):
                state[prefix + name] = value
            elif isinstance(value, _Node):
                collect(value, f"{prefix}{name}.")

    collect(_TorchScriptUnpickler(archive, root).load(), "")
    return state



class Weights(NamedTuple):
    state: dict
    activation: str
    head_width: int
    mean: tuple
    std: tuple
    notes: tuple

def find(name, cache_dir=None):
    if name in MODELS:
        return download(name, cache_dir)
    if os.path.isfile(name):
        return Path(name)
    raise ValueError(f"unknown model {str(name)!r}: neither one of {', '.join(MODELS)} nor a weights file")

def read_weights(path, activation=None):
    s = read_state_dict(path)
    extra = ("input_resolution", "context_length", "vocab_size")
    s = {k: v for k, v in s.items() if k not in extra}
    return Weights(s, activation or "quickgelu", 64, MEAN, STD, ())
