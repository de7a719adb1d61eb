"""A tiny BlueLM-like decoder in the manner of older remote code.

It does by hand what library models leave to shared helpers: the causal mask, the positions in
`prepare_inputs_for_generation`, the loss, and an `inv_freq` buffer that no checkpoint holds.
"""

import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_bluelm import BlueLMConfig


def inverse_frequencies(head_dim, base):
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotate(states, cos, sin):
    """Rotates each (first half, second half) pair of `states` (batch, heads, length, head_dim) by its angle."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class BlueLMRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states):
        states = hidden_states.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * states.to(hidden_states.dtype)


class BlueLMRotaryEmbedding(nn.Module):
    def __init__(self, head_dim, base):
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        self.register_buffer("inv_freq", inverse_frequencies(head_dim, base), persistent=False)

    def forward(self, position_ids, dtype):
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)  # (batch, 1, length, head_dim)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class BlueLMMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class BlueLMAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.rotary_emb = BlueLMRotaryEmbedding(self.head_dim, config.rope_base)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_values):
        batch_size, length, _ = hidden_states.shape
        query = self.q_proj(hidden_states).view(batch_size, length, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).view(batch_size, length, self.num_key_value_heads, self.head_dim)
        value = self.v_proj(hidden_states).view(batch_size, length, self.num_key_value_heads, self.head_dim)
        key, value = key.transpose(1, 2), value.transpose(1, 2)

        cos, sin = self.rotary_emb(position_ids, hidden_states.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        groups = self.num_heads // self.num_key_value_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * self.head_dim**-0.5 + attention_mask
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        output = (weights @ value).transpose(1, 2).reshape(batch_size, length, -1)
        return self.o_proj(output), weights


class BlueLMDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = BlueLMAttention(config, layer_idx)
        self.mlp = BlueLMMLP(config)
        self.input_layernorm = BlueLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BlueLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask, position_ids, past_key_values):
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, position_ids, past_key_values
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, weights


class BlueLMPreTrainedModel(PreTrainedModel):
    config_class = BlueLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("BlueLMDecoderLayer",)
    _skip_keys_device_placement = "past_key_values"

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(1.0)
            module.bias.data.zero_()
        elif isinstance(module, BlueLMRMSNorm):
            module.weight.data.fill_(1.0)
        elif isinstance(module, BlueLMRotaryEmbedding):
            # Not in the checkpoint, so after a load from meta it would be whatever was in memory.
            module.inv_freq.data.copy_(inverse_frequencies(module.head_dim, module.base))


class BlueLMModel(BlueLMPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([BlueLMDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = BlueLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def _additive_mask(self, attention_mask, inputs_embeds, past_length):
        """Mask of (batch or 1, 1, length, past_length + length): 0 to see a token, the dtype's minimum not to."""
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        queries = torch.arange(past_length, past_length + length, device=device)
        visible = torch.arange(past_length + length, device=device)[None, :] <= queries[:, None]
        visible = visible[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :].bool()
        return torch.zeros_like(visible, dtype=inputs_embeds.dtype).masked_fill(
            ~visible, torch.finfo(inputs_embeds.dtype).min
        )

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("BlueLM takes either input_ids or inputs_embeds.")
        if self.gradient_checkpointing and self.training:
            use_cache = False

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            if not self.config.normalize_given_embeds:
                inputs_embeds = self.embed_layer_norm(inputs_embeds)
        if self.config.normalize_given_embeds:
            inputs_embeds = self.embed_layer_norm(inputs_embeds)

        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(
                past_length, past_length + inputs_embeds.shape[1], device=inputs_embeds.device
            ).unsqueeze(0)
        mask = self._additive_mask(attention_mask, inputs_embeds, past_length)

        hidden_states = inputs_embeds
        all_hidden_states = () if output_hidden_states else None
        all_attentions = () if output_attentions else None
        for layer in self.layers:
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if self.gradient_checkpointing and self.training:
                hidden_states, weights = self._gradient_checkpointing_func(
                    layer.__call__, hidden_states, mask, position_ids, None
                )
            else:
                hidden_states, weights = layer(hidden_states, mask, position_ids, past_key_values)
            if output_attentions:
                all_attentions += (weights,)

        hidden_states = self.norm(hidden_states)
        if output_hidden_states:
            all_hidden_states += (hidden_states,)
        past_key_values = past_key_values if use_cache else None
        if not return_dict:
            outputs = (hidden_states, past_key_values, all_hidden_states, all_attentions)
            return tuple(output for output in outputs if output is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=all_hidden_states,
            attentions=all_attentions,
        )


class BlueLMForCausalLM(BlueLMPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = BlueLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(outputs.last_hidden_state).float()

        loss = None
        if labels is not None:
            predicted = logits[..., :-1, :].reshape(-1, self.config.vocab_size)
            loss = CrossEntropyLoss()(predicted, labels[..., 1:].reshape(-1).to(logits.device))
        if not return_dict:
            values = (loss, logits, outputs.past_key_values, outputs.hidden_states, outputs.attentions)
            return tuple(value for value in values if value is not None)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = None
        if attention_mask is not None:
            position_ids = attention_mask.long().cumsum(-1) - 1
            position_ids.masked_fill_(attention_mask == 0, 1)

        if inputs_embeds is not None and past_length == 0:
            # `generate` always keeps a cache with embeddings, so this is the prefill and nothing else.
            inputs = {"inputs_embeds": inputs_embeds}
        elif past_length >= input_ids.shape[1]:
            # After a prompt of embeddings the ids hold the chosen tokens only.
            inputs = {"input_ids": input_ids[:, -1:]}
        else:
            inputs = {"input_ids": input_ids[:, past_length:]}
        if position_ids is not None:
            length = next(iter(inputs.values())).shape[1]
            position_ids = position_ids[:, -length:]
        return {
            **inputs,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
        }
