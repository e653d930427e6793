"""From a directory to outputs: every kind of model gets batches from its own tokenizer or processor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_qsens import QsensError
from pytest_qsens.graph.modules import list_ops
from pytest_qsens.models.resolve import resolve
from pytest_qsens.models.source import ModelRequest
from tests.checkpoints import BUILDERS, TEXT_SIZES, bert, save, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_qsens import ModelSpec
    from tests.models.conftest import WriteFile

PRESETS = ("tiny_qwen2_5_vl", "minilm")


def load(model: str | Path, **options: object) -> ModelSpec:
    """Check and load a model."""
    source = resolve(ModelRequest(str(model), **options))  # type: ignore[arg-type] # spelled out by each test
    source.check()
    return source.load()


@pytest.mark.parametrize("name", [*BUILDERS, *PRESETS])
def test_every_kind_of_model_runs_on_its_default_batches(name: str, snapshots: dict[str, Path]) -> None:
    """Each batch gives a finite output that differs between batches; weights are fp32, frozen, in evaluation mode."""
    spec = load(snapshots.get(name, name))
    assert isinstance(spec.model, torch.nn.Module)
    assert not spec.model.training
    assert {p.dtype for p in spec.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in spec.model.parameters())
    assert 1 <= len(spec.evaluation) <= 4
    for batch in [*spec.calibration, *spec.evaluation]:
        output = spec.output(spec.model(**batch), batch)
        assert output.is_floating_point()
        assert output.numel() > 0
        assert output.isfinite().all()
        assert output.std() > 0


@pytest.mark.parametrize("name", [*BUILDERS, *PRESETS])
def test_the_skeleton_has_the_ops_of_the_loaded_model(name: str, snapshots: dict[str, Path]) -> None:
    """Tests are collected from the skeleton and run on the model: both must list the same ops in the same order."""
    source = resolve(ModelRequest(str(snapshots.get(name, name))))
    model = source.load().model
    assert isinstance(model, torch.nn.Module)
    assert list_ops(source.skeleton()) == list_ops(model)


@pytest.mark.parametrize("name", ["bert", "llama", "qwen2_5_vl", "tiny_qwen2_5_vl", "minilm"])
def test_the_skeleton_holds_no_memory(name: str, snapshots: dict[str, Path]) -> None:
    """Collecting a model of any size must not allocate its weights."""
    skeleton = resolve(ModelRequest(str(snapshots.get(name, name)))).skeleton()
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_padding_is_not_scored(name: str, snapshots: dict[str, Path]) -> None:
    """A score averaged over padding would depend on how texts are grouped into batches."""
    spec = load(snapshots[name])
    batch = spec.evaluation[0]
    mask = batch["decoder_attention_mask" if name == "t5" else "attention_mask"]
    assert 0 < mask.sum() < mask.numel()
    assert isinstance(spec.model, torch.nn.Module)
    output = spec.output(spec.model(**batch), batch)
    assert output.shape[0] == mask.sum()
    # What stands at padded positions cannot reach the output.
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 9)}
    torch.testing.assert_close(spec.output(spec.model(**changed), changed), output)


@pytest.mark.parametrize(
    ("architecture", "logits", "shape"),
    [
        ("BertForMaskedLM", True, (None, 64)),
        ("BertForSequenceClassification", True, (8, 2)),
        ("BertForTokenClassification", True, (None, 2)),
        ("BertModel", False, (None, 32)),
    ],
)
def test_the_head_decides_the_output(
    architecture: str, logits: bool, shape: tuple[int | None, int], tmp_path: Path
) -> None:
    """With a head the logits are scored, without one the last hidden state; KL is only measured on logits."""
    spec = load(bert(tmp_path / "model", architecture, num_labels=2))
    assert spec.logits is logits
    batch = spec.evaluation[0]
    assert isinstance(spec.model, torch.nn.Module)
    rows = shape[0] or int(batch["attention_mask"].sum())
    assert spec.output(spec.model(**batch), batch).shape == (rows, shape[1])


def test_a_bare_vision_model_is_scored_on_its_hidden_state(tmp_path: Path) -> None:
    """An image encoder without a head takes images, not texts."""
    import transformers
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {key: value for key, value in TEXT_SIZES.items() if key != "vocab_size"}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
    directory = save(model, tmp_path / "vit", ViTImageProcessorPil(size={"height": 32, "width": 32}))
    spec = load(directory)
    assert not spec.logits
    assert isinstance(spec.model, torch.nn.Module)
    assert spec.output(spec.model(**spec.evaluation[0]), spec.evaluation[0]).shape == (4, 17, 32)


def test_texts_go_alone_where_nothing_can_pad(tmp_path: Path) -> None:
    """Without any pad token there is one text a batch, not an invented padding."""
    directory = bert(tmp_path / "model")
    tokenizer(pad_token=None, eos_token=None).save_pretrained(directory)
    spec = load(directory)
    assert {batch["input_ids"].shape[0] for batch in spec.calibration} == {1}
    assert len(spec.calibration) == 24


def test_a_causal_classifier_without_pad_token_gets_single_texts(tmp_path: Path) -> None:
    """Such a classifier cannot find the last token of a padded text, and refuses batches."""
    import transformers

    config = transformers.LlamaConfig(
        **TEXT_SIZES, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=None
    )
    directory = save(transformers.LlamaForSequenceClassification(config), tmp_path / "model", tokenizer())
    spec = load(directory)
    assert isinstance(spec.model, torch.nn.Module)
    for batch in spec.evaluation:
        assert spec.output(spec.model(**batch), batch).shape == (1, 2)


def test_images_become_tokens_of_the_prompt(snapshots: dict[str, Path]) -> None:
    """A vision-language prompt holds one placeholder per merged patch, marked as image, and texts hold none."""
    for model in (snapshots["qwen2_5_vl"], "tiny_qwen2_5_vl"):
        spec = load(model)
        with_image = [batch for batch in spec.evaluation if "pixel_values" in batch]
        assert 0 < len(with_image) < len(spec.evaluation)
        assert any("pixel_values" in batch for batch in spec.calibration)
        for batch in spec.evaluation:
            tokens = int(batch["image_grid_thw"].prod()) // 4 if "image_grid_thw" in batch else 0
            assert int(batch["mm_token_type_ids"].sum()) == tokens


def test_the_chat_template_of_the_checkpoint_is_used(snapshots: dict[str, Path]) -> None:
    """A prompt outside the format a model was trained on measures something else."""
    from transformers import AutoTokenizer

    directory = snapshots["qwen2_5_vl"]
    spec = load(directory)
    text = AutoTokenizer.from_pretrained(directory).decode(spec.evaluation[0]["input_ids"][0])
    assert text.startswith("<|im_start|>")
    assert "<|vision_start|> <|image_pad|>" in text
    assert text.rstrip().endswith("assistant </s>")


def test_without_chat_template_the_image_token_leads(tmp_path: Path) -> None:
    """A vision-language model that was not trained to chat is given the image and the plain text."""
    from tests.checkpoints import qwen2_5_vl

    directory = qwen2_5_vl(tmp_path / "model")
    (directory / "chat_template.jinja").unlink()
    spec = load(directory)
    assert isinstance(spec.model, torch.nn.Module)
    for batch in spec.evaluation:
        assert spec.output(spec.model(**batch), batch).isfinite().all()
    assert "pixel_values" in spec.evaluation[0]
    assert "pixel_values" not in spec.evaluation[-1]


def test_text_only_data_leaves_the_vision_tower_out(snapshots: dict[str, Path], write: WriteFile) -> None:
    """Data given as texts means texts: no default picture is mixed in."""
    file = write("texts.txt", "how many squares\nthe lazy dog\n")
    for model in (snapshots["qwen2_5_vl"], "tiny_qwen2_5_vl"):
        spec = load(model, calib=file, eval=file)
        assert len(spec.calibration) == len(spec.evaluation) == 2
        assert not any("pixel_values" in batch for batch in [*spec.calibration, *spec.evaluation])


def test_calibration_samples_are_capped(snapshots: dict[str, Path]) -> None:
    """The cap counts samples, whatever the batch size, and leaves the evaluation alone."""
    spec = load(snapshots["bert"], calib_samples=3)
    assert [batch["input_ids"].shape[0] for batch in spec.calibration] == [3]
    assert [batch["input_ids"].shape[0] for batch in spec.evaluation] == [8]
    assert len(load(snapshots["qwen2_5_vl"], calib_samples=2).calibration) == 2
    assert load(snapshots["whisper"], calib_samples=2).calibration[0]["input_features"].shape[0] == 2


def test_long_texts_are_cut_to_what_the_model_takes(snapshots: dict[str, Path], write: WriteFile) -> None:
    """A text longer than the position table must not crash the run."""
    file = write("long.txt", "the lazy dog " * 300)
    spec = load(snapshots["bert"], eval=file)
    assert spec.evaluation[0]["input_ids"].shape == (1, 64)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_tiny_model_does_not_depend_on_the_callers_random_state(seed: int) -> None:
    """Its committed scores hold on every machine, after any other test; and it leaves the random state alone."""
    torch.manual_seed(seed)
    before = torch.random.get_rng_state()
    spec = load("tiny_qwen2_5_vl")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(spec.model, torch.nn.Module)
    weight = dict(spec.model.named_modules())["model.language_model.layers.0.self_attn.q_proj"].weight
    torch.manual_seed(7)
    again = load("tiny_qwen2_5_vl").model
    assert isinstance(again, torch.nn.Module)
    assert torch.equal(weight, dict(again.named_modules())["model.language_model.layers.0.self_attn.q_proj"].weight)


def test_the_tiny_model_has_the_parts_of_the_real_one() -> None:
    """Windowed and full attention, multimodal rotary positions, merger and tied head are what it is there to test."""
    model = load("tiny_qwen2_5_vl").model
    assert isinstance(model, torch.nn.Module)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.model.visual.fullatt_block_indexes == [1]
    assert len(model.model.visual.blocks) == 2
    assert model.config.text_config.rope_parameters["mrope_section"] == [4, 6, 6]
    assert {"embedding", "linear", "conv3d"} == {op.type for op in list_ops(model)}


def test_minilm_has_its_trained_weights() -> None:
    """The embedded default is the real model: it finds the paraphrase, which random weights do not."""
    spec = load("minilm")
    model = spec.model
    assert isinstance(model, torch.nn.Module)
    from transformers import AutoTokenizer

    directory = resolve(ModelRequest("minilm")).checkpoint.directory  # type: ignore[attr-defined] # a directory source
    encode = AutoTokenizer.from_pretrained(directory)
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    batch = encode(texts, padding=True, return_tensors="pt")
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    assert vectors[0] @ vectors[1] > 0.5
    assert vectors[0] @ vectors[2] < 0.2
    assert len(list_ops(model)) == 40


def test_the_3b_preset_takes_a_checkpoint(snapshots: dict[str, Path]) -> None:
    """Its name stays the same wherever the checkpoint lies, so that its snapshot file is found."""
    source = resolve(ModelRequest("qwen2_5_vl_3b", checkpoint=str(snapshots["qwen2_5_vl"])))
    source.check()
    assert source.label == "qwen2_5_vl_3b"
    assert any("pixel_values" in batch for batch in source.load().calibration)


def test_the_3b_preset_refuses_another_architecture(snapshots: dict[str, Path]) -> None:
    """A BERT measured as Qwen2.5-VL would overwrite its scores."""
    source = resolve(ModelRequest("qwen2_5_vl_3b", checkpoint=str(snapshots["bert"])))
    with pytest.raises(QsensError, match="holds a BertModel, but qwen2_5_vl_3b is a Qwen2_5_VLFor"):
        source.check()


def test_the_config_alone_decides_the_fingerprint(snapshots: dict[str, Path], broken: Path) -> None:
    """Op lists are cached by fingerprint: another config is another key, the same one the same."""
    source = resolve(ModelRequest(str(broken)))
    before = source.fingerprint()
    assert before == resolve(ModelRequest(str(snapshots["bert"]))).fingerprint()
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert resolve(ModelRequest(str(broken))).fingerprint() != before
    names = {resolve(ModelRequest(name)).fingerprint() for name in PRESETS}
    assert len(names) == 2
