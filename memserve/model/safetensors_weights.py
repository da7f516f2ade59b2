"""SafetensorsWeights: the weights in a Hugging Face directory. Knows no model: a file's tensors are given as they lie.

Files are mapped, not read: a tensor is a view of the mapped pages until the model copies it into its own memory once.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from memserve.model.weights import WeightFileError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class SafetensorsWeights:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists; a WeightSource.

    Every file is opened, and its header checked against its size and the index, before the first tensor is read.
    Raises WeightFileError naming the file that is missing, truncated or corrupt.
    """

    def __init__(self, directory: Path | str) -> None:
        self._directory = Path(directory)
        names_by_file = self._read_index()
        self._files: dict[str, Any] = {}
        for file, names in sorted(names_by_file.items()):
            opened = _open(self._directory / file)
            held = set(opened.keys())
            if names is not None and not names <= held:
                first = min(names - held)
                raise WeightFileError(
                    f"{self._directory / file}: has no tensor {first!r}, which {INDEX_FILE} puts there"
                )
            self._files.update(dict.fromkeys(held if names is None else names, opened))

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise WeightFileError(f"{self._directory}: tensor {name!r} cannot be read: {error}") from error
        return tensor

    def _read_index(self) -> Mapping[str, set[str] | None]:
        """File name -> the tensors to take from it, None for all of them."""
        if (self._directory / SINGLE_FILE).is_file():
            return {SINGLE_FILE: None}
        path = self._directory / INDEX_FILE
        if not path.is_file():
            raise WeightFileError(
                f"{self._directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}{self._what_is_there()}"
            )
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise WeightFileError(f"{path}: expected JSON with a 'weight_map': {error!r}") from error
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise WeightFileError(f"{path}: 'weight_map': expected the name of a file for each tensor")
        names_by_file: defaultdict[str, set[str]] = defaultdict(set)
        for name, file in weight_map.items():
            names_by_file[file].add(name)
        missing = [file for file in names_by_file if not (self._directory / file).is_file()]
        if missing:
            raise WeightFileError(
                f"{self._directory}: {len(missing)} of {len(names_by_file)} shards are missing: {missing}"
            )
        return names_by_file

    def _what_is_there(self) -> str:
        pickles = sorted(p.name for p in self._directory.glob("*.bin"))
        return (
            f" (of {', '.join(pickles)}: pickled weights are not read, convert them to safetensors)" if pickles else ""
        )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightFileError(f"{path}: truncated or corrupt ({path.stat().st_size} bytes): {error}") from error
