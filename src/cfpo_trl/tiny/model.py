"""A character-level Qwen2 of half a million parameters: what the demo, the studies, benchmarks and tests train."""

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification


def build_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `characters`, plus `<pad>` and `<eos>`."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=512
    )


def config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, layers: int = 2, seed: int = 0
) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 for `tokenizer`; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config(tokenizer, hidden_size, layers))


def build_reward_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 32, layers: int = 2, seed: int = 0
) -> Qwen2ForSequenceClassification:
    """Like [`build_model`], with one output in place of the vocabulary's; its untrained scores differ by about 1."""
    torch.manual_seed(seed)
    shape = config(tokenizer, hidden_size, layers)
    shape.num_labels = 1
    model = Qwen2ForSequenceClassification(shape)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    return model
