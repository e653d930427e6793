"""Tiny checkpoints with real tokenizers and processors, as Hugging Face snapshots on disk. All weights are seeded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "what shape is in the picture ? how many squares are there ?",
    "user assistant : . , ! a of to and in is on for with at by",
]
SPECIAL = [
    "[PAD]",
    "[UNK]",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 64
"""Ids of every tokenizer here are below this."""


def tokenizer(**kwargs: object) -> transformers.PreTrainedTokenizerFast:
    """Train a word-level tokenizer on three sentences; ``</s>`` ends every text. ``kwargs`` go to transformers."""
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL))
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
    )
    options = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "</s>", "model_max_length": 64, **kwargs}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)


class Saveable(Protocol):
    """A model, a tokenizer or a processor."""

    def save_pretrained(self, directory: Path) -> object:
        """Write the files that ``from_pretrained`` reads."""


def save(model: Saveable, directory: Path, *parts: Saveable) -> Path:
    """Save a model as safetensors together with tokenizers, processors and the like."""
    model.save_pretrained(directory)
    for part in parts:
        part.save_pretrained(directory)
    return directory


def _seeded(
    model_class: type[transformers.PreTrainedModel], config: transformers.PretrainedConfig
) -> transformers.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


TEXT_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(directory: Path) -> Path:
    """Save a causal LM whose tokenizer has no pad token, with untied head and grouped-query attention."""
    config = transformers.LlamaConfig(
        **TEXT_SIZES, num_key_value_heads=2, bos_token_id=2, eos_token_id=3, max_position_embeddings=64
    )
    return save(_seeded(transformers.LlamaForCausalLM, config), directory, tokenizer(pad_token=None))


def bert(directory: Path, architecture: str = "BertModel", **kwargs: object) -> Path:
    """Save a BERT with any head; an encoder by default."""
    config = transformers.BertConfig(**{**TEXT_SIZES, "max_position_embeddings": 64, **kwargs})
    return save(_seeded(getattr(transformers, architecture), config), directory, tokenizer())


def t5(directory: Path) -> Path:
    """Save a seq2seq model."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return save(_seeded(transformers.T5ForConditionalGeneration, config), directory, tokenizer())


def vit(directory: Path) -> Path:
    """Save an image classifier with transformer blocks."""
    sizes = {key: value for key, value in TEXT_SIZES.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return save(_seeded(transformers.ViTForImageClassification, config), directory, processor)


def resnet(directory: Path) -> Path:
    """Save an image classifier with convolutions."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    processor = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=1.0)
    return save(_seeded(transformers.ResNetForImageClassification, config), directory, processor)


def clip(directory: Path) -> Path:
    """Save an image-text dual encoder."""
    vision = {key: value for key, value in TEXT_SIZES.items() if key != "vocab_size"}
    config = transformers.CLIPConfig(
        text_config={**TEXT_SIZES, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.CLIPProcessor(image_processor, tokenizer())
    return save(_seeded(transformers.CLIPModel, config), directory, processor)


def whisper(directory: Path) -> Path:
    """Save a speech recognizer with a decoder, for 1 s of sound."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=50,
        max_target_positions=32,
        decoder_start_token_id=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    model = _seeded(transformers.WhisperForConditionalGeneration, config)
    return save(model, directory, extractor, tokenizer())


def wav2vec2(directory: Path) -> Path:
    """Save a speech recognizer with a CTC head."""
    config = transformers.Wav2Vec2Config(
        **TEXT_SIZES,
        conv_dim=(16, 16),
        conv_kernel=(10, 8),
        conv_stride=(5, 160),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    return save(_seeded(transformers.Wav2Vec2ForCTC, config), directory, transformers.Wav2Vec2FeatureExtractor())


def qwen2_5_vl(directory: Path) -> Path:
    """Save a vision-language model with its chat template; its processor class brings a video processor too."""
    words = tokenizer(chat_template=CHAT_TEMPLATE)
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT_SIZES,
            "num_key_value_heads": 2,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    model = _seeded(transformers.Qwen2_5_VLForConditionalGeneration, config)
    image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    return save(model, directory, words, image_processor)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
    "clip": clip,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "qwen2_5_vl": qwen2_5_vl,
}
