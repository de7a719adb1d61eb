"""Tokenizers of the three kinds that bases have, trained on a few sentences, and processors around them."""

import copy
import itertools

from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modeling_genieblue.image_processing_genieblue import GenieBlueImageProcessor
from modeling_genieblue.processing_genieblue import GenieBlueProcessor

SIZE, SEQ, IMAGE_ID = 8, 3, 1000
CORPUS = [
    "What is in this picture? A red cat sits on the mat.",
    "user assistant system answer in one word, please: yes or no.",
    "<|user|>\n<|assistant|>\n1 2 3 4 5 6 7 8 9 0 <image> literal\n",
]
TEMPLATE = (
    "{{ bos_token or '' }}{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{{ style or '' }}"
)
PART_READING_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] | trim }}{% endfor %}{% endif %}{% endfor %}"
)
CONVERSATIONS = {
    "question": [{"role": "user", "content": "What is in this picture?"}],
    "literal": [{"role": "user", "content": "a literal <image> here"}],
    "turns": [
        {"role": "system", "content": "answer in one word"},
        {"role": "user", "content": "yes or no?"},
        {"role": "assistant", "content": "yes"},
    ],
}
CONVERSATIONS["batch"] = [CONVERSATIONS["question"], CONVERSATIONS["turns"]]
KINDS = ("byte_level", "metaspace_first", "metaspace_legacy")


def make_tokenizer(kind: str = "byte_level", **settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE without BOS (as Qwen), or Metaspace BPE with BOS, prefix spaces new and legacy (as Llama 2)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "metaspace_first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind != "byte_level":
        alphabet = sorted(set("".join(CORPUS) + "▁"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 40, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    if kind != "byte_level":
        names["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, "padding_side": "right", **settings})


def make_processor(tokenizer=None, **settings) -> GenieBlueProcessor:
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    settings = {"image_token_id": IMAGE_ID, "image_seq_length": SEQ, **settings}
    return GenieBlueProcessor(GenieBlueImageProcessor(tile_size=SIZE), tokenizer, **settings)


def picture(columns: int = 1, rows: int = 1) -> Image.Image:
    """An image of one tile, or of `columns` x `rows` tiles and a thumbnail."""
    return Image.new("RGB", (columns * SIZE, rows * SIZE), (255, 0, 0))


def image_runs(ids) -> list[int]:
    """Lengths of the runs of image tokens."""
    return [len(list(run)) for is_image, run in itertools.groupby(list(ids), lambda i: int(i) == IMAGE_ID) if is_image]


def snapshot(tokenizer) -> tuple:
    names = ("padding_side", "truncation_side", "chat_template", "pad_token", "init_kwargs", "_processor_class")
    return (
        tokenizer.backend_tokenizer.to_str(),
        len(tokenizer),
        tokenizer.all_special_tokens,
        copy.deepcopy([getattr(tokenizer, name, None) for name in names]),
    )
