"""A word tokenizer made in the test."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import VOCABULARY


def tiny_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Words `w3` to `w95` are the ids 3 to 95, anything else is 0; BOS is 1 and EOS 2."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def words(ids) -> str:
    """The text of these ids."""
    return " ".join(f"w{int(i)}" for i in ids)
