"""Speed of the two views against the plain base and merged LoRA, interleaved, as one table.

    python -m benchmarks.views [--pairs 9] [--tokens 24] [--blocks 12] [--compile] [--device cpu]

A random-weight Llama-style base of 12 blocks, hidden size 1024, bf16, 2 threads. Each pair times A and B one after the
other, so that a drift of the machine's speed hits both; the ratio's median over the pairs is reported. `--compile`
adds decode steps that `torch.compile` made one graph of, with a static cache.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel, StaticCache

from benchmarks.report import print_table
from modeling_genieblue import GenieBlueForConditionalGeneration
from modeling_genieblue.language_adapter_genieblue import adapter_parameters

TOY_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip


def make_model(
    device: str, hidden_size: int = 1024, intermediate_size: int = 2816, blocks: int = 16
) -> GenieBlueForConditionalGeneration:
    """The benchmark's GenieBlue: a quarter of the blocks is copied, LoRA rank 8 on the others, adapter not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=blocks, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
    vision = SiglipVisionModel(SiglipVisionConfig(**TOY_VISION)).to(device, torch.bfloat16)
    model = GenieBlueForConditionalGeneration.from_base(base, vision)
    with torch.no_grad():
        for _, _, parameter in adapter_parameters(model.multimodal_language_model):
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def stock_view(model: GenieBlueForConditionalGeneration) -> PeftModel:
    """The adapter in stock PEFT; merged into the weights it is what the multimodal view is measured against."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder + "/model")
        return PeftModel.from_pretrained(
            copy.deepcopy(model.language_model), folder + "/model", subfolder="language_adapter",
            autocast_adapter_dtype=False,
        ).eval()  # fmt: skip


def compiled_steps(view: torch.nn.Module, length: int) -> Callable:
    """`view` over a static cache of `length` positions: prefill as it is, each later step as one compiled graph."""
    step = torch.compile(view, fullgraph=True)
    cache = StaticCache(config=view.config, max_cache_len=length)

    def run(past_key_values: StaticCache | None = None, **inputs: object) -> object:
        if past_key_values is None:
            cache.reset()
            return view(past_key_values=cache, **inputs)
        return step(past_key_values=cache, **inputs)

    return run


def seconds() -> float:
    """CPU time where one thread does all the work, which a busy computer does not stretch; the clock's otherwise."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@torch.no_grad()
def decode_seconds(run: Callable, ids: torch.Tensor, tokens: int) -> float:
    """Seconds for `tokens` cached decode steps after a prefill of `ids`, the prefill left out."""
    outputs = run(input_ids=ids, use_cache=True)
    cache, next_ids = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
    synchronize(ids.device)
    start = seconds()
    for _ in range(tokens):
        outputs = run(input_ids=next_ids, past_key_values=cache, use_cache=True)
        next_ids = outputs.logits[:, -1:].argmax(-1)
    synchronize(ids.device)
    return seconds() - start


@torch.no_grad()
def prefill_seconds(run: Callable, ids: torch.Tensor, _tokens: int) -> float:
    """Seconds for one pass over `ids`."""
    synchronize(ids.device)
    start = seconds()
    run(input_ids=ids, use_cache=True)
    synchronize(ids.device)
    return seconds() - start


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(measure: Callable, first: Callable, second: Callable, ids: torch.Tensor, tokens: int, pairs: int) -> dict:
    """Interleaved pairs → medians and the median, lowest and highest ratio first / second."""
    measure(first, ids, tokens), measure(second, ids, tokens)  # warm-up
    times = []
    for index in range(pairs):
        # The order alternates, so that neither side always runs on the caches that the other has filled.
        if index % 2:
            later, earlier = measure(second, ids, tokens), measure(first, ids, tokens)
            times.append((earlier, later))
        else:
            times.append((measure(first, ids, tokens), measure(second, ids, tokens)))
    ratios = sorted(one / other for one, other in times)
    return {
        "ms": statistics.median(one for one, _ in times) / tokens * 1e3,
        "against_ms": statistics.median(other for _, other in times) / tokens * 1e3,
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = make_model(arguments.device, blocks=arguments.blocks)
    ids = torch.randint(3, 32000, (1, 64), device=arguments.device)
    base, multimodal = model.language_model, lambda **inputs: model(view="multimodal", **inputs)
    merged, stock = stock_view(model).merge_and_unload(), stock_view(model)
    plan = [
        ("text view / plain base, decode", decode_seconds, model, base),
        ("text view / plain base, prefill 64", prefill_seconds, model, base),
        ("multimodal view / merged LoRA, decode", decode_seconds, multimodal, merged),
        ("multimodal view / merged LoRA, prefill 64", prefill_seconds, multimodal, merged),
        ("stock PEFT / merged LoRA, decode", decode_seconds, stock, merged),
    ]
    if arguments.compile:
        length = ids.shape[1] + arguments.tokens
        compiled = {
            name: compiled_steps(view, length)
            for name, view in (("text", base), ("multimodal", model.multimodal_language_model), ("merged", merged))
        }
        plan += [
            ("text view, compiled / eager, decode", decode_seconds, compiled["text"], base),
            ("merged LoRA, compiled / eager, decode", decode_seconds, compiled["merged"], merged),
            ("multimodal view, compiled / eager, decode", decode_seconds, compiled["multimodal"], multimodal),
            ("multimodal compiled / merged eager, decode", decode_seconds, compiled["multimodal"], merged),
            ("multimodal / merged, both compiled, decode", decode_seconds, compiled["multimodal"], compiled["merged"]),
        ]
    rows = {}
    for name, measure, first, second in plan:
        tokens = arguments.tokens if measure is decode_seconds else 1
        rows[name] = compare(measure, first, second, ids, tokens, arguments.pairs)
    print_table("The two views", rows)


if __name__ == "__main__":
    main()
