"""Images of requests: where they may come from, and errors that a client is told, as vLLM takes others for its own."""

import binascii
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.multimodal.media import MediaIO
from vllm.multimodal.media.connector import MediaConnector


class LimitedConnector(MediaConnector):
    """Reads `data:` URLs, and fetches only from hosts and folders that the server was started with.

    A server that fetches any address can be sent into its own network. Images that cannot be read are `ValueError`.
    """

    def load_from_url(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """The image at a URL."""
        self._check_source(url)
        return super().load_from_url(url, _ImageReader(media_io), **options)

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """As `load_from_url`, off the event loop."""
        self._check_source(url)
        return await super().load_from_url_async(url, _ImageReader(media_io), **options)

    def _check_source(self, url: str) -> None:
        sources = {
            "data": True,
            "http": self.allowed_media_domains,
            "https": self.allowed_media_domains,
            "file": self.allowed_local_media_path,
        }
        if not sources.get(url.partition(":")[0].lower()):
            raise ValueError(
                "This server fetches no addresses: send the image itself, as a data:image/...;base64,... URL "
                "(or start it with `genieblue serve --allow-domain`)."
                if not self.allowed_media_domains
                else f"This server fetches images from {', '.join(self.allowed_media_domains)} alone."
            )

    def _load_data_url(self, url: str, media_io: MediaIO[Any]) -> Any:
        return _read(super()._load_data_url, url, media_io)


class _ImageReader(MediaIO[Any]):
    """Another reader, all of whose errors are `ValueError`: a damaged file makes Pillow raise nearly anything."""

    def __init__(self, reader: MediaIO[Any]):
        self._reader = reader

    def get_max_bytes(self) -> int | None:
        return self._reader.get_max_bytes()

    def load_bytes(self, data: bytes) -> Any:
        return _read(self._reader.load_bytes, data)

    def load_base64(self, media_type: str, data: str) -> Any:
        return _read(self._reader.load_base64, media_type, data)

    def load_file(self, filepath: Path) -> Any:
        return _read(self._reader.load_file, filepath)


def _read(load: Callable, *source: Any) -> Any:
    try:
        return load(*source)
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, binascii.Error):
            raise  # which says what is wrong with the image
        raise ValueError(f"The image cannot be read: {error}") from error
