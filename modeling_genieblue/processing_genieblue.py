"""Processor: the base's own tokenizer for text, and placeholders that become image tokens."""

import copy
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from .compat_genieblue import require_transformers

require_transformers()

from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .addresses_genieblue import refuse_address
from .chat_messages_genieblue import conversations_of, image_sources, text_for_template, with_string_contents
from .decoding_genieblue import ImageTokenDecoding
from .image_processing_genieblue import GenieBlueImageProcessor, GenieBlueImagesKwargs
from .model_files_genieblue import PROCESSOR_FILES, check_settings_files
from .placeholders_genieblue import MarkingTokenizer, TextWithImages, text_pieces
from .request_rows_genieblue import (
    PADDING_OPTIONS,
    chat_encoder,
    encode_and_pad,
    flat_images,
    images_by_part,
    images_by_row,
    pad_rows,
    refuse_other_media,
    take,
    text_encoder,
    tokenize_chats,
    zeros_like,
)

PLACEHOLDERS = ("<image>", "<|image|>", "<|genieblue_image|>")
ROW_OPTIONS = ("return_attention_mask", "return_token_type_ids", "return_special_tokens_mask", "split_special_tokens")
IMAGE_OPTIONS = frozenset(GenieBlueImagesKwargs.__annotations__) - {"return_tensors", "image_seq_length"}
CALL_OPTIONS = frozenset(TextKwargs.__annotations__) | IMAGE_OPTIONS | {"split_special_tokens"}
CALL_OPTIONS -= {"sanitize_control_tokens"}
ORDER = "Give the images in the order of the placeholders."


class GenieBlueProcessor(ImageTokenDecoding, ProcessorMixin):
    """
    Turns text and images into model inputs and keeps the base's tokenizer as it is.

    A request without images is what `tokenizer` makes of it. In a row with images each image's place becomes
    `image_seq_length` copies of `image_token_id` per tile, between the tokens of `image_prefix` and `image_suffix`;
    that id lies outside the base's embedding. A place is an image part of a message, whatever the texts beside it
    hold, or the placeholder (`image_token`) in a plain string.
    """

    # Makes save_pretrained copy this file and its siblings and name the class in auto_map.
    _auto_class = "AutoProcessor"
    return_mm_token_type_ids = False  # as every processor has it from transformers 5.20 on

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_token: str = PLACEHOLDERS[0],
        image_token_id: int | None = None,
        image_seq_length: int = 196,
        image_prefix: str = "",
        image_suffix: str = "",
    ) -> None:
        """
        `image_seq_length` is the number of tokens of one tile; `chat_template` is for a tokenizer that has none.
        `image_prefix` and `image_suffix` are texts around each tile, if the model was trained with some.

        ValueError if the tokenizer already knows the placeholder or its id, or has another chat template.
        """
        own_template = getattr(tokenizer, "chat_template", None)
        if own_template is not None and chat_template not in (None, own_template):
            raise ValueError(
                "The tokenizer has a chat template of its own, which formats text-only conversations; expected no "
                "other chat_template. Leave it out here, or pass it to apply_chat_template for a single call."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.image_token_id: Any = image_token_id  # a number, as is checked below
        self.image_token_ids = [image_token_id]  # as serving engines ask for it
        self.image_seq_length = image_seq_length
        self.image_prefix, self.image_suffix = image_prefix, image_suffix
        self._marking = MarkingTokenizer()
        self._checked: tuple[PreTrainedTokenizerBase, tuple] | None = None
        self._check_tokenizer()

    @classmethod
    def from_base(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image_token_id: int,
        image_seq_length: int,
        tile_size: int,
        max_tiles: int = 16,
        chat_template: str | None = None,
        image_prefix: str = "",
        image_suffix: str = "",
    ) -> "GenieBlueProcessor":
        """Build the processor of a new GenieBlue; its placeholder is the first one that the tokenizer lacks."""
        vocabulary = tokenizer.get_vocab()
        free = [placeholder for placeholder in PLACEHOLDERS if placeholder not in vocabulary]
        if not free:
            raise ValueError(
                f"The tokenizer already has all of {PLACEHOLDERS} in its vocabulary; expected one to be free. Build "
                f"{cls.__name__}(...) with an image_token of your own."
            )
        image_processor = GenieBlueImageProcessor(tile_size=tile_size, max_tiles=max_tiles)
        texts = {"image_prefix": image_prefix, "image_suffix": image_suffix}
        return cls(image_processor, tokenizer, chat_template, free[0], image_token_id, image_seq_length, **texts)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template in use: the tokenizer's own, or the processor's where the tokenizer has none."""
        own_template = getattr(self.tokenizer, "chat_template", None)
        return self._chat_template if own_template is None else own_template

    @chat_template.setter
    def chat_template(self, chat_template: str | None) -> None:
        self._chat_template = chat_template

    def __call__(self, text: str | list[str] | None = None, images: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Return `input_ids` and `attention_mask`, and for a request with images also `pixel_values`
        (total_tiles, 3, tile_size, tile_size) and `num_tiles` (num_images,).

        Without images this is `tokenizer(text, **kwargs)`. `images` is one image, a flat list (given to the
        placeholders in order) or one list a row; a row with an empty list is tokenized as plain text. In a plain
        string every placeholder is an image; a text that `apply_chat_template` returned knows its images. A request
        with images is always a batch, and its rows are padded on the left unless `padding` or `padding_side` say
        otherwise. Rendered chats, and rows that start with the beginning-of-sequence token, get no second one.
        `return_mm_token_type_ids` adds 1 for each image token and 0 for the others. ValueError for a wrong number of
        images, none in an empty list among them, and for a truncation that would cut an image.
        """
        self._check_tokenizer()
        for group in ("common_kwargs", "text_kwargs", "images_kwargs"):
            kwargs |= kwargs.pop(group, None) or {}
        refuse_other_media(kwargs)
        image_options = take(kwargs, IMAGE_OPTIONS)
        texts = [text] if isinstance(text, str) else text
        is_list = isinstance(texts, (list, tuple))
        if is_list and not texts:
            raise ValueError("text is an empty list; expected a string, or a list of at least one.")
        rows = [row if isinstance(row, str) else "" for row in texts] if is_list else []
        places = [len(text_pieces(row, self.image_token)) - 1 for row in rows]
        certain = [hasattr(row, "pieces") for row in rows]
        hint = (
            f"{ORDER} With images, a literal {self.image_token!r} in the text counts as a placeholder too: reword it "
            "where it is not meant as one, or give messages, whose texts are texts."
        )
        if images is None or not flat_images(images):
            # A list for each row says of an empty one that its row is text; one that is empty as a whole does not.
            is_flat = images is not None and not any(isinstance(row, (list, tuple)) for row in images)
            known = [count if is_flat or sure else 0 for count, sure in zip(places, certain, strict=True)]
            images_by_row([], known, certain=certain, hint=hint)
            return self._encode_text(lambda **options: self.tokenizer(text, **options), kwargs)
        if text is None:
            return self.image_processor(images, return_tensors=kwargs.get("return_tensors"), **image_options)
        if not is_list or not all(isinstance(row, str) for row in texts):
            raise ValueError(
                f"text is of type {type(text).__name__}; with images expected a string or a list of strings, and the "
                "images as images=..."
            )
        row_images = images_by_row(images, places, certain=certain, hint=hint)
        add_special_tokens = kwargs.pop("add_special_tokens", None)
        encoders = [
            self._text_encoder(row, images_of_row, add_special_tokens)
            for row, images_of_row in zip(texts, row_images, strict=True)
        ]
        return self._encode_rows(encoders, row_images, {**kwargs, **image_options})

    def encode_with_images(self, text: str, num_tiles: Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """
        Return the ids of one text whose images have `num_tiles` tiles each, without any pixels.

        In a plain string the placeholders are the images, or text where there are none. ValueError for another number
        of images than the text has.
        """
        self._check_tokenizer()
        certain = hasattr(text, "pieces")
        places = len(text_pieces(text, self.image_token)) - 1
        images_by_row([list(num_tiles)], [places], certain=[certain], hint=ORDER)
        return self._encode_row(self._text_encoder(text, num_tiles, add_special_tokens), num_tiles)["input_ids"]

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        *,
        images: Any = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[int] | BatchFeature:
        """
        Format one conversation or a batch of them, and tokenize it if `tokenize` is set.

        A conversation without images is what `tokenizer.apply_chat_template` makes of it; `kwargs` (tools, documents,
        add_generation_prompt, ...) reach it and the template. A message's content is a string or a list of parts:
        `{"type": "text", "text": ...}` and `{"type": "image"}` with an `image`, `url`, `path` or `base64`, or with its
        image in `images`. Only image parts are images: a placeholder in a text is text. An image has a newline before
        the part that follows. Tokenized, a conversation with parts is a batch of one, as from every processor.
        `processor_kwargs` are options of `__call__`. The string that is returned without `tokenize` shows the
        placeholder for an image, and knows where its images are when it is given to `__call__`.
        """
        self._check_tokenizer()
        conversations, is_batch = conversations_of(conversation)
        options = take(kwargs, CALL_OPTIONS)
        options |= {**(kwargs.pop("tokenizer_kwargs", None) or {}), **(processor_kwargs or {})}
        for given in (kwargs, options):
            refuse_other_media(given)
        images = options.pop("images", images)
        if return_tensors not in (None, "auto"):
            options["return_tensors"] = return_tensors
        if not options.get("add_special_tokens", True):  # a template writes them itself: none are ever added
            del options["add_special_tokens"]
        if chat_template is None and getattr(self.tokenizer, "chat_template", None) is None:
            chat_template = self._chat_template
        kwargs["chat_template"] = chat_template

        sources = [image_sources(chat) for chat in conversations]
        if images is not None or tokenize and any(sources):
            hint = "Give them in the order of the image parts; an image is a part of a message, and no text is one."
            sources = images_by_part(sources, images, hint)
        chats = [
            chat if row else text_for_template(self.tokenizer, chat, kwargs)
            for chat, row in zip(conversations, sources, strict=True)
        ]
        if not tokenize:
            rendered = [self._render(chat, len(row), kwargs) for chat, row in zip(chats, sources, strict=True)]
            return rendered if is_batch else rendered[0]
        if any(sources):
            encoders = [chat_encoder(chat, kwargs) for chat in chats]
            output = self._encode_rows(encoders, sources, options)
        else:
            take(options, IMAGE_OPTIONS)
            # Clients that write parts expect a processor's batch, those that write strings a tokenizer's row.
            has_parts = any(isinstance(message.get("content"), (list, tuple)) for message in conversations[0])
            whole = chats if is_batch or has_parts else chats[0]
            output = self._encode_text(lambda **more: tokenize_chats(self.tokenizer, whole, kwargs, more), options)
        return output if return_dict else output["input_ids"]

    def tile_ids(self) -> list[int]:
        """Return the ids of one tile: its image tokens between those of `image_prefix` and `image_suffix`."""
        before, after = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            for text in (self.image_prefix, self.image_suffix)
        )
        return [*before, *[self.image_token_id] * self.image_seq_length, *after]

    def get_vocab(self) -> dict[str, int]:
        """Return the base's vocabulary; a server that stops at strings takes the processor for a tokenizer."""
        return self.tokenizer.get_vocab()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens of the base's vocabulary."""
        return self.tokenizer.convert_tokens_to_string(tokens)

    def _convert_id_to_token(self, index: int) -> str:
        return self.tokenizer._convert_id_to_token(index)

    @property
    def backend_tokenizer(self) -> Any:
        """What a fast tokenizer is made of; None for a slow one."""
        return getattr(self.tokenizer, "backend_tokenizer", None)

    def get_text_with_replacements(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: no text can stand for image tokens, as the base's tokenizer has none."""
        raise ValueError(
            "The tokens of an image have no form as text, so no text can be written out with them; call the processor "
            "with text and images, or `encode_with_images` for the ids alone."
        )

    replace_image_token = replace_video_token = replace_audio_token = get_text_with_replacements
    validate_inputs = get_text_with_replacements

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return how many tokens and tiles images of these (height, width) have, as serving engines ask for it."""
        kwargs |= kwargs.pop("images_kwargs", None) or {}
        if image_sizes is None:
            return MultiModalData()
        options = take(kwargs, IMAGE_OPTIONS)
        tiles = [self.image_processor.get_number_of_image_patches(*size, options) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[count * self.image_seq_length for count in tiles], num_image_patches=tiles
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what processor_config.json holds: all but the tokenizer and the template, which have their files."""
        settings = {
            "processor_class": type(self).__name__,
            "image_processor": self.image_processor.to_dict(),
            "image_token": self.image_token,
            "image_token_id": self.image_token_id,
            "image_seq_length": self.image_seq_length,
            "image_prefix": self.image_prefix,
            "image_suffix": self.image_suffix,
            # chat_template.jinja does not tell whose it is, and the base's tokenizer may have none.
            "base_has_chat_template": getattr(self.tokenizer, "chat_template", None) is not None,
        }
        auto_map = getattr(self, "auto_map", None)
        return settings if auto_map is None else {**settings, "auto_map": auto_map}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list:
        """Write a folder that `AutoProcessor.from_pretrained` loads, code included; the tokenizer is not touched."""
        self._check_tokenizer()
        vocabulary = self.tokenizer.get_vocab()
        if unknown := [token for token in self.tokenizer.all_special_tokens if token not in vocabulary]:
            raise ValueError(
                f"The tokenizer names {unknown[0]!r} as a special token, which it does not have: once loaded it would "
                "add it, perhaps as what stands for an image. Name one that it has, such as `tokenizer.pad_token = "
                "tokenizer.eos_token`."
            )
        # Saving marks the tokenizer and the image processor with class names, so it is done to copies.
        portable: Any = copy.copy(self)
        portable.tokenizer = copy.deepcopy(self.tokenizer)
        portable.image_processor = copy.deepcopy(self.image_processor)
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(self, save_directory, config=portable)
        # The mixin would also write our auto_map into the tokenizer's settings, which are the base's.
        portable._auto_class = None
        return ProcessorMixin.save_pretrained(portable, str(save_directory), push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "GenieBlueProcessor":
        """Load a saved processor; `OSError` for a file of it that holds something other than its settings."""
        refuse_address(pretrained_model_name_or_path)
        if not os.path.isfile(pretrained_model_name_or_path):
            check_settings_files(
                pretrained_model_name_or_path, PROCESSOR_FILES, required="processor_config.json", **kwargs
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the processor of a saved folder; a template that is the processor's own is not the tokenizer's."""
        _, tokenizer = args
        if processor_dict.get("base_has_chat_template", True):
            processor_dict = {name: value for name, value in processor_dict.items() if name != "chat_template"}
        else:
            tokenizer.chat_template = None
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    def _check_tokenizer(self) -> None:
        """ValueError if the tokenizer can make what stands for an image, perhaps since tokens were added to it."""
        tokenizer = self.tokenizer
        settings = (len(tokenizer), self.image_token, self.image_token_id, self.image_seq_length)
        if self._checked is not None and self._checked[0] is tokenizer and self._checked[1] == settings:
            return
        if self.image_seq_length < 1:
            raise ValueError(f"image_seq_length is {self.image_seq_length}; expected at least 1 token a tile.")
        vocabulary = tokenizer.get_vocab()
        taken = next((token for token, number in vocabulary.items() if number == self.image_token_id), None)
        added = (
            "A token that is added to a base's tokenizer may take what stands for an image: load the tokenizer anew, "
            "and use a token that it has, such as `tokenizer.pad_token = tokenizer.eos_token`."
        )
        if self.image_token_id is None or self.image_token_id < 0 or taken is not None:
            has = "" if taken is None else f", and has it for {taken!r}"
            raise ValueError(
                f"image_token_id is {self.image_token_id}, but the tokenizer must not be able to make it{has}; "
                f"expected an id beyond its {len(tokenizer)} tokens, such as the number of rows of the base's input "
                f"embedding. {added}"
            )
        if not self.image_token or self.image_token in vocabulary:
            raise ValueError(
                f"The placeholder {self.image_token!r} is already in the tokenizer's vocabulary; expected a string "
                f"that is not. Pass another image_token, or use {type(self).__name__}.from_base, which finds a free "
                f"one. {added}"
            )
        self._checked = tokenizer, settings

    def _render(self, chat: list[dict[str, Any]], count: int, template_kwargs: dict[str, Any]) -> str:
        """The text of a conversation, which knows which placeholders are its `count` images, if there are any."""
        strings = with_string_contents(chat, iter(self._marking.markers(count))) if count else chat
        text = self.tokenizer.apply_chat_template(strings, tokenize=False, **template_kwargs)
        if not count and self.image_token not in text:
            return text
        return TextWithImages(self._marking.pieces(text, count), self.image_token)

    def _encode_rows(
        self, encoders: list[Callable[..., Any]], row_images: list[list[Any]], options: dict[str, Any]
    ) -> BatchFeature:
        """Tokenize the rows of a request with images, pad them to one length, and cut the images into tiles."""
        return_tensors = options.pop("return_tensors", None)
        padding = {"padding": True, **take(options, PADDING_OPTIONS), "max_length": options.get("max_length")}
        image_options = take(options, IMAGE_OPTIONS)
        with_types = options.pop("return_mm_token_type_ids", self.return_mm_token_type_ids)
        row_options = take(options, (*ROW_OPTIONS, "truncation", "max_length"))
        if unsupported := sorted(name for name, value in options.items() if value and name != "verbose"):
            raise ValueError(f"{unsupported} cannot be used in a request with images; leave it out.")
        pixels = self.image_processor(row_images, **image_options)
        num_tiles = iter(pixels["num_tiles"].tolist())
        rows = [
            self._encode_row(encode, [next(num_tiles) for _ in images], index=index, **row_options)
            for index, (encode, images) in enumerate(zip(encoders, row_images, strict=True))
        ]
        for row in rows if with_types else ():
            row["mm_token_type_ids"] = [int(token == self.image_token_id) for token in row["input_ids"]]
        return BatchFeature({**pad_rows(self.tokenizer, rows, **padding), **pixels}, tensor_type=return_tensors)

    def _encode_row(self, encode: Callable[..., Any], num_tiles: Sequence[int], **options: Any) -> dict[str, list]:
        tile = self.tile_ids()
        return self._marking.encode(self.tokenizer, encode, [tile * count for count in num_tiles], **options)

    def _text_encoder(self, text: str, images: Sequence[Any], add_special_tokens: bool | None) -> Callable[..., Any]:
        if add_special_tokens is None:  # a rendered chat has what its template writes
            bos = self.tokenizer.bos_token
            add_special_tokens = not images or not (hasattr(text, "pieces") or bos and text.startswith(bos))
        pieces = text_pieces(text, self.image_token) if images else [text]
        return text_encoder(pieces, add_special_tokens)

    def _encode_text(self, encode: Callable[..., Any], options: dict[str, Any]) -> BatchFeature:
        """Run the tokenizer's own `encode`; rows that become a tensor are padded, on the left, if need be with EOS."""
        with_types = options.pop("return_mm_token_type_ids", self.return_mm_token_type_ids)
        if options.get("return_tensors") is not None:
            options = {"padding": True, **options}
        if options.get("padding") not in (None, False, "do_not_pad"):
            options = {"padding_side": "left", **options}
            if self.tokenizer.pad_token_id is None:
                encode = functools.partial(encode_and_pad, self.tokenizer, encode)
        output = BatchFeature(dict(encode(**options)))
        if with_types:
            output["mm_token_type_ids"] = zeros_like(output["input_ids"])
        return output
