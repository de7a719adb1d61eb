"""Files in a bundle besides the binaries: processor, runtime configurations, README."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BACKEND_FILE = "htp_backend_ext_config.json"
README = """# GenieBlue for {title} ({soc})

Made by `genieblue export qnn` with the compiler of Qualcomm's AI Runtime SDK (QAIRT) **{qairt_version}**, which
came with {compiler}. Everything that a runtime needs, no weights in full precision.

| file | what it is |
|---|---|
| `vision/vision.bin` | vision tower and projector, W8A16; tiles a call: {tiles} |
| `language_*/language_*.bin` | context binaries of the decoder, {parts} in all. Each holds four graphs over one \
set of weights: prefill ({chunk} tokens) and decode (1 token) of the text and the multimodal view, W4A16, LoRA W8A16, \
keys and values cached in {cache_bits} bits |
| `*/*_ctx.onnx` | a graph of a binary as a model for ONNX Runtime with the QNN provider, on the phone too |
| `embeddings.raw` | embeddings of the base, {embedding_shape} codes ({embedding_dtype}), in the order of the ids |
| `metadata.json` | every input and output: shape, dtype, scale, offset; which graph serves which view; sha256 |
| `processor/` | tokenizer and image processor |
| `genie_config.json`, `htp_backend_ext_config.json` | for Qualcomm's Genie and QNN runtimes |
{adapter}{qairt}| `qdq/`, `probe.npz` | the graphs before compilation, and numbers to check them with; not needed on \
the phone |

{rounding}. A code means `value = (code + offset) * scale`. The caches and the hidden states
between parts go from call to call as they are. `image_features` and `inputs_embeds` have codes of their own each:
image features must be decoded, and encoded again, to take the places of image tokens. A request with images runs the
multimodal graphs from its first token, any other request the text graphs; a cache belongs to the view that filled it.
How a prompt is cut, masked and cached is `conversion/qnn/chunked_decoder.py` and `runner.py` of GenieBlue, in NumPy.

## To a phone

With QAIRT on your computer, `$SDK`, and this folder as `bundle`. The runtime on the phone must be {qairt_version} or
newer: older ones are not made to read binaries of a newer compiler.

    adb push bundle /data/local/tmp/genieblue
    adb push $SDK/lib/aarch64-android/libQnnHtp.so $SDK/lib/aarch64-android/libQnnHtpV{arch}Stub.so \
$SDK/lib/aarch64-android/libQnnSystem.so /data/local/tmp/genieblue
    adb push $SDK/lib/hexagon-v{arch}/unsigned/libQnnHtpV{arch}Skel.so /data/local/tmp/genieblue

An app opens the `_ctx.onnx` files with ONNX Runtime's QNN provider (option `ep.share_ep_contexts` for those of one
binary), or the binaries with the SDK's own interface. The names of the graphs in a binary are ONNX Runtime's:
`metadata.json` has the one of each graph as `name_in_binary`. Processes of the phone's shell find the libraries by
`export LD_LIBRARY_PATH=/data/local/tmp/genieblue ADSP_LIBRARY_PATH=/data/local/tmp/genieblue`.

## What was checked, and what was not

Checked when this was exported, on an ordinary computer: the compiler put every node of every graph on the NPU's side.
`genieblue verify` checks the rest that can be checked there: that no file has changed, whether the graphs give the
same binaries again, and that the emulator of the NPU gives what the same quantized graphs give on a CPU. Not checked,
since it takes the device: speed, memory and power; that the silicon gives the numbers of its emulator; loading of a
binary of several graphs, which the emulator cannot do. `genie_config.json` describes the text view alone; Genie's own
reader takes it, but no dialog was ever held with it, and Genie may want other names of graphs and tensors.
"""

ADAPTER_ROW = """| `adapter.npz` | LoRA, inputs of the multimodal graphs: by part and name their int8 codes, \
and the scale that those have in this bundle; `genieblue export adapter` makes such files of other GenieBlues |
"""

QAIRT_ROW = """| `qairt/` | the float graphs with AIMET `.encodings`, for `qairt-converter --input_network X.onnx \
--quantization_overrides X.encodings`; never converted here, not needed on the phone |
"""


def write_runtime_files(folder: Path, metadata: Mapping[str, Any], processor: Any) -> None:
    """Writes processor, configurations and README into the folder of a bundle."""
    processor.save_pretrained(folder / "processor")
    soc, embeddings = metadata["soc"], metadata["embeddings"]
    backend, genie = _backend_settings(soc), _genie_settings(metadata)
    for name, value in ((BACKEND_FILE, backend), ("genie_config.json", genie)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    readme = README.format(
        title=soc["title"],
        soc=soc["name"],
        arch=soc["arch"],
        compiler=metadata["compiler"],
        tiles=metadata["vision"]["tiles"],
        parts=len(metadata["parts"]),
        chunk=metadata["chunk_length"],
        embedding_shape="×".join(map(str, embeddings["shape"])),
        embedding_dtype=embeddings["dtype"],
        rounding=(
            "AIMET's SeqMSE chose the scales of the matrices"
            if metadata["rounding"] == "seqmse"
            else "Matrices were rounded to nearest"
        ),
        cache_bits=metadata["cache_bits"],
        adapter=ADAPTER_ROW if metadata["adapter"]["lora"] == "inputs" else "",
        qairt=QAIRT_ROW if (folder / "qairt").is_dir() else "",
        qairt_version=metadata["qairt"],
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _backend_settings(soc: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of QNN's own runtime for a chip as the metadata describe it."""
    return {
        "devices": [
            {
                "soc_model": soc["model"],
                "dsp_arch": f"v{soc['arch']}",
                "cores": [{"core_id": 0, "perf_profile": "burst", "rpc_control_latency": 100}],
            }
        ],
        "memory": {"mem_type": "shared_buffer"},
        "context": {"weight_sharing_enabled": True},
    }


def _genie_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A dialog of Qualcomm's Genie with the text view of a bundle."""
    decoder, embeddings = metadata["decoder"], metadata["embeddings"]
    begin, ends = metadata["generation"]["bos_token_id"], metadata["generation"]["eos_token_ids"]
    context = {
        "version": 1,
        "size": metadata["context_length"],
        "n-vocab": decoder["vocab_size"],
        # Genie wants one; a base that begins texts with none is never given it, as its tokenizer adds none.
        "bos-token": begin if begin is not None else ends[0] if ends else 0,
        "eos-token": ends[0] if len(ends) == 1 else ends or 0,
    }
    embedding = {
        "version": 1,
        "type": "lut",
        "lut-path": embeddings["file"],
        "size": decoder["hidden_size"],
        "datatype": "ufixed16",
        "quant-param": {"scale": embeddings["scale"], "offset": embeddings["offset"]},
    }
    htp = {
        "version": 1,
        "use-mmap": True,
        "poll": True,
        "spill-fill-bufsize": 0,
        "mmap-budget": 0,
        "cpu-mask": "0xe0",
        "allow-async-init": False,
        "kv-dim": decoder["head_dim"],
        "pos-id-dim": decoder["head_dim"] // 2,
    }
    binaries = [part["binary"] for part in metadata["parts"]]
    engine = {
        "version": 1,
        "n-threads": 3,
        "backend": {"version": 1, "type": "QnnHtp", "QnnHtp": htp, "extensions": BACKEND_FILE},
        "model": {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": binaries}},
    }
    return {
        "dialog": {
            "version": 1,
            "type": "basic",
            "context": context,
            "sampler": {"version": 1, "greedy": True},
            "tokenizer": {"version": 1, "path": "processor/tokenizer.json"},
            "embedding": embedding,
            "engine": engine,
        }
    }
