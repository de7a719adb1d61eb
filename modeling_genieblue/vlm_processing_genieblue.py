"""Processor of a GenieBlue with a VLM: the base's own tokenizer for text, the VLM's own processor for images."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.generic import to_py_obj

from .addresses_genieblue import refuse_address
from .chat_messages_genieblue import conversations_of, image_sources, text_for_template
from .decoding_genieblue import BatchDecoding
from .image_reading_genieblue import read_image
from .model_files_genieblue import (
    ACCESS_KEYS,
    PROCESSOR_CONFIGS,
    TOKENIZER_CONFIG_NAME,
    VLM_FOLDER,
    check_settings_files,
    write_json,
)
from .processing_genieblue import CALL_OPTIONS
from .request_rows_genieblue import images_by_part, take, tokenize_chats

HUB_KEYS = (*ACCESS_KEYS, "revision")


class VlmGenieBlueProcessor(BatchDecoding, ProcessorMixin):
    """
    Turns text and images into model inputs: text alone is what `tokenizer`, the base's own, makes of it; a request
    with images is what `vlm_processor`, the VLM's own, makes of it, with its own template and special tokens.
    """

    # Makes save_pretrained copy this file and its siblings and name the class in auto_map.
    _auto_class = "AutoProcessor"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vlm_processor: Any) -> None:
        self.tokenizer, self.vlm_processor = tokenizer, vlm_processor
        super().__init__(tokenizer)

    @property
    def chat_template(self) -> Any:
        """The base's, which formats text-only conversations."""
        return getattr(self.tokenizer, "chat_template", None)

    @chat_template.setter
    def chat_template(self, chat_template: Any) -> None:
        if chat_template not in (None, self.chat_template):
            raise ValueError("The chat template is the base's own, and that of `vlm_processor` for images.")

    @property
    def image_token(self) -> str:
        """The VLM's placeholder of an image in a plain string."""
        return self.vlm_processor.image_token

    @property
    def model_input_names(self) -> list[str]:
        """Names of all inputs, of both views."""
        return list(dict.fromkeys([*self.tokenizer.model_input_names, *self.vlm_processor.model_input_names]))

    def __call__(self, text: Any = None, images: Any = None, **kwargs: Any) -> BatchFeature:
        """Return what the base's tokenizer makes of a text, and the VLM's processor of a request with images.

        ValueError for a batch of which only some rows have images: the VLM's processor takes no row without any.
        """
        if kwargs.get("videos") is not None:
            raise ValueError("`videos` is given, but a GenieBlue sees images only: leave the video out.")
        rows = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        if not rows or all(isinstance(row, (list, tuple)) and not row for row in rows):
            return BatchFeature(self.tokenizer(text, **kwargs))
        if any(isinstance(row, (list, tuple)) and not row for row in rows):
            raise ValueError(
                "Some rows have images and others none: encode the texts in a call of their own, which the base's "
                "tokenizer reads."
            )
        bos = self.vlm_processor.tokenizer.bos_token
        rows_of_text = [text] if isinstance(text, str) else text or []
        if bos and rows_of_text and all(isinstance(each, str) and each.startswith(bos) for each in rows_of_text):
            kwargs.setdefault("add_special_tokens", False)  # as transformers does: a template has written them
        return self.vlm_processor(text=text, images=images, **kwargs)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        images: Any = None,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Format one conversation or a batch of them, and tokenize it if `tokenize` is set; by the base's template if
        none has an image, by the VLM's if all have. `images` are those of image parts without one, in order.
        """
        conversations, is_batch = conversations_of(conversation)
        sources = [image_sources(chat) for chat in conversations]
        if images is not None:
            sources = images_by_part(sources, images, "Give them in the order of the image parts.")
        if all(sources):
            chats = [self._in_parts(chat) for chat in conversations]
            if images is not None:
                chats = [_with_images(chat, row) for chat, row in zip(chats, sources, strict=True)]
            return self.vlm_processor.apply_chat_template(
                chats if is_batch else chats[0], chat_template=chat_template, tokenize=tokenize, **kwargs
            )
        if any(sources):
            raise ValueError(
                "Some conversations have images and others none: encode the texts in a call of their own, which the "
                "base's template formats."
            )
        options = {**(kwargs.pop("tokenizer_kwargs", None) or {}), **(kwargs.pop("processor_kwargs", None) or {})}
        options = take(kwargs, CALL_OPTIONS) | options
        kwargs["chat_template"] = chat_template
        chats = [text_for_template(self.tokenizer, chat, kwargs) for chat in conversations]
        whole = chats if is_batch else chats[0]
        if not tokenize:
            return self.tokenizer.apply_chat_template(whole, tokenize=False, **kwargs)
        return_dict = kwargs.pop("return_dict", True)
        output = BatchFeature(dict(tokenize_chats(self.tokenizer, whole, kwargs, options)))
        return output if return_dict else output["input_ids"]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str | list[str]:
        """Return the text of one sequence or a batch, by the base's tokenizer; by the VLM's if a token is its own.

        An answer to an image may have tokens that the base lacks, such as places in it, which would be left out.
        """
        token_ids = to_py_obj(token_ids)
        rows = token_ids if isinstance(token_ids, (list, tuple)) else [token_ids]
        if any(isinstance(ids, (list, tuple)) for ids in rows):
            return self.batch_decode(rows, skip_special_tokens, **kwargs)
        is_of_vlm = any(token >= len(self.tokenizer) for token in rows)
        tokenizer = self.vlm_processor.tokenizer if is_of_vlm else self.tokenizer
        return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def _in_parts(self, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The chat with all contents as lists of parts, which every VLM's template takes; ValueError for a text with
        a placeholder, which the VLM's processor would take for an image."""
        settings = vars(self.vlm_processor).items()
        markers = [
            each for name, each in settings if name.endswith(("image_token", "video_token")) and isinstance(each, str)
        ]
        parted = []
        for message in chat:
            content = message.get("content")
            parts = [content] if isinstance(content, str) else content or []
            parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
            for text in (part["text"] for part in parts if part.get("type") == "text"):
                if found := [marker for marker in markers if marker in text]:
                    raise ValueError(
                        f"A text contains {found[0]!r}, by which this VLM's processor marks media: reword it, and "
                        "give images as parts of a message."
                    )
            parted.append({**message, "content": parts})
        return parted

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list:
        """Write the base's tokenizer into the folder, the VLM's processor into `vlm` within it, and this code."""
        if push_to_hub:
            raise ValueError("Publish the model instead: `model.push_to_hub(name, processor=processor)`.")
        os.makedirs(save_directory, exist_ok=True)
        self.tokenizer.save_pretrained(save_directory)
        self.vlm_processor.save_pretrained(Path(save_directory, VLM_FOLDER))
        custom_object_save(self, save_directory)
        auto_map = {self._auto_class: f"{__name__.rpartition('.')[2]}.{type(self).__name__}"}
        settings = {"processor_class": type(self).__name__, "auto_map": auto_map}
        write_json(Path(save_directory, PROCESSOR_CONFIGS[0]), settings)
        return []

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load both from a folder or Hub id of a GenieBlue; OSError if one is missing or damaged."""
        refuse_address(pretrained_model_name_or_path, "The processor")
        hub = {name: kwargs[name] for name in HUB_KEYS if kwargs.get(name) is not None}
        name, trust = pretrained_model_name_or_path, bool(kwargs.pop("trust_remote_code", False))
        subfolder = kwargs.pop("subfolder", None) or ""
        rest = {key: value for key, value in kwargs.items() if key not in HUB_KEYS}
        if not os.path.isdir(name):
            patterns = ["*.json", "*.jinja", "*.model", "*.txt", f"{VLM_FOLDER}/*"]
            patterns = [os.path.join(subfolder, pattern) for pattern in patterns]
            name = snapshot_download(os.fspath(name), allow_patterns=patterns, **hub)
        name = os.path.join(name, subfolder)
        check_settings_files(name, {TOKENIZER_CONFIG_NAME: None}, TOKENIZER_CONFIG_NAME)
        if not (of_vlm := Path(name, VLM_FOLDER)).is_dir():
            raise FileNotFoundError(f"{name} has no {VLM_FOLDER}/ with the VLM's processor: fetch or save it again.")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **rest)
        return cls(tokenizer, AutoProcessor.from_pretrained(of_vlm, trust_remote_code=False, **rest))


def _with_images(chat: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """A chat of parts with its images, read, in its image parts."""
    pictures = (read_image(image, index) for index, image in enumerate(images))

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return part if part.get("type") == "text" else {"type": "image", "image": next(pictures)}

    return [{**message, "content": [filled(part) for part in message["content"]]} for message in chat]


VlmGenieBlueProcessor.register_for_auto_class()
