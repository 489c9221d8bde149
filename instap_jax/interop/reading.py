"""Opens weight files without running anything in them: .safetensors, and torch's .pt, .pth, .bin.

torch is needed for its own files only. Their pickles are opened with `weights_only=True`, always.
Tensors come one by one: a file is mapped, not loaded.
"""

import argparse
import collections
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - makes bfloat16 known to NumPy
import numpy as np

from instap_jax.errors import UserError
from instap_jax.interop.keys import Shape

# What Hugging Face calls the weights in a model's directory, in the order of preference.
INDEX = ".index.json"  # of weights in several files, which it names
DIRECTORY_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Where training scripts keep the weights beside other state (UMT: 'model'; DeepSpeed: 'module').
ENVELOPES = ("model", "module", "state_dict")
# Classes that training scripts keep their arguments in, read as plain data: UMT's stage 1, and its
# stage 2, whose own class is a dict; no code of it runs.
_DATA = [argparse.Namespace, (collections.OrderedDict, "utils.easydict.EasyDict")]


class Weights:
    """The tensors of one file, or of the several that an index names, by name.

    Attributes:
      path: of the file, or of the index. files: that hold the tensors.
      shapes: name -> shape.
      beside: what the file holds besides weights (an optimizer's state, ...), by name.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Shape],
        read: Callable[[str], np.ndarray],
        beside: Iterable[str] = (),
        files: Sequence[Path] = (),
    ):
        self.path = path
        self.files = tuple(files) or (path,)
        self.shapes = dict(shapes)
        self.beside = tuple(beside)
        self._read = read
        self._names = {name: name for name in shapes}

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file."""
        try:
            return self._read(self._names[name])
        except Exception as error:
            raise UserError(f"{self.path}: {name!r} cannot be read ({_first(error)})") from error

    def rename(self, change: Callable[[str], str]) -> None:
        """Other names from here on.

        Raises:
          UserError: when two tensors would have the same.
        """
        names: dict[str, str] = {}
        for name, stored in self._names.items():
            if (other := change(name)) in names:
                raise UserError(f"{self.path}: {names[other]!r} and {stored!r} are the same tensor")
            names[other] = stored
        self.shapes = {change(name): shape for name, shape in self.shapes.items()}
        self._names = names

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        return self.read(name).nbytes

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self.shapes)


def locate(path: Path) -> Path:
    """The weight file that a path names: itself, or the one in a model's directory.

    Raises:
      UserError: there is none, or more than one it might be.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory")
    for name in DIRECTORY_FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(child for child in path.iterdir() if child.suffix in SUFFIXES)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{path}: no weights in it ({', '.join('*' + s for s in SUFFIXES)})")
    raise UserError(f"{path}: {len(found)} weight files in it; name one, as {found[0]}")


def open_weights(path: Path) -> Weights:
    """Opens a weight file.

    Raises:
      UserError: it is damaged, of no known format, needs torch that is not installed, or is a
        program and not weights.
    """
    if path.name.endswith(INDEX):
        return _open_index(path)
    if path.suffix == ".safetensors":
        weights = _open_safetensors(path)
    elif path.suffix in SUFFIXES:
        weights = _open_torch(path)
    else:
        raise UserError(f"{path}: not one of {', '.join('*' + suffix for suffix in SUFFIXES)}")
    if not weights.shapes:
        raise UserError(f"{path}: holds no tensors")
    if all(name.startswith("module.") for name in weights.shapes):  # DistributedDataParallel
        weights.rename(lambda name: name.removeprefix("module."))
    return weights


def read_config(path: Path, name: str = "config.json") -> dict[str, Any] | None:
    """What describes the model beside a weight file, by default as Hugging Face calls it; None
    where there is none.

    Raises:
      UserError: when it is damaged.
    """
    file = path.parent / name
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not JSON ({_first(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not the description of a model")
    return content


def hugging_face_heads(file: Path, said: Mapping[str, Any], wanted: Mapping[str, Any]) -> int:
    """Attention heads, which no tensor shows, as Hugging Face's description of a model says.

    Args:
      file: of the description, for messages. said: what it says, absent fields with the defaults.
      wanted: field -> what it is in the tensors.

    Raises:
      UserError: it is another model's, or its heads are no number of heads.
    """
    for field, value in wanted.items():
        if said[field] != value:
            raise UserError(
                f"{file}: {field} is {said[field]!r}, but {value} in the weights; take the file "
                "that belongs to them"
            )
    heads = said["num_attention_heads"]
    if type(heads) is not int or heads < 1:
        raise UserError(f"{file}: num_attention_heads is {heads!r}, no number of heads")
    return heads


def digest(files: Sequence[Path]) -> str:
    """sha256 of a file, or of several one after the other."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def _open_index(path: Path) -> Weights:
    """Hugging Face's way of cutting large weights into several files."""
    said = read_config(path, path.name) or {}
    places = said.get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else set()
    if not names or any(not isinstance(n, str) or n != Path(n).name for n in names):
        raise UserError(f"{path}: names no weight files beside it (weight_map)")
    files = [path.with_name(name) for name in sorted(names)]
    if absent := [file for file in files if not file.is_file()]:
        raise UserError(f"{absent[0]}: no such file, but {path.name} names it")
    parts = [open_weights(file) for file in files]
    owners = {name: part for part in parts for name in part.shapes}
    if len(owners) < sum(len(part.shapes) for part in parts):
        raise UserError(f"{path}: a tensor lies in two of its {len(files)} files")
    shapes = {name: part.shapes[name] for name, part in owners.items()}
    return Weights(path, shapes, lambda name: owners[name].read(name), files=files)


def _open_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="np")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({_first(error)})") from error
    return Weights(path, shapes, file.get_tensor)


def _open_torch(path: Path) -> Weights:
    _refuse_programs(path)
    content = _load_torch(path)
    torch = _torch(path)
    beside: list[str] = []
    if isinstance(content, dict):
        envelope = next((key for key in ENVELOPES if isinstance(content.get(key), dict)), None)
        if envelope:
            beside = [str(key) for key in content if key != envelope]
            content = content[envelope]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
    shapes = {name: tuple(value.shape) for name, value in content.items()}
    return Weights(path, shapes, lambda name: _numpy(torch, content[name]), beside)


def _load_torch(path: Path) -> Any:
    torch = _torch(path)
    try:
        with torch.serialization.safe_globals(_DATA):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"names {found[1]!r}" if found else "is no plain pickle of tensors"
        raise UserError(
            f"{path}: not opened: it {what}, and opening that may run code; where you trust it, "
            "save its tensors alone, by name: C = torch.load(FILE, weights_only=False); "
            "torch.save(C['model'], OTHER), or what holds them in C; of a module C.state_dict()"
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, ValueError, KeyError ...
        raise UserError(f"{path}: truncated or damaged ({_first(error)})") from error


def _torch(path: Path):
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading {path.suffix} files needs torch: pip install -e '.[torch]', or "
            "save the weights as .safetensors"
        ) from error
    return torch


def _refuse_programs(path: Path) -> None:
    """OpenAI publishes CLIP as a TorchScript archive: a program, which is never run here."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(
            f"{path}: a TorchScript archive, that is a program; where you trust it, turn it into "
            f"weights: python -c \"import torch; torch.save(torch.jit.load('{path.name}', 'cpu')"
            f".state_dict(), '{path.stem}_weights.pt')\""
        )


def _numpy(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # NumPy has none; float32 holds it exactly
        tensor = tensor.float()
    return tensor.numpy()


def _first(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0][:150].rstrip(".")
    return text or type(error).__name__
