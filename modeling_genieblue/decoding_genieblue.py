"""Token ids back to text, where image tokens have none of their own."""

from typing import Any

from transformers.utils.generic import to_py_obj

from .placeholders_genieblue import MarkingTokenizer


class BatchDecoding:
    """What follows for several sequences from a processor's `decode`."""

    decode: Any

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Return the texts of several sequences, as `decode` does for each."""
        texts: list[Any] = [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]
        return texts

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Return the texts of generated sequences, prompts included (for transformers' pipeline)."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)


class ImageTokenDecoding(BatchDecoding):
    """What a processor decodes with."""

    tokenizer: Any
    image_token: str
    image_token_id: Any
    _marking: MarkingTokenizer
    _check_tokenizer: Any  # of the processor: refuses a tokenizer that was changed

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str | list[str]:
        """Return the text of one sequence or a batch; a run of image tokens is one placeholder, a special token."""
        self._check_tokenizer()
        token_ids = to_py_obj(token_ids)
        if isinstance(token_ids, (list, tuple)) and any(isinstance(ids, (list, tuple)) for ids in token_ids):
            return self.batch_decode(token_ids, skip_special_tokens, **kwargs)
        if not isinstance(token_ids, (list, tuple)) or self.image_token_id not in token_ids:
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        if skip_special_tokens:
            token_ids = [token for token in token_ids if token != self.image_token_id]
            return self.tokenizer.decode(token_ids, skip_special_tokens=True, **kwargs)
        tokenizer, numbers = self._marking.tokenizer(self.tokenizer, 1)
        previous = [None, *token_ids[:-1]]
        token_ids = [
            next(iter(numbers)) if token == self.image_token_id else token
            for token, before in zip(token_ids, previous, strict=True)
            if token != self.image_token_id or before != self.image_token_id
        ]
        (marker,) = self._marking.markers(1)
        return str(tokenizer.decode(token_ids, **kwargs)).replace(marker, self.image_token)
