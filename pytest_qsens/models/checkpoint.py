"""A Hugging Face snapshot directory, as files: what can be told and what can be wrong without loading weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError
from pytest_qsens.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SAFE_WEIGHTS = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
FACTORY_HINT = "write a factory that returns a ModelSpec and pass `--qsens-model package.module:factory`"


@dataclass(frozen=True)
class Checkpoint:
    """A directory with ``config.json``, weights, and the files of a tokenizer or processor."""

    directory: Path
    allow_pickle: bool = False

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``.

        Raises:
            QsensError: If the directory or the file is missing, or it is not a JSON object.

        """
        directory = self.directory
        if not directory.is_dir():
            what = "not a directory" if directory.exists() else "no such directory"
            raise QsensError(f"{what}: {directory}. Give a directory with a Hugging Face snapshot.")
        path = directory / "config.json"
        if not path.is_file():
            what = "no config.json in" if any(directory.iterdir()) else "empty directory:"
            raise QsensError(
                f"{what} {directory}. A Hugging Face snapshot holds config.json, *.safetensors and the files of its "
                f"tokenizer or processor; `hf download ORG/NAME --local-dir DIR` makes one."
            )
        return _read_object(path)

    @property
    def architecture(self) -> str:
        """Class name of the model in transformers.

        Raises:
            QsensError: If the config names none, or one that transformers does not have.

        """
        names = self.config.get("architectures")
        where = self.directory / "config.json"
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise QsensError(
                f"{where} names no architecture: 'architectures' is {names!r}. Add the class name that transformers "
                f'gives this model, for example "architectures": ["LlamaForCausalLM"].'
            )
        name = names[0]
        import transformers  # lazy: its names are known without importing torch

        known = dir(transformers)
        if name in known:
            return name
        if "auto_map" in self.config:
            raise QsensError(
                f"{where}: architecture {name!r} is not part of transformers {transformers.__version__}; it comes with "
                f"code in the checkpoint (auto_map), and code from a checkpoint is never run. Read it, then "
                f"{FACTORY_HINT}."
            )
        raise QsensError(
            f"{where}: transformers {transformers.__version__} has no architecture {name!r}{did_you_mean(name, known)}"
            f". Upgrade transformers if the model is newer, or {FACTORY_HINT}."
        )

    @property
    def safetensors(self) -> list[Path]:
        """Files with the weights, unless they are pickled.

        Raises:
            QsensError: If one is missing.

        """
        return list(self._check_shards(SAFE_INDEX, SAFE_WEIGHTS))

    @property
    def pickled(self) -> bool:
        """Whether the only weights are pickled ones."""
        names = {path.name for path in self.directory.iterdir()}
        return not names & {SAFE_WEIGHTS, SAFE_INDEX} and bool(names & {PICKLED_WEIGHTS, PICKLED_INDEX})

    def check_config(self) -> None:
        """Check that the config is of a known architecture, not quantized already, and without an adapter.

        Raises:
            QsensError: Naming the file and what to do.

        """
        _ = self.architecture
        if (method := self.config.get("quantization_config")) is not None:
            name = method.get("quant_method", method) if isinstance(method, dict) else method
            raise QsensError(
                f"{self.directory} is already quantized ({name}). Sensitivity is measured from full-precision "
                f"weights: give the checkpoint it was made from."
            )
        if (adapter := self.directory / "adapter_config.json").exists():
            raise QsensError(
                f"{adapter}: an adapter lies beside the weights, and it would not be measured. Merge it into them "
                "(peft: `merge_and_unload`), or take the file away to measure the model without it."
            )

    def check(self) -> None:
        """Check config and weight files; of the weights, only headers are read.

        Raises:
            QsensError: Naming the file and what to do.

        """
        self.check_config()
        check_weight_names((path.name for path in self.directory.iterdir()), str(self.directory), self.allow_pickle)
        if self.pickled:
            self._check_shards(PICKLED_INDEX, PICKLED_WEIGHTS)
            return
        for file, expected in self._check_shards(SAFE_INDEX, SAFE_WEIGHTS).items():
            present = _safetensors_names(file)
            if missing := sorted(expected - present):
                raise QsensError(
                    f"{file} lacks {missing[0]!r}, which {SAFE_INDEX} says it holds ({len(missing)} such). "
                    f"Download the checkpoint again."
                )

    def _check_shards(self, index_name: str, single_name: str) -> dict[Path, set[str]]:
        """Return every weight file with the tensor names the index promises in it."""
        if (self.directory / single_name).is_file():
            return {self.directory / single_name: set()}
        index = self.directory / index_name
        weight_map = _read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise QsensError(f"{index} has no 'weight_map'. Download the checkpoint again.")
        shards: dict[Path, set[str]] = {}
        for tensor, name in weight_map.items():
            shards.setdefault(self.directory / str(name), set()).add(tensor)
        if missing := sorted(path.name for path in shards if not path.is_file()):
            raise QsensError(
                f"{self.directory} lacks {len(missing)} of {len(shards)} weight files named in {index_name}: "
                f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Finish the download "
                f"(`hf download` resumes)."
            )
        return shards


def check_weight_names(names: Iterable[str], where: str, allow_pickle: bool) -> None:
    """Find loadable weights among file names.

    Raises:
        QsensError: If there are none, or only pickled ones and these are not allowed.

    """
    present = set(names)
    if present & {SAFE_WEIGHTS, SAFE_INDEX}:
        return
    pickled = sorted(present & {PICKLED_WEIGHTS, PICKLED_INDEX})
    if pickled and not allow_pickle:
        raise QsensError(
            f"{where} has pickled weights only ({pickled[0]}). Unpickling can run code: if you trust the source, pass "
            f"--qsens-allow-pickle; better, convert them to safetensors."
        )
    if not pickled:
        raise QsensError(f"no weights in {where}: neither {SAFE_WEIGHTS} nor {SAFE_INDEX}. Finish the download.")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QsensError(f"cannot read {path}: {error}. Download the checkpoint again.") from None
    if not isinstance(content, dict):
        raise QsensError(f"{path} is not a JSON object. Download the checkpoint again.")
    return content


def _safetensors_names(path: Path) -> set[str]:
    """Tensor names in a file whose header is well formed and covered by the file's length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        size = path.stat().st_size
        raise QsensError(
            f"{path} ({size} bytes) is truncated or not a safetensors file: {error}. Download it again."
        ) from None
