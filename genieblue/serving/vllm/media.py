"""Images that arrive in the request itself: a server that fetches addresses can be sent to its own network."""

import asyncio
from typing import Any

from vllm.multimodal.media import MediaIO
from vllm.multimodal.media.connector import MediaConnector, global_thread_pool


class DataOnlyConnector(MediaConnector):
    """Reads `data:` URLs and refuses all others; errors of broken data are `ValueError`, which a client is told."""

    def load_from_url(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """The image in a `data:` URL."""
        if url[:5].lower() != "data:":
            raise ValueError(
                "This server fetches no addresses: send the image itself, as a data:image/...;base64,... URL "
                "(or start it with `genieblue serve --allow-domain`)."
            )
        try:
            return self._load_data_url(url, media_io)
        except NotImplementedError as error:
            raise ValueError(str(error)) from error

    async def load_from_url_async(self, url: str, media_io: MediaIO[Any], **options: Any) -> Any:
        """As `load_from_url`, off the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(global_thread_pool, self.load_from_url, url, media_io)
