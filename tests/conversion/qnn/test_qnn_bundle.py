"""Bundles: exported whole or in parts, stopped and continued, run, verified, and damaged."""

import ctypes
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime_qnn", reason="needs the extra `qnn`")

import onnx
import onnxruntime_qnn
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file
from tiny_genieblue import prompt, tiles
from tiny_qnn import CHUNK, CONTEXT, SETTINGS, requests, save_pair
from typer.testing import CliRunner

from conversion.qnn import verify as verify_module
from conversion.qnn.agreement import agreement
from conversion.qnn.bundle.metadata import Bundle, signed
from conversion.qnn.bundle.runner import QnnRunner
from conversion.qnn.export import export_bundle
from conversion.qnn.qdq.files import read_codes
from conversion.qnn.verify import verify_bundle
from genieblue.cli.app import app
from genieblue.evaluation.evaluate import evaluate
from genieblue.evaluation.qnn_answering import BundleAnswerer
from genieblue.evaluation.samples import EvaluationDataset
from genieblue.serving.qnn_conversation import QnnChat
from modeling_genieblue import GenieBlueForConditionalGeneration


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def bundle(pair, tmp_path_factory):
    """One bundle of two parts, to be read only."""
    return export_bundle(pair, tmp_path_factory.mktemp("out") / "bundle", calibration=requests(), parts=2, **SETTINGS)


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def test_a_bundle_holds_what_a_runtime_needs(bundle):
    facts = Bundle(bundle).metadata
    names = set(facts["files"])
    assert {"embeddings.raw", "README.md", "genie_config.json", "processor/tokenizer.json"} <= names
    assert {"vision/vision.bin", "language_0/language_0.bin", "language_1/language_1.bin"} <= names
    assert set(facts["parts"][0]["graphs"]) == {
        "text_prefill", "text_decode", "multimodal_prefill", "multimodal_decode",
    }  # fmt: skip
    inputs = {tensor["name"]: tensor for tensor in facts["parts"][0]["graphs"]["text_prefill"]["inputs"]}
    assert inputs["inputs_embeds"]["shape"] == [1, CHUNK, 64]
    assert inputs["past_key_0_in"]["shape"][-1] == CONTEXT - CHUNK
    assert inputs["inputs_embeds"]["scale"] == facts["embeddings"]["scale"]
    assert not list(bundle.parent.glob("*unfinished*"))
    extensions = json.loads((bundle / "htp_backend_ext_config.json").read_text())
    assert extensions["devices"][0]["soc_model"] == 69 and extensions["devices"][0]["dsp_arch"] == "v79"
    assert "Not checked" in (bundle / "README.md").read_text()


def test_qualcomms_reader_takes_the_settings_of_genie(bundle):
    genie = ctypes.CDLL(str(Path(onnxruntime_qnn.__file__).parent / "libGenie.so"))

    def status(settings):
        handle = ctypes.c_void_p()
        return genie.GenieDialogConfig_createFromJson(json.dumps(settings).encode(), ctypes.byref(handle))

    settings = json.loads((bundle / "genie_config.json").read_text())
    assert status(settings) == 0
    del settings["dialog"]["context"]["bos-token"]
    assert status(settings) != 0  # it does look


def test_graphs_are_named_as_in_their_binary(bundle):
    facts = Bundle(bundle).metadata
    graphs = [facts["vision"]["graph"], *(graph for part in facts["parts"] for graph in part["graphs"].values())]
    for graph in graphs:
        assert graph["name_in_binary"] in (bundle / graph["context"]).read_bytes().decode(errors="replace")
    assert len({graph["name_in_binary"] for graph in graphs}) == len(graphs)
    assert facts["qairt"].startswith("v2.") and facts["qairt"] in (bundle / "README.md").read_text()


def test_what_one_part_gives_the_next_one_takes_code_by_code(bundle):
    first, second = (part["graphs"] for part in Bundle(bundle).metadata["parts"])
    for key in first:
        given = {tensor["name"]: tensor for tensor in first[key]["outputs"]}["hidden_states_out"]
        taken = {tensor["name"]: tensor for tensor in second[key]["inputs"]}["hidden_states_in"]
        assert {**given, "name": ""} == {**taken, "name": ""}


def test_caches_have_one_encoding_in_all_graphs_of_a_view(bundle):
    for part in Bundle(bundle).metadata["parts"]:
        for view in ("text", "multimodal"):
            found = set()
            for stage in ("prefill", "decode"):
                graph = part["graphs"][f"{view}_{stage}"]
                for tensor in (*graph["inputs"], *graph["outputs"]):
                    if tensor["name"].startswith(f"past_value_{part['blocks'][0]}"):
                        found.add((tensor["scale"], tensor["offset"], tensor["dtype"]))
            assert len(found) == 1


def test_a_bundle_passes_its_verification_against_the_base(bundle, pair):
    base = GenieBlueForConditionalGeneration.from_pretrained(pair).language_model
    checks = verify_bundle(bundle, base=base)
    assert [check for check in checks if not check.ok] == []
    names = {check.name for check in checks}
    assert {"files", "vision/vision.bin", "language_1/language_1.bin", "weights of the text graphs"} <= names
    stages = [f"{view}_{stage}" for view in ("text", "multimodal") for stage in ("prefill", "decode")]
    assert {f"part {part} {stage}: emulator against CPU" for part in (0, 1) for stage in stages} <= names


@pytest.mark.slow
def test_weights_of_another_base_are_told(bundle, pair):
    base = GenieBlueForConditionalGeneration.from_pretrained(pair).language_model
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0].mul_(-1)
    (check,) = [check for check in verify_bundle(bundle, base=base) if check.name == "weights of the text graphs"]
    assert not check.ok and "blocks.0.up_proj.weight of part 0 is not the base's" in check.detail


def weights_check(folder, base=None):
    (check,) = verify_module._check_weights(Bundle(folder), base)
    return check


def test_norms_and_embeddings_of_another_base_are_told(bundle, pair):
    base = GenieBlueForConditionalGeneration.from_pretrained(pair).language_model
    assert weights_check(bundle, base).ok
    with torch.no_grad():
        base.model.layers[1].input_layernorm.weight[3] *= 1.5
        base.model.embed_tokens.weight[5] += 0.1
    check = weights_check(bundle, base)
    assert not check.ok
    assert "blocks.0.q_proj.weight of part 1 is not the base's" in check.detail  # its norm's weights are in it
    assert "1 of 128 embeddings are not the base's" in check.detail


def test_a_base_that_is_there_is_compared_with_unasked(copy, pair):
    assert weights_check(copy).detail.endswith("not compared with a base: give --base")
    facts = Bundle(copy).metadata
    for name, told in (
        (str(pair.parent / "base"), "those of the base alone"),
        ("/no/where", "give --base"),
    ):
        facts["base"]["name_or_path"] = name
        (copy / "metadata.json").write_text(json.dumps(signed(facts)))
        check = weights_check(copy)
        assert check.ok and told in check.detail


def test_a_base_of_pickles_is_never_loaded(copy, pair, tmp_path):
    base = shutil.copytree(pair.parent / "base", tmp_path / "pickled")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert verify_module._find_base({"name_or_path": str(base), "revision": None}) is None
    result = CliRunner().invoke(app, ["verify", str(copy), "--base", str(base)])
    assert result.exit_code == 1 and "model.safetensors" in result.stderr and result.stdout == ""


def test_the_binary_of_the_vision_tower_is_run(copy):
    assert all(check.ok for check in verify_module._check_vision(Bundle(copy), None))
    path = copy / "vision/vision.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises((OSError, RuntimeError), match="vision_ctx.onnx"):
        list(verify_module._check_vision(Bundle(copy), None))


def test_a_binary_of_other_bytes_is_no_proof(copy):
    bundle = Bundle(copy)
    record = bundle.metadata["vision"]
    path = copy / record["binary"]
    path.write_bytes(bytes(path.stat().st_size))
    check = verify_module._compile_again(bundle, record["binary"], {"vision": record["graph"]})
    assert check.detail.startswith("only its size could be compared")


def test_a_graph_that_the_probe_never_calls_fails(bundle, monkeypatch):
    monkeypatch.setattr(verify_module, "_compile_again", lambda *_: verify_module.Check("binary", True, ""))
    monkeypatch.setattr(verify_module, "_run_probe", lambda *arguments: arguments[3])
    failed = [check for check in verify_module._check_language(Bundle(bundle), None) if not check.ok]
    assert len(failed) == 2 * 4 and all("never called it" in check.detail for check in failed)


def test_views_share_the_base_s_codes_and_differ_in_the_replicated_block(bundle):
    text, multimodal = (read_codes(bundle / f"qdq/language_1_{view}_decode.onnx") for view in ("text", "multimodal"))
    replicated = Bundle(bundle).metadata["adapter"]["replicated_layers"]
    assert replicated == [1]  # the only block of this part
    assert not np.array_equal(text["blocks.0.up_proj.weight"].codes, multimodal["blocks.0.up_proj.weight"].codes)
    assert np.array_equal(text["head.weight"].codes, multimodal["head.weight"].codes)
    shared, with_lora = (read_codes(bundle / f"qdq/language_0_{view}_decode.onnx") for view in ("text", "multimodal"))
    assert all(np.array_equal(weight.codes, with_lora[name].codes) for name, weight in shared.items())
    assert "blocks.0.gate_up_lora.lora_a" in with_lora and not any("lora" in name for name in shared)


@pytest.mark.slow
def test_changed_missing_and_swapped_files_are_told(copy):
    path = copy / "embeddings.raw"
    path.write_bytes(bytes(1) + path.read_bytes()[1:])
    (copy / "genie_config.json").unlink()
    (copy / "mine.txt").touch()
    check = verify_bundle(copy)[0]
    assert not check.ok
    assert "embeddings.raw has other contents" in check.detail and "genie_config.json is missing" in check.detail
    assert "mine.txt is not a file of the bundle" in check.detail
    with pytest.raises(ValueError, match="embeddings.raw has other contents"):
        QnnRunner(copy)


@pytest.mark.slow
def test_a_graph_with_a_wrong_scale_is_told_from_the_price_of_4_bits(copy):
    path = copy / "qdq/language_1_text_prefill.onnx"
    graph = onnx.load(path, load_external_data=False)
    scale = next(tensor for tensor in graph.graph.initializer if tensor.name == "logits/scale")
    doubled = 2 * numpy_helper.to_array(scale)
    scale.CopyFrom(numpy_helper.from_array(doubled, "logits/scale"))
    path.write_bytes(graph.SerializeToString())
    failed = {check.name: check.detail for check in verify_bundle(copy) if not check.ok}
    assert "files" in failed
    assert "beyond the limits: logits" in failed["part 1 text: CPU against float with rounded weights"]


class Shifted:
    """A session whose outputs are off, all by the same number of codes: their cosine hardly moves."""

    def __init__(self, session, codes):
        self.session, self.codes = session, codes

    def run(self, names, feeds):
        return [(value.astype(np.int64) + self.codes).astype(value.dtype) for value in self.session.run(names, feeds)]


@pytest.mark.slow
def test_numbers_that_are_off_miss_the_gates(bundle, monkeypatch):
    real = verify_module.npu_session
    monkeypatch.setattr(verify_module, "npu_session", lambda *arguments: Shifted(real(*arguments), 3000))
    failed = [check for check in verify_bundle(bundle) if not check.ok]
    assert {check.name.rpartition(": ")[2] for check in failed} == {"emulator against CPU"}
    assert len(failed) == 1 + 2 * 4  # vision, and four graphs of each part
    assert all("beyond the limits" in check.detail for check in failed)


@pytest.mark.parametrize("backend", ["cpu", "emulator"])
def test_a_runner_says_nearly_what_the_model_says(bundle, pair, backend):
    runner = QnnRunner(bundle, backend)
    model = GenieBlueForConditionalGeneration.from_pretrained(pair)
    request = requests(1)[1]
    with torch.no_grad():
        expected = model(input_ids=request["input_ids"][None], pixel_values=request["pixel_values"]).logits[0].numpy()
    found = runner.logits(request["input_ids"], request["pixel_values"].numpy())
    assert agreement(found, expected).cosine > 0.98
    text = runner.logits(request["input_ids"][:5])
    assert agreement(text, runner.logits(request["input_ids"][:5], view="multimodal")).cosine < 0.999


def test_the_two_backends_agree(bundle):
    request = requests(1)[1]
    found = [
        QnnRunner(bundle, backend).logits(request["input_ids"], request["pixel_values"].numpy())
        for backend in ("emulator", "cpu")
    ]
    assert agreement(*found).is_close


def test_a_runner_stops_at_the_end_of_the_context(bundle, caplog):
    runner = QnnRunner(bundle)
    runner.bundle.metadata["generation"]["eos_token_ids"] = []
    assert len(list(runner.generate(prompt(CONTEXT - 3)[0], max_new_tokens=4))) == 4 and not caplog.text
    assert len(list(runner.generate(prompt(CONTEXT - 3)[0], max_new_tokens=100))) == 4
    assert "cut off: the graphs' context of 64 tokens is full" in caplog.text
    with pytest.raises(ValueError, match="tokens: 0, features: 4"):
        runner.embed([1, 2], tiles(1).numpy())
    with pytest.raises(ValueError, match="context of 64"):
        runner.logits(prompt(CONTEXT + 1)[0])
    for ids in ([5, -1], [5, 100_000]):
        with pytest.raises(ValueError, match=f"The id {ids[1]} is not in the table"):
            runner.logits(ids)
    with pytest.raises(ValueError, match="expected whole numbers"):
        runner.logits([])
    request = requests(1)[1]
    with pytest.raises(ValueError, match="Unknown view 'both'"):
        runner.logits(request["input_ids"], view="both")
    with pytest.raises(ValueError, match="text view reads no images"):
        list(runner.generate(request["input_ids"], request["pixel_values"].numpy(), view="text"))
    with pytest.raises(ValueError, match=r"expected one or more tiles of \(3, 24, 24\)"):
        runner.image_features(np.zeros((1, 3, 8, 8), np.float32))


def test_a_batch_of_tiles_is_filled_up_with_its_last_one(bundle, monkeypatch):
    runner = QnnRunner(bundle)
    pixels = tiles(1).numpy()
    expected = runner.image_features(pixels)
    runner.bundle.metadata["vision"]["tiles"] = 3
    seen = []

    def run(feeds):
        seen.append(feeds["pixel_values"])
        return {"image_features": np.zeros((3, *expected.shape[1:]), np.uint16)}

    monkeypatch.setattr(runner._vision, "run", run)
    assert runner.image_features(pixels).shape == expected.shape
    assert np.array_equal(seen[0], np.concatenate([pixels] * 3))


def run_json(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_chat_asks_a_bundle(bundle, tmp_path):
    command = ["chat", "--qnn", bundle, "--json", "--max-new-tokens", 2, "--prompt", "hi"]
    assert run_json(*command)["view"] == "text"
    assert run_json(*command, "--view", "multimodal")["view"] == "multimodal"
    Image.new("RGB", (48, 24), "red").save(tmp_path / "scan.png")
    answer = run_json(*command, "--image", tmp_path / "scan.png")
    assert set(answer) == {"text", "view", "prompt_tokens", "generated_tokens"}
    assert answer["view"] == "multimodal" and answer["prompt_tokens"] > 4


def test_a_conversation_goes_on_from_the_cache_with_the_same_answers(bundle):
    runner, fresh = QnnRunner(bundle), QnnRunner(bundle)
    read = []
    continue_from = runner.continue_from
    runner.continue_from = lambda decoder, ids, *rest, **more: (
        read.append((decoder.length, len(ids))) or continue_from(decoder, ids, *rest, **more)
    )
    chat = QnnChat(runner)
    red, blue = (Image.new("RGB", (24, 24), color) for color in ("red", "blue"))
    turns = [("a", []), ("b", []), ("c", [red]), ("d", []), ("e", [blue])]
    for prompt_text, images in turns:
        before = list(chat.messages)
        pieces = []
        found = chat.ask(prompt_text, images, max_new_tokens=2, on_text=pieces.append)
        without_cache = QnnChat(fresh)
        without_cache.messages = before
        assert found == without_cache.ask(prompt_text, images, max_new_tokens=2)
        assert "".join(pieces) == found["text"]
        assert sum(read[-1]) == found["prompt_tokens"]
    cached = [length for length, _ in read]
    assert cached[0] == 0 and cached[1] > 0  # a text turn goes on,
    assert cached[2] == 0  # the first image runs the other view from the start,
    assert cached[3] > 0 and cached[4] > 0  # which then goes on as well, with the new tile alone
    with pytest.raises(ValueError, match="context of 64"):
        chat.ask("word " * CONTEXT)
    assert len(chat.messages) == 2 * len(turns)
    chat.reset()
    assert chat.ask("a", max_new_tokens=2) == QnnChat(fresh).ask("a", max_new_tokens=2)


@pytest.mark.slow
def test_verify_checks_a_bundle(bundle, pair):
    found = run_json("verify", bundle, "--base", pair.parent / "base", "--json")
    assert found["ok"]
    (check,) = [check for check in found["checks"] if check["name"] == "weights of the text graphs"]
    assert "those of the base alone" in check["detail"]


def test_a_folder_that_is_no_bundle_and_a_strange_backend_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a QNN bundle"):
        verify_bundle(tmp_path)
    with pytest.raises(ValueError, match="Unknown backend 'gpu'"):
        QnnRunner(tmp_path, "gpu")


def test_a_bundle_is_evaluated_like_a_model(bundle):
    runner = QnnRunner(bundle)
    red = Image.new("RGB", (24, 24), "red")
    content = [{"type": "image", "image": red}, {"type": "text", "text": "What is it?"}]
    texts = [{"role": "user", "content": "What is it?"}]
    chats = [texts, [{"role": "user", "content": content}]]
    said = [QnnChat(runner).ask("What is it?", images, max_new_tokens=4)["text"].strip() for images in ([], [red])]
    samples = [{"messages": chat, "answers": answer} for chat, answer in zip(chats, said, strict=True)]
    samples.append({"messages": texts, "choices": ["It is red.", "a"], "answers": "a"})
    answerer = BundleAnswerer(runner)
    evaluation = evaluate(answerer, EvaluationDataset(samples), max_new_tokens=4)
    assert [(answer.answer, answer.view) for answer in evaluation.answers[:2]] == [
        (said[0], "text"), (said[1], "multimodal")
    ]  # fmt: skip
    likelihoods = answerer.log_likelihoods(EvaluationDataset(samples)[2])
    prompt_ids = runner.processor.apply_chat_template(texts, add_generation_prompt=True, tokenize=True)
    first = torch.tensor(runner.logits(prompt_ids)[-1]).log_softmax(-1)
    assert all(value < 0 for value in likelihoods) and likelihoods[1] <= float(first.max())
