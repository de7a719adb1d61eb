"""Processor of GenieBlue: the base's own tokenizer for text, placeholders that become image tokens for images."""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

from .compat_genieblue import require_transformers

require_transformers()

from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER, AddedToken, PreTrainedTokenizerBase
from transformers.utils.generic import to_py_obj

from .chat_messages_genieblue import image_sources, text_for_template, with_string_contents
from .image_processing_genieblue import GenieBlueImageProcessor, GenieBlueImagesKwargs, flatten_images
from .settings_files_genieblue import PROCESSOR_FILES, refuse_broken_settings

PLACEHOLDERS = ("<image>", "<|image|>", "<|genieblue_image|>")
ROW_OPTIONS = ("return_attention_mask", "return_token_type_ids", "return_special_tokens_mask")
PADDING_OPTIONS = ("padding", "padding_side", "pad_to_multiple_of")
IMAGE_OPTIONS = frozenset(GenieBlueImagesKwargs.__annotations__) - {"return_tensors", "image_seq_length"}
CALL_OPTIONS = (frozenset(TextKwargs.__annotations__) | IMAGE_OPTIONS) - {"sanitize_control_tokens"}


class GenieBlueProcessor(ProcessorMixin):
    """
    Turns text and images into model inputs and keeps the base's tokenizer as it is.

    A request without images is what `tokenizer` makes of it. In a row with images each placeholder (`image_token`)
    becomes `image_seq_length` copies of `image_token_id` per tile. That id lies outside the base's embedding; the
    placeholder is a token of a private copy of the tokenizer only, so in a request without images it is plain text.
    """

    # Makes save_pretrained copy this file and its siblings and name the class in auto_map.
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_token: str = PLACEHOLDERS[0],
        image_token_id: int | None = None,
        image_seq_length: int = 196,
    ) -> None:
        """
        `image_seq_length` is the number of tokens of one tile; `chat_template` is for a tokenizer that has none.

        ValueError if the tokenizer already knows the placeholder or its id, or has another chat template.
        """
        vocabulary = tokenizer.get_vocab()
        if image_token_id is None or image_token_id < 0 or image_token_id in vocabulary.values():
            raise ValueError(
                f"image_token_id is {image_token_id}, but the tokenizer must not be able to make it; expected an id "
                f"beyond its {len(tokenizer)} tokens, such as the number of rows of the base's input embedding."
            )
        if not image_token or image_token in vocabulary:
            raise ValueError(
                f"The placeholder {image_token!r} is already in the tokenizer's vocabulary; expected a string that is "
                f"not. Pass another image_token, or use {type(self).__name__}.from_base, which finds a free one."
            )
        if image_seq_length < 1:
            raise ValueError(f"image_seq_length is {image_seq_length}; expected at least 1 token a tile.")
        own_template = getattr(tokenizer, "chat_template", None)
        if own_template is not None and chat_template not in (None, own_template):
            raise ValueError(
                "The tokenizer has a chat template of its own, which formats text-only conversations; expected no "
                "other chat_template. Leave it out here, or pass it to apply_chat_template for a single call."
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = image_token
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self._image_tokenizer_cache: tuple[tuple, PreTrainedTokenizerBase, int] | None = None

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
        return cls(image_processor, tokenizer, chat_template, free[0], image_token_id, image_seq_length)

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
        placeholders in order) or one list a row; a row with an empty list is tokenized as plain text. A request with
        images is always a batch, and its rows are padded on the left unless `padding` or `padding_side` say
        otherwise. A row that starts with the beginning-of-sequence token, as rendered chats do, gets no second one.
        ValueError for a wrong number of images, none in an empty list among them, and for a truncation that would
        cut an image.
        """
        for group in ("common_kwargs", "text_kwargs", "images_kwargs"):
            kwargs |= kwargs.pop(group, None) or {}
        image_options = _take(kwargs, IMAGE_OPTIONS)
        texts = [text] if isinstance(text, str) else text
        is_list = isinstance(texts, (list, tuple))
        if is_list and not texts:
            raise ValueError("text is an empty list; expected a string, or a list of at least one.")
        if images is None or not _flat(images):
            # A list for each row says of an empty one that its row is text; one that is empty as a whole does not.
            if images is not None and is_list and not any(isinstance(row, (list, tuple)) for row in images):
                self._images_of_rows([], [row.count(self.image_token) for row in texts if isinstance(row, str)])
            return self._encode_text(lambda **options: self.tokenizer(text, **options), kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        if text is None:
            return self.image_processor(images, return_tensors=return_tensors, **image_options)
        if not is_list or not all(isinstance(row, str) for row in texts):
            raise ValueError(
                f"text is of type {type(text).__name__}; with images expected a string or a list of strings, and the "
                "images as images=..."
            )
        row_images = self._images_of_rows(images, [row.count(self.image_token) for row in texts])
        padding = {"padding": True, **_take(kwargs, PADDING_OPTIONS), "max_length": kwargs.get("max_length")}
        options = _take(kwargs, (*ROW_OPTIONS, "add_special_tokens", "truncation", "max_length"))
        if unsupported := sorted(name for name, value in kwargs.items() if value and name != "verbose"):
            raise ValueError(f"{unsupported} cannot be used in a request with images; leave it out.")
        pixels = self.image_processor(row_images, **image_options)
        num_tiles = iter(pixels["num_tiles"].tolist())
        rows = [
            self._encode_row(row, [next(num_tiles) for _ in images_of_row], index=index, **options)
            for index, (row, images_of_row) in enumerate(zip(texts, row_images, strict=True))
        ]
        return BatchFeature({**self._pad(rows, **padding), **pixels}, tensor_type=return_tensors)

    def encode_with_images(self, text: str, num_tiles: Sequence[int], add_special_tokens: bool = True) -> list[int]:
        """
        Return the ids of one text whose images have `num_tiles` tiles each, without any pixels.

        ValueError if the number of placeholders differs from the number of images; no images means plain text.
        """
        return self._encode_row(text, list(num_tiles), add_special_tokens=add_special_tokens)["input_ids"]

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
        image in `images`. An image part becomes the placeholder, with a newline before the part that follows.
        `processor_kwargs` are options of `__call__`.
        """
        is_batch = bool(conversation) and (
            isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        )
        conversations = [getattr(chat, "messages", chat) for chat in (conversation if is_batch else [conversation])]
        options = _take(kwargs, CALL_OPTIONS)
        options |= {**(kwargs.pop("tokenizer_kwargs", None) or {}), **(processor_kwargs or {})}
        images = options.pop("images", images)
        if return_tensors not in (None, "auto"):
            options["return_tensors"] = return_tensors
        if chat_template is None and getattr(self.tokenizer, "chat_template", None) is None:
            chat_template = self._chat_template
        kwargs["chat_template"] = chat_template

        sources = [image_sources(chat) for chat in conversations]
        images = self._images_of_parts(sources, images, required=tokenize) if any(sources) else images
        with_images = any(sources) or (images is not None and bool(_flat(images)))
        chats = [
            with_string_contents(chat, self.image_token) if row else text_for_template(self.tokenizer, chat, kwargs)
            for chat, row in zip(conversations, sources, strict=True)
        ]
        chats = chats if is_batch else chats[0]
        for name in ("return_assistant_tokens_mask", "sanitize_control_tokens"):
            if with_images and kwargs.get(name):
                raise ValueError(f"{name} works for text-only conversations; leave it out where there are images.")
        if tokenize and not with_images:
            _take(options, IMAGE_OPTIONS)
            output = self._encode_text(lambda **settings: self._tokenize_chats(chats, kwargs, settings), options)
        else:
            rendered = self.tokenizer.apply_chat_template(chats, tokenize=False, **kwargs)
            if not tokenize:
                return rendered
            output = self(text=rendered, images=images, **{"add_special_tokens": False, **options})
        return output if return_dict else output["input_ids"]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str | list[str]:
        """Return the text of one sequence or a batch; a run of image tokens is one placeholder, a special token."""
        token_ids = to_py_obj(token_ids)
        if isinstance(token_ids, (list, tuple)) and any(isinstance(ids, (list, tuple)) for ids in token_ids):
            return [self.decode(ids, skip_special_tokens, **kwargs) for ids in token_ids]
        tokenizer = self.tokenizer
        if isinstance(token_ids, (list, tuple)) and self.image_token_id in token_ids:
            tokenizer, placeholder_id = self._image_tokenizer()
            previous = [None, *token_ids[:-1]]
            token_ids = [
                placeholder_id if token == self.image_token_id else token
                for token, before in zip(token_ids, previous, strict=True)
                if token != self.image_token_id or before != self.image_token_id
            ]
        return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Return the texts of several sequences, as `decode` does for each."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Return the texts of generated sequences, prompt and image tokens included (for transformers' pipeline)."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what processor_config.json holds: all but the tokenizer and the template, which have their files."""
        settings = {
            "processor_class": type(self).__name__,
            "image_processor": self.image_processor.to_dict(),
            "image_token": self.image_token,
            "image_token_id": self.image_token_id,
            "image_seq_length": self.image_seq_length,
            # chat_template.jinja does not tell whose it is, and the base's tokenizer may have none.
            "base_has_chat_template": getattr(self.tokenizer, "chat_template", None) is not None,
        }
        return settings | ({"auto_map": self.auto_map} if hasattr(self, "auto_map") else {})

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list:
        """Write a folder that `AutoProcessor.from_pretrained` loads, code included; the tokenizer is not touched."""
        # Saving marks the tokenizer and the image processor with class names, so it is done to copies.
        portable = copy.copy(self)
        portable.tokenizer = copy.deepcopy(self.tokenizer)
        portable.image_processor = copy.deepcopy(self.image_processor)
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(self, save_directory, config=portable)
        # The mixin would also write our auto_map into the tokenizer's settings, which are the base's.
        portable._auto_class = None
        return super(__class__, portable).save_pretrained(str(save_directory), push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "GenieBlueProcessor":
        """Load a saved processor; `OSError` for a file of it that holds something else than its settings."""
        if not os.path.isfile(pretrained_model_name_or_path):
            refuse_broken_settings(
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

    def _image_tokenizer(self) -> tuple[PreTrainedTokenizerBase, int]:
        """A copy of the tokenizer that knows the placeholder as a special token, and its id in the copy."""
        flags = [getattr(self.tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
        state = (self.tokenizer, len(self.tokenizer), self.image_token, *flags)
        if self._image_tokenizer_cache is None or self._image_tokenizer_cache[0] != state:
            tokenizer = copy.deepcopy(self.tokenizer)
            tokenizer.add_tokens([AddedToken(self.image_token, special=True, normalized=False)], special_tokens=True)
            tokenizer.split_special_tokens = False
            placeholder_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self._image_tokenizer_cache = (state, tokenizer, placeholder_id)
        return self._image_tokenizer_cache[1:]

    def _encode_row(
        self,
        text: str,
        num_tiles: list[int],
        *,
        index: int = 0,
        add_special_tokens: bool | None = None,
        truncation: Any = None,
        max_length: int | None = None,
        **options: Any,
    ) -> dict[str, list]:
        """Tokenize one text and repeat each placeholder's entry for the tokens of its image."""
        tokenizer, placeholder_id = self._image_tokenizer() if num_tiles else (self.tokenizer, None)
        bos = tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (num_tiles and bos and text.startswith(bos))
        options = {"return_attention_mask": True, "return_token_type_ids": False, "verbose": False, **options}
        options["add_special_tokens"] = add_special_tokens
        encoding = tokenizer(text, **options)
        count = encoding["input_ids"].count(placeholder_id)
        if count != len(num_tiles):
            raise self._count_error(f"Row {index}", count, len(num_tiles))

        image_tokens = sum(num_tiles) * self.image_seq_length
        length = len(encoding["input_ids"]) - count + image_tokens
        limit = tokenizer.model_max_length if max_length is None else max_length
        if truncation not in (None, False, "do_not_truncate") and length > limit:
            room = limit - image_tokens + count
            special = tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
            if room >= count + special:
                encoding = tokenizer(text, truncation=truncation, max_length=room, **options)
            if encoding["input_ids"].count(placeholder_id) != count or len(encoding["input_ids"]) > room:
                raise ValueError(
                    f"Row {index} has {length} tokens, {image_tokens} of them for images, and truncation to {limit} "
                    f"would cut an image. Set max_length to at least {length}, or use a smaller max_tiles."
                )
        ids = encoding["input_ids"]
        tiles = iter(num_tiles)
        repeats = [next(tiles) * self.image_seq_length if token == placeholder_id else 1 for token in ids]
        encoding["input_ids"] = [self.image_token_id if token == placeholder_id else token for token in ids]
        return {
            name: [value for value, times in zip(values, repeats, strict=True) for _ in range(times)]
            for name, values in encoding.items()
        }

    def _encode_text(self, encode: Callable[..., Any], options: dict[str, Any]) -> BatchFeature:
        """Run the tokenizer's own `encode`; rows that become a tensor are padded, on the left, if need be with EOS."""
        if options.get("return_tensors") is not None:
            options = {"padding": True, **options}
        if options.get("padding") in (None, False, "do_not_pad"):
            return BatchFeature(dict(encode(**options)))
        options = {"padding_side": "left", **options}
        if self.tokenizer.pad_token_id is not None:
            return BatchFeature(dict(encode(**options)))
        padding = {**_take(options, PADDING_OPTIONS), "max_length": options.get("max_length")}
        return_tensors = options.pop("return_tensors", None)
        encoding = dict(encode(**options))
        is_batch = any(isinstance(ids, list) for ids in encoding["input_ids"])
        rows = [dict(zip(encoding, values, strict=True)) for values in zip(*encoding.values(), strict=True)]
        data = self._pad(rows if is_batch else [encoding], **padding)
        if not is_batch and return_tensors is None:
            data = {name: padded[0] for name, padded in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def _pad(
        self,
        rows: list[dict[str, list]],
        padding: Any,
        max_length: int | None,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> dict[str, list[list]]:
        """Collect rows, padded to one length, on the left by default; EOS stands in for a missing padding token."""
        padding = getattr(padding, "value", padding)
        lengths = [len(row["input_ids"]) for row in rows]
        target = max(lengths)
        if padding in (None, False, "do_not_pad"):
            return {name: [row[name] for row in rows] for name in rows[0]}
        if padding == "max_length":
            target = self.tokenizer.model_max_length if max_length is None else max_length
            if target >= VERY_LARGE_INTEGER:
                raise ValueError("padding is 'max_length', but the tokenizer has no limit; expected a max_length.")
        target = -(-target // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        if pad_id is None and min(lengths) < target:
            raise ValueError(
                f"Rows of {min(lengths)} to {max(lengths)} tokens cannot be padded to {target}, as the tokenizer has "
                "neither a padding nor an end-of-sequence token. Set tokenizer.pad_token, or give one row at a time."
            )
        fill = {"input_ids": pad_id, "token_type_ids": self.tokenizer.pad_token_type_id, "special_tokens_mask": 1}
        data: dict[str, list[list]] = {name: [] for name in rows[0]}
        for row in rows:
            for name, values in row.items():
                filler = [fill.get(name, 0)] * (target - len(values))
                data[name].append(values + filler if padding_side == "right" else filler + values)
        return data

    def _images_of_rows(self, images: Any, placeholders: list[int]) -> list[list[Any]]:
        """Give each row its images; ValueError where their number is not that of the placeholders."""
        if isinstance(images, (list, tuple)) and any(row is None or isinstance(row, (list, tuple)) for row in images):
            rows = [_flat(row) for row in images]
            if len(rows) != len(placeholders):
                raise ValueError(
                    f"images has {len(rows)} lists for {len(placeholders)} rows of text; expected one list a row, "
                    "empty where a row has no image."
                )
            for index, (row, count) in enumerate(zip(rows, placeholders, strict=True)):
                if row and len(row) != count:
                    raise self._count_error(f"Row {index}", count, len(row))
            return rows
        flat = _flat(images)
        if len(flat) != sum(placeholders):
            raise self._count_error("The request", sum(placeholders), len(flat))
        remaining = iter(flat)
        return [[next(remaining) for _ in range(count)] for count in placeholders]

    def _images_of_parts(self, sources: list[list[Any]], images: Any, *, required: bool) -> list[list[Any]]:
        """Fill the image parts that came without an image from `images`, in order."""
        missing = [sum(source is None for source in row) for row in sources]
        if images is None and not required:
            return sources
        filled = []
        for row, count, given in zip(sources, missing, self._images_of_rows(images, missing), strict=True):
            if len(given) != count:
                raise self._count_error(f"Row {len(filled)}", count, len(given))
            remaining = iter(given)
            filled.append([next(remaining) if source is None else source for source in row])
        return filled

    def _count_error(self, where: str, tokens: int, images: int) -> ValueError:
        return ValueError(
            f"{where} needs one image for each placeholder (tokens: {tokens}, images: {images}). Give the images in "
            f"the order of the placeholders. With images, a literal {self.image_token!r} in the text counts as a "
            "placeholder too: reword it where it is not meant as one."
        )

    def _tokenize_chats(self, chats: Any, template_kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
        named = _take(options, ("padding", "truncation", "max_length", "return_tensors"))
        return self.tokenizer.apply_chat_template(
            chats, tokenize=True, return_dict=True, tokenizer_kwargs=options, **named, **template_kwargs
        )


def _flat(images: Any) -> list[Any]:
    return [image for image in flatten_images(images) if image is not None]


def _take(options: dict[str, Any], names: Any) -> dict[str, Any]:
    """Move the options of these names out of `options`."""
    return {name: options.pop(name) for name in list(options) if name in names}
