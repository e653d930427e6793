"""Build and load transformers models: on the meta device from the config, or with weights."""

from __future__ import annotations

import pickle
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qsens.errors import QsensError
from pytest_qsens.models.processors import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from pytest_qsens.models.checkpoint import Checkpoint


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module on the meta device; on the CPU, if something in it cannot be built without values.

    The caller's random state is left as it was.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (NotImplementedError, RuntimeError):  # weight norms, and code that reads values back
            return build()


def load_class(checkpoint: Checkpoint) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the model class that the checkpoint's config names, and the config.

    Raises:
        QsensError: If the config does not suit the class.

    """
    import transformers

    model_class = getattr(transformers, checkpoint.architecture)
    config_class = getattr(model_class, "config_class", None)
    if config_class is None:
        raise QsensError(f"{checkpoint.directory / 'config.json'}: {checkpoint.architecture!r} is not a model class.")
    with explained("config", checkpoint.directory):
        config = config_class.from_pretrained(checkpoint.directory, local_files_only=True)
    return model_class, config


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load all weights as they are stored, in evaluation mode, without gradients.

    Those of safetensors stay in the mapped files; pickled ones are loaded in fp32. Buffers are made in fp32.

    Raises:
        QsensError: If a weight is missing, of another shape, or unreadable.

    """
    import torch

    model_class, config = load_class(checkpoint)
    with explained("model", checkpoint.directory), _tensors_only(checkpoint), _quiet():
        loader: Any = model_class  # annotated as if there were no output_loading_info
        model, info = loader.from_pretrained(
            checkpoint.directory if checkpoint.pickled else None,
            state_dict=None if checkpoint.pickled else _mapped(checkpoint),
            config=config,
            dtype=torch.float32,
            weights_only=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    name, directory = model_class.__name__, checkpoint.directory
    if mismatched := sorted(info["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise QsensError(
            f"{len(mismatched)} weights in {directory} have another shape than config.json asks for: {key!r} is "
            f"{tuple(found)}, {name} needs {tuple(expected)}. Weights and config are of different models."
        )
    if missing := sorted(info["missing_keys"]):
        raise QsensError(
            f"{directory} lacks {len(missing)} weights that {name} needs: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}. They would be random; check 'architectures' in config.json, or "
            f"download the checkpoint again."
        )
    loaded: PreTrainedModel = model.eval()
    loaded.requires_grad_(requires_grad=False)
    _as_stored(loaded)
    return loaded


def _mapped(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of the safetensors files, in mapped memory; narrow ones pass as fp32, so that nobody casts them."""
    from safetensors import safe_open

    from pytest_qsens.graph.narrow import NARROW, NarrowWeight

    found: dict[str, Tensor] = {}
    for path in checkpoint.safetensors:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                tensor = file.get_tensor(name)
                found[name] = NarrowWeight(tensor) if tensor.dtype in NARROW else tensor
    return found


def _as_stored(model: nn.Module) -> None:
    """Put what passed as fp32 into a model as what it is; parameters that were one stay one."""
    from torch.nn import Parameter

    from pytest_qsens.graph.narrow import NarrowWeight

    made: dict[int, Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001 - as `nn.Module.float` goes through them
            if isinstance(parameter, NarrowWeight):
                key = id(parameter)
                made.setdefault(key, Parameter(parameter.stored, requires_grad=False))
                module._parameters[name] = made[key]  # noqa: SLF001


@contextmanager
def _tensors_only(checkpoint: Checkpoint) -> Iterator[None]:
    """Say what is wrong with a pickle in place of torch, which advises to run whatever it holds."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is damaged"
        raise QsensError(
            f"the pickled weights in {checkpoint.directory} cannot be read: {what}, and nothing but tensors is ever "
            f"unpickled. Download them again, or give safetensors."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' progress bars and loading report; what matters in it becomes an error."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
