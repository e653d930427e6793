"""Stand-ins: random checkpoints that everything takes for the real one, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from pytest_qsens import QsensError, files
from pytest_qsens.cli import main
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models import qwen2_5_vl, standin, standin_weights
from pytest_qsens.models.checkpoint import Checkpoint
from pytest_qsens.models.data import Data
from pytest_qsens.models.directory import DirectorySource
from pytest_qsens.models.qwen2_5_vl import CONFIG_3B, MARKS, SPECIAL_TOKENS
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from tests.checkpoints import BUILDERS, TEXT_SIZES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_qsens.models.standin import Written

FIRST = 300
"""Id of the first special token of the small model, behind the 256 bytes and a few words."""

SMALL: dict[str, Any] = {
    **CONFIG_3B,
    **{key: FIRST + value - 151643 for key, value in CONFIG_3B.items() if key.endswith("token_id")},
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "vocab_size": 384,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vision_config": {
        **CONFIG_3B["vision_config"],
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    },
}
SHARD_BYTES = 200_000


def small_files(directory: Path) -> None:
    """Write what a preset writes, for the small model."""
    qwen2_5_vl.write_files(directory, SMALL)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``small`` be a preset."""
    monkeypatch.setitem(standin.PRESETS, "small", small_files)


def make(directory: Path, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Written:
    """Write a small stand-in."""
    return standin.write("small", directory, seed, shard_bytes=shard_bytes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """Write a small stand-in, for reading only."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(standin.PRESETS, "small", small_files)
        yield make(tmp_path_factory.mktemp("made") / "small")


def content(directory: Path) -> dict[str, bytes]:
    """Give all files of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Read all weights with the safetensors library."""
    shards = sorted(directory.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def loaded(directory: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, dict[str, Any]]:
    """Load with transformers; also what it did not find, did not know or could not fit."""
    loader: Any = Qwen2_5_VLForConditionalGeneration
    model, info = loader.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def test_a_seed_means_the_same_bytes(made: Written, tmp_path: Path) -> None:
    """A stand-in is told completely by its name and seed: nobody has to send gigabytes to repeat a run."""
    make(tmp_path / "again")
    assert content(tmp_path / "again") == content(made.directory)


def test_another_seed_means_other_weights(made: Written, tmp_path: Path) -> None:
    """Every tensor differs; config, tokenizer and names do not."""
    make(tmp_path / "other", seed=1)
    one, other = weights(made.directory), weights(tmp_path / "other")
    assert one.keys() == other.keys()
    assert not [name for name, tensor in one.items() if torch.equal(tensor, other[name])]
    small = [name for name in content(made.directory) if not name.endswith((".safetensors", ".md"))]
    assert {name: (tmp_path / "other" / name).read_bytes() for name in small} == {
        name: (made.directory / name).read_bytes() for name in small
    }


def test_values_depend_on_the_name_alone(made: Written, tmp_path: Path) -> None:
    """Not on which other tensors there are, nor on how they are cut into files: a larger model has the same start."""
    make(tmp_path / "whole", shard_bytes=10**9)
    one, other = weights(made.directory), weights(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "whole").glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert not [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert len({tensor.flatten()[0].item() for tensor in one.values() if tensor.dim() > 1}) > 15


def test_shards_and_index_are_as_on_the_hub(made: Written) -> None:
    """Files are numbered, none is larger than asked for, the index names each tensor's file and their total size."""
    shards = sorted(made.directory.glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    index = json.loads((made.directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    tensors = weights(made.directory)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in tensors.values())
    assert made.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert made.nbytes == sum(path.stat().st_size for path in made.directory.iterdir())
    for path in shards:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        if len(load_file(path)) > 1:
            assert len(data) - 8 - length <= SHARD_BYTES


def test_transformers_finds_every_weight(made: Written) -> None:
    """Nothing is missing, unknown or of another shape; values arrive, under the names that transformers gives them."""
    model, info = loaded(made.directory)
    assert not any(info.values()), info
    state, stored = model.state_dict(), weights(made.directory)
    for name, tensor in stored.items():
        inside = re.sub("^visual", "model.visual", re.sub("^model", "model.language_model", name))
        assert torch.equal(state[inside], tensor.float()), name
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert state.keys() - {"lm_head.weight"} == {
        re.sub("^visual", "model.visual", re.sub("^model", "model.language_model", name)) for name in stored
    }


def test_batches_with_images_give_logits(made: Written) -> None:
    """Our own batches pass through the model: an image becomes tokens, logits are finite and differ between tokens."""
    source = resolve(ModelRequest(str(made.directory)))
    source.check()
    spec = source.load()
    assert isinstance(spec.model, torch.nn.Module)
    assert {"pixel_values" in batch for batch in spec.evaluation} == {True, False}
    for batch in spec.evaluation:
        logits = spec.output(spec.model(**batch), batch)
        assert logits.isfinite().all()
        assert logits.std() > 0.1
        assert logits.std(dim=0).mean() > 0.1
        tokens = int(batch["image_grid_thw"].prod()) // 4 if "image_grid_thw" in batch else 0
        assert int((batch["input_ids"] == SMALL["image_token_id"]).sum()) == tokens


def test_prompts_are_in_the_format_of_the_model(made: Written) -> None:
    """A default system prompt, the image before the text, and the turn of the assistant: as Qwen2.5-VL was trained."""
    spec = resolve(ModelRequest(str(made.directory))).load()
    text = AutoTokenizer.from_pretrained(made.directory).decode(spec.evaluation[0]["input_ids"][0])
    assert re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", text) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many squares are there?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_same_few_channels_are_outliers_in_every_layer(made: Written) -> None:
    """What makes trained models hard to quantize is there: activations of 6 and more, where others stay below 4."""
    spec = resolve(ModelRequest(str(made.directory))).load()
    model: Any = spec.model
    inputs: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:  # noqa: ANN401 # a hook
        return lambda _, arguments: inputs.__setitem__(name, arguments[0].abs().flatten(0, -2))

    layers, blocks = model.model.language_model.layers, model.model.visual.blocks
    for number in range(2):
        layers[number].self_attn.q_proj.register_forward_pre_hook(watch(f"text {number}"))
        layers[number].mlp.up_proj.register_forward_pre_hook(watch(f"text mlp {number}"))
        blocks[number].attn.qkv.register_forward_pre_hook(watch(f"vision {number}"))
    model(**spec.evaluation[0])
    assert len(inputs) == 6
    for name, values in inputs.items():
        width, count = (64, 1) if "vision" in name else (128, 2)
        largest = values.amax(dim=0)
        channels = standin_weights.outlier_channels(width, count, 0)
        assert sorted(largest.topk(count).indices.tolist()) == sorted(channels.tolist()), name
        assert largest[channels].min() > 6, name
        assert largest[channels].min() > 5 * largest.median(), name


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the small files of the true model."""
    directory = tmp_path_factory.mktemp("full")
    standin.PRESETS["qwen2_5_vl_3b"](directory)
    return directory


def test_the_full_model_has_its_true_size(full: Path) -> None:
    """416 linear layers and convolutions and one embedding, 3.75 B parameters, under the names of the hub's files."""
    skeleton: Any = DirectorySource(Checkpoint(full), Data(None, None, None)).skeleton()
    assert Counter(op.type for op in list_ops(skeleton)) == {"linear": 415, "conv3d": 1, "embedding": 1}
    planned = standin_weights.plan(skeleton)
    assert sum(tensor.values for tensor in planned) == 3_754_622_976
    assert sum(tensor.nbytes for tensor in planned) == 7_509_245_952
    numbers = Counter(re.sub(r"\.\d+\.", ".N.", tensor.name) for tensor in planned)
    linears = ("q_proj", "k_proj", "v_proj")
    layer = [f"self_attn.{name}.{part}" for name in linears for part in ("weight", "bias")]
    layer += ["self_attn.o_proj.weight", *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    block = ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert numbers == {
        "model.embed_tokens.weight": 1,
        "model.norm.weight": 1,
        **{f"model.layers.N.{name}": 36 for name in layer},
        "visual.patch_embed.proj.weight": 1,
        "visual.merger.ln_q.weight": 1,
        "visual.merger.mlp.N.weight": 2,
        "visual.merger.mlp.N.bias": 2,
        **{f"visual.blocks.N.{name}.{part}": 32 for name in block for part in ("weight", "bias")},
        **{f"visual.blocks.N.norm{number}.weight": 32 for number in (1, 2)},
    }
    assert {t.outliers for t in planned if t.kind == "norm"} == {6}
    assert len(list(standin_weights._shards(planned, standin_weights.SHARD_BYTES))) == 2


def test_the_full_model_has_its_true_tokens(full: Path) -> None:
    """Special tokens have the ids that the config names, as many tokens are known, and any text comes back."""
    tokenizer = AutoTokenizer.from_pretrained(full)
    assert tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *MARKS]) == list(range(151643, 151665))
    assert len(tokenizer) == 151665
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151645, 151643)
    config = json.loads((full / "config.json").read_text())
    for name in ("vision_start", "vision_end", "image", "video"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        assert tokenizer(f"a{token}b").input_ids.count(config[f"{name}_token_id"]) == 1
    text = "How many squares? \N{SNOWMAN} 東京\t\n  3.14"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())


def test_the_preset_takes_its_stand_in(made: Written) -> None:
    """The command that is told at the end works: the checkpoint is what the preset expects."""
    source = resolve(ModelRequest("qwen2_5_vl_3b", checkpoint=str(made.directory)))
    source.check()
    assert source.label == "qwen2_5_vl_3b"
    assert made.command == f"pytest --qsens-model small --qsens-checkpoint {made.directory}"


@pytest.mark.parametrize("name", BUILDERS)
def test_any_config_gets_a_stand_in(name: str, snapshots: dict[str, Path], tmp_path: Path) -> None:
    """A directory with config and tokenizer is enough, also where statistics of a batch norm or tied weights are."""
    written = standin.write(str(snapshots[name]), tmp_path / "made", shard_bytes=20_000)
    assert written.command == f"pytest --qsens-model {tmp_path / 'made'}"
    source = resolve(ModelRequest(str(written.directory)))
    source.check()
    spec = source.load()
    assert isinstance(spec.model, torch.nn.Module)
    spec.model.float()
    for batch in spec.evaluation:
        output = spec.output(spec.model(**batch), batch)
        assert output.isfinite().all()
        assert output.std() > 0
    assert not {path.suffix for path in written.directory.iterdir()} & {".py", ".bin"}


def test_a_config_file_means_its_directory(snapshots: dict[str, Path], tmp_path: Path) -> None:
    """The file is what a user has at hand; tokenizer files are taken from beside it, old weights are not."""
    standin.write(str(snapshots["bert"] / "config.json"), tmp_path / "made")
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"tokenizer.json", "model-00001-of-00001.safetensors"} <= names
    assert "model.safetensors" not in names


def test_a_buffer_of_computed_values_is_not_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers in place of computed ones would make another model: refused, with the name."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(4.0))
            self.config = SimpleNamespace(sub_configs={}, hidden_size=4)
            self.all_tied_weights_keys: dict[str, str] = {}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", lambda _, state: state)
    with pytest.raises(QsensError, match="Odd: its checkpoints hold the buffer 'table'"):
        standin_weights.plan(Odd())  # type: ignore[arg-type] # what is needed of a model is there


def test_large_tensors_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays small whatever the tensor's size: values come in chunks that together fill it."""
    monkeypatch.setattr(standin_weights, "CHUNK", 1000)
    chunks = list(standin_weights.draw(standin_weights.Planned("w", (50, 51), "normal", 0.5), seed=3))
    assert [len(chunk) for chunk in chunks] == [1000, 1000, 550]
    values = torch.cat(chunks).float()
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 0.5) < 0.05


def test_what_is_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress goes to stderr, a line a file; at the end parameters, size, time and the command to run next."""
    directory = tmp_path / "a b"
    assert main(["standin", "small", str(directory), "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"qsens: model-00001-of-00001\.safetensors: 1\.\d\d MB, \d+ s\n", err)
    assert re.fullmatch(
        rf"wrote {directory}: 0\.\d\d M parameters, 1\.\d\d MB, \d+ s\n"
        rf"The weights are random: scores will say nothing about the model\.\n"
        rf"next: pytest --qsens-model small --qsens-checkpoint '{directory}'\n",
        out,
    )
    assert "seed 7" in (directory / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    """A directory made beforehand is as good as none, also through a link to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    assert make(tmp_path / "link").directory == tmp_path / "disk"
    assert (tmp_path / "link").is_symlink()
    Checkpoint(tmp_path / "link").check()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must end in exit code 4 with one line that is given."""
    assert main(["standin", *map(str, arguments)]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_what_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files in the directory, or a file in its place, stay as they are."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    assert f"{tmp_path}/full is not empty, and nothing is replaced. Choose" in refused(
        capsys, "small", tmp_path / "full"
    )
    assert f"{tmp_path}/full/precious is a file, and" in refused(capsys, "small", tmp_path / "full" / "precious")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious"]


def test_a_place_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped path is not made; the message says how to."""
    err = refused(capsys, "small", tmp_path / "typo" / "small")
    assert f"no such directory: {tmp_path}/typo. Make it with `mkdir -p {tmp_path}/typo`." in err
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Found out before anything is drawn. Nobody, not even root, can make files in /proc."""
    assert "/proc is not writable" in refused(capsys, "small", "/proc/small")


def test_a_disk_that_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven gigabytes are not begun where they do not fit: the message says how much is needed and how much is free."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=7_000_000_000))
    err = refused(capsys, "qwen2_5_vl_3b", tmp_path / "large")
    assert f"{tmp_path}/large needs 7.53 GB, but only 7.00 GB are free in {tmp_path}. Free some space" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("qwen2_5_vl_3", "no stand-in can be made for 'qwen2_5_vl_3' (did you mean qwen2_5_vl_3b?). Known: qwen2_5"),
        ("minilm", "no stand-in can be made for 'minilm'. Known: qwen2_5_vl_3b"),
        ("{tmp}/empty", "empty directory: {tmp}/empty"),
        ("{tmp}/other/config.json", "{tmp}/other/config.json: transformers"),
        ("{tmp}/quantized", "{tmp}/quantized is already quantized (gptq)"),
        ("{tmp}/wrong", "cannot make the model of {tmp}/wrong: The hidden size (32)"),
    ],
)
def test_a_source_that_is_none(source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name or directory is quoted, with what is wrong and what would be right; nothing is left behind."""
    bert = {"model_type": "bert", "architectures": ["BertModel"], **TEXT_SIZES}
    for name, config in {
        "other": {**bert, "architectures": ["BertModell"]},
        "quantized": {**bert, "quantization_config": {"quant_method": "gptq"}},
        "wrong": {**bert, "num_attention_heads": 3},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    assert message.format(tmp=tmp_path) in refused(capsys, source.format(tmp=tmp_path), tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "other", "quantized", "wrong"]


SCRIPT = """
    import resource, signal, sys, time
    from pathlib import Path
    from pytest_qsens.cli import main
    from pytest_qsens.models import standin_weights

    mode, source, directory = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without
    if mode == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    else:
        real = standin_weights.draw

        def draw(tensor, seed):
            if tensor.name == "encoder.layer.1.output.dense.weight":
                print("now", flush=True)
                time.sleep(600)
            return real(tensor, seed)

        standin_weights.draw = draw
    sys.exit(main(["standin", source, directory]))
"""


def start(mode: str, source: Path, directory: Path) -> subprocess.Popen[str]:
    """Start the command in a process of its own, with files limited to 20 kB, or stopping at a tensor of layer 1."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), mode, str(source), str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_fills_up(snapshots: dict[str, Path], tmp_path: Path) -> None:
    """Half a checkpoint is worse than none: nothing stays, and the reason is the system's own."""
    with start("full", snapshots["bert"], tmp_path / "made") as process:
        out, err = process.communicate()
    assert process.returncode == 4
    assert out == ""
    assert re.search(rf"qsens: cannot write {tmp_path}/made: File too large \(.*\)\. Nothing of it is kept", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_cleans_up(number: signal.Signals, snapshots: dict[str, Path], tmp_path: Path) -> None:
    """Ctrl-C and a time limit leave no gigabytes behind."""
    with start("wait", snapshots["bert"], tmp_path / "made") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        assert any(tmp_path.glob(".made.standin.tmp/*.safetensors"))
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_checkpoint(snapshots: dict[str, Path], tmp_path: Path) -> None:
    """Nothing has the directory's name until all is there; the next run clears what the killed one left."""
    with start("wait", snapshots["bert"], tmp_path / "made") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "made").exists()
    assert list(tmp_path.glob(".made.standin.tmp/*.safetensors"))
    make(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    Checkpoint(tmp_path / "made").check()


def test_two_runs_do_not_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a living process writes is not taken for the left-over of a dead one."""
    monkeypatch.setattr(files, "LOCK_TIMEOUT_SECONDS", 0.1)
    other = tmp_path / ".made.standin.tmp"
    other.mkdir()
    holder = "import sys, pathlib, pytest_qsens.files as f\nwith f.locked(pathlib.Path(sys.argv[1])): print(); input()"
    command = [sys.executable, "-c", holder, str(tmp_path / "made")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(QsensError, match="made is locked by another process"):
            make(tmp_path / "made")
        process.communicate("\n")
    assert other.is_dir()
