"""Prompts of requests: texts as vLLM makes those of the base, and with images as the project's processor does."""

import dataclasses
import threading
from typing import Any

from jinja2 import TemplateError
from vllm.config import VllmConfig
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer, resolve_chat_template_kwargs
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.utils.async_utils import make_async

from genieblue.serving.vllm.guard import guard_servers
from genieblue.serving.vllm.prompts import cache_salt, one_token_per_image, take_view
from modeling_genieblue.processing_genieblue import GenieBlueProcessor

# Arguments of the processor that no client may set, by the name of a variable of the template or otherwise.
OWN_ARGUMENTS = ("conversation", "images", "processor_kwargs", "tokenizer_kwargs", "return_dict", "return_tensors")


class GenieBlueRenderer(HfRenderer):
    """vLLM's renderer, which leaves requests with images to `GenieBlueProcessor`.

    vLLM itself would write a placeholder as text, in another place than training had it, and take the same characters
    in a client's text for an image.
    """

    def __init__(self, config: VllmConfig, tokenizer: Any):
        super().__init__(config, tokenizer)
        guard_servers()  # each process that answers clients makes its renderer first
        model = config.model_config
        self._processor = GenieBlueProcessor.from_pretrained(model.model, revision=model.revision)
        # An image is one token here, and gets the texts around its tiles when these are cut.
        self._processor.image_prefix = self._processor.image_suffix = ""
        self._lock = threading.Lock()  # its tokenizer's markers are kept between requests
        self._encode_chat_async = make_async(self._encode_chat, executor=self._executor)

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """The conversation and its prompt, with the images if there are any."""
        conversation, images, uuids = parse_chat_messages(messages, **self._reading(params))
        params = self._without_view(params, bool(images))
        if not images:
            return super().render_messages(messages, params)
        return conversation, self._prompt(self._encode_chat(conversation, params), images, uuids)

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """As `render_messages`, off the event loop."""
        conversation, images, uuids = await parse_chat_messages_async(messages, **self._reading(params))
        params = self._without_view(params, bool(images))
        if not images:
            return await super().render_messages_async(messages, params)
        ids = await self._encode_chat_async(conversation, params)
        return conversation, self._prompt(ids, images, uuids)

    def _reading(self, params: ChatParams) -> dict[str, Any]:
        return {
            "model_config": self.model_config,
            "content_format": "openai",  # parts stay parts, in their order
            "media_io_kwargs": params.media_io_kwargs,
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    @staticmethod
    def _without_view(params: ChatParams, has_images: bool) -> ChatParams:
        options = take_view(params.chat_template_kwargs, has_images)
        return dataclasses.replace(params, chat_template_kwargs=options)

    @staticmethod
    def _prompt(ids: list[int], images: Any, uuids: Any) -> dict[str, Any]:
        pairs = zip(images.get("image", ()), uuids.get("image", ()), strict=True)
        if any(image is None and uuid is None for image, uuid in pairs):
            raise ValueError("An image part holds no image: send it as image_url, a data:image/...;base64,... URL.")
        return {"prompt_token_ids": ids, "multi_modal_data": images, "multi_modal_uuids": uuids}

    def _encode_chat(self, conversation: list[Any], params: ChatParams) -> list[int]:
        """Ids of a conversation with one image token for each image."""
        template = params.chat_template or self._processor.chat_template
        if template is None:
            raise ValueError("The base has no chat template: ask for completions of texts, without images.")
        options = params.get_apply_chat_template_kwargs()
        options = resolve_chat_template_kwargs(self.get_tokenizer(), template, options, raise_on_unexpected=False)
        options = {name: value for name, value in options.items() if name not in OWN_ARGUMENTS}
        chat = [_with_plain_parts(message) for message in conversation]
        with self._lock:
            try:
                text = self._processor.apply_chat_template(chat, params.chat_template, tokenize=False, **options)
            except TemplateError as error:  # of a template that refuses this conversation
                raise ValueError(str(error)) from error
            return self._encode(text, len(text.pieces) - 1, add_special_tokens=False)

    def _encode(self, text: str, num_images: int, add_special_tokens: bool | None) -> list[int]:
        ids = self._processor.encode_with_images(text, [1] * num_images, add_special_tokens)
        return one_token_per_image(ids, self._processor.image_token_id, self._processor.image_seq_length)

    def _tokenize_prompt(self, prompt: Any, params: TokenizeParams) -> Any:
        """A text that comes with images has a placeholder for each; any other is tokenized as the base's."""
        images = (prompt.get("multi_modal_data") or {}).get("image")
        if not images:
            return super()._tokenize_prompt(prompt, params)
        count = len(images) if isinstance(images, list) else 1
        with self._lock:
            ids = self._encode(prompt["prompt"], count, add_special_tokens=None)
        return self._build_tokens_prompt(ids, prompt)

    def _process_tokens(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        return self._salted(super()._process_tokens(prompt, skip_mm_cache=skip_mm_cache), prompt)

    async def _process_tokens_async(self, prompt: Any, *, skip_mm_cache: bool = False) -> Any:
        return self._salted(await super()._process_tokens_async(prompt, skip_mm_cache=skip_mm_cache), prompt)

    @staticmethod
    def _salted(request: Any, prompt: Any) -> Any:
        """The request with a salt by which the cached blocks of one view are never taken for the other's."""
        view = "multimodal" if request["type"] == "multimodal" else "text"
        if (salt := cache_salt(view, prompt.get("cache_salt"))) is not None:
            request["cache_salt"] = salt
        return request


def _with_plain_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message as vLLM parsed it, whose parts have their kind and text alone; the images come apart from it."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [{key: part[key] for key in ("type", "text") if key in part} for part in content]}
