"""A byte-level BPE tokenizer trained on the spot, built like OLMo's, for models made without a download."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from unlearnjax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MINIMUM_VOCABULARY = 256 + 2  # every byte, and the two special tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train byte-level BPE on texts; the same texts give the same tokenizer.

    As OLMo's tokenizer: Unicode is normalised to NFC, no space is put in front, and encoding adds no special tokens.
    Any text decodes to its NFC form, because every byte is in the vocabulary. Padding is id 0, the end of text id 1.

    Args:
      texts: what to learn the merges from.
      vocab_size: at most this many entries, special tokens included; fewer when the texts hold no more pairs.

    Raises:
      UserError: `vocab_size` is below 258.
    """
    if vocab_size < MINIMUM_VOCABULARY:
        raise UserError(f"train_tokenizer: vocab_size must be at least {MINIMUM_VOCABULARY}, is {vocab_size}")

    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (PADDING, END_OF_TEXT)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
