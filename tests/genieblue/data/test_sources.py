"""Sources: which files, folders and data sets are read, by what names samples go, and which are refused."""

import io
import json
import tarfile

import pytest
from PIL import Image

from genieblue.data.chats import ChatDataset
from genieblue.data.mixture import open_mixture

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def chat(question: str, has_image: bool = False, **more) -> dict:
    content = f"<image>{question}" if has_image else question
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    return {"messages": turns, **more}


def question(sample) -> str:
    content = sample.messages[0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def questions(chats) -> list[str]:
    return [question(chats[index]) for index in range(len(chats))]


def write_tar(path, members: dict[str, bytes | str | dict]):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = json.dumps(content) if isinstance(content, dict) else content
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# Parquet and tables


@pytest.mark.parametrize("name", ["a.parquet", "a:2.parquet", "[a] b*.parquet"])
def test_parquet_is_read_under_any_name(name, tmp_path):
    path = tmp_path / name
    rows = [chat("a", True, images=[{"bytes": png(), "path": None}]), chat("b", images=[])]
    datasets.Dataset.from_list(rows).to_parquet(path)
    chats = open_mixture([str(path)])
    assert questions(chats) == ["a", "b"] and len(chats.with_images()) == 1
    assert chats[0].images == [png()] and chats.where(1) == f"{path}, sample 1"
    assert chats.sha256 == open_mixture([str(path)]).sha256


@pytest.mark.parametrize("feature", ["Image", "undecoded", "list of Image", "struct", "path"])
def test_image_columns_are_read_in_every_form(feature, tmp_path):
    (tmp_path / "a.png").write_bytes(png("blue"))
    single = {"Image": datasets.Image(), "undecoded": datasets.Image(decode=False)}
    value = "a.png" if feature == "path" else {"bytes": png("blue"), "path": None}
    value = [value] if feature == "list of Image" else value
    dataset = datasets.Dataset.from_list([chat("a", True, image=value), chat("b", image=None)])
    if feature in single or feature == "list of Image":
        dataset = dataset.cast_column("image", single.get(feature) or datasets.List(datasets.Image()))
    dataset.to_parquet(tmp_path / "a.parquet")
    chats = ChatDataset(tmp_path / "a.parquet")
    (image,) = chats[0].images
    opened = (
        image
        if isinstance(image, Image.Image)
        else Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    )
    assert opened.getpixel((0, 0)) == (0, 0, 255) and chats[1].images == []


def test_a_missing_image_of_a_table_is_found_at_once(tmp_path):
    datasets.Dataset.from_list([chat("a", True, image="none.png")]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, sample 0: the image file .*none.png does not exist"):
        ChatDataset(tmp_path / "a.parquet")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(ValueError, match="a.parquet cannot be read by `datasets`"):
        ChatDataset(tmp_path / "a.parquet")


def test_a_saved_folder_is_read_and_one_of_splits_refused(tmp_path):
    dataset = datasets.Dataset.from_list([chat("a"), chat("b")])
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "two")
    assert questions(open_mixture([str(tmp_path / "one")])) == ["a", "b"]
    assert questions(ChatDataset(tmp_path / "two" / "test")) == ["a", "b"]
    with pytest.raises(ValueError, match="two has several splits: give .*two/train"):
        ChatDataset(tmp_path / "two")


# Folders and globs


def test_folders_and_globs_of_shards_are_one_source(tmp_path):
    for name in ("s2", "s1"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(chat(name)) + "\n")
    (tmp_path / "README.md").write_text("# Data")
    for source in (tmp_path, tmp_path / "*.jsonl", tmp_path / "s[12].jsonl"):
        chats = open_mixture([str(source)])
        assert questions(chats) == ["s1", "s2"]
        assert chats.where(1) == f"{tmp_path / 's2.jsonl'}:1"


def test_files_of_several_formats_are_no_source(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(chat("a")) + "\n")
    write_tar(tmp_path / "b.tar", {"0.json": chat("b")})
    with pytest.raises(ValueError, match=r"means files of several formats \(jsonl, tar\)"):
        ChatDataset(tmp_path)


def test_images_are_beside_the_file_of_their_sample(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png())
        (tmp_path / name / "d.jsonl").write_text(json.dumps(chat(name, True, images=["x.png"])) + "\n")
    chats = ChatDataset(f"{tmp_path}/*/d.jsonl")
    assert [chats[index].images for index in (0, 1)] == [[str(tmp_path / name / "x.png")] for name in ("a", "b")]


# WebDataset


def test_tar_samples_are_chats_or_captions(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        {
            "0.jpg": png(), "0.json": chat("chat", True, id=3),
            "1.png": png("blue"), "1.txt": "A blue square.\n", "1.json": {"caption": "A blue square.", "width": 8},
            "d/2.json": chat("text"),
            "3.0.png": png(), "3.1.png": png("blue"), "3.json": chat("<image>two", True),
            "4.jpg": png(), "4.json": chat("named", True, images=["4.jpg"]),
            "__MACOSX/._4": b"", "README": b"none",
        },
    )  # fmt: skip
    chats = open_mixture([str(path)])
    assert question(chats[0]) == "chat" and chats[0].images == [png()]
    assert chats[1].messages == [
        {"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A blue square."}
    ]  # fmt: skip
    assert chats[2].images == [] and chats.where(2) == f"{path}:d/2"
    assert chats[3].images == [png(), png("blue")] and chats[4].images == [png()]
    assert len(chats) == 5 and len(chats.with_images()) == 4


def test_tar_images_are_taken_by_the_parts_that_name_them(tmp_path):
    parts = [{"type": "image", "image": "0.b.png"}, {"type": "image", "image": "0.a.png"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    path = write_tar(tmp_path / "a.tar", {"0.a.png": png(), "0.b.png": png("blue"), "0.json": {"messages": turns}})
    assert ChatDataset(path)[0].images == [png("blue"), png()]


BAD_TARS = {
    "no text": ({"0.png": png()}, "a.tar:0: neither a chat in a .json nor a caption"),
    "sorted by kind": ({"0.png": png(), "1.png": png(), "0.txt": "a", "1.txt": "b"}, "a.tar:0: neither a chat"),
    "pickle": ({"0.txt": "a", "0.pkl": b"x"}, "a.tar:0: the member .'pkl' is not read"),
    "video": ({"0.txt": "a", "0.mp4": b"x"}, "a.tar:0: the member .'mp4' is not read"),
    "one caption more": ({"0.json": chat("a"), "0.txt": "A whole other text."}, "'caption' .* is not read"),
    "no member": ({"0.png": png(), "0.json": chat("a", True, image="b.png")}, "'image' is .*, but the images are"),
    "unnamed image": (
        {"0.a.png": png(), "0.b.png": png(), "0.json": chat("a", True, image="0.a.png")}, "but the images are"
    ),
    "image without placeholder": ({"0.png": png(), "0.json": chat("a")}, "0 placeholders .* for 1 images"),
    "no samples": ({"README": b"x"}, "a.tar has no samples"),
    "twice": ({"0.txt": "a", "./0.txt": "b"}, "appears twice"),
    "no JSON": ({"0.json": "{"}, "a.tar:0: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TARS)
def test_a_bad_tar_sample_is_named_with_file_and_key(name, tmp_path):
    members, message = BAD_TARS[name]
    with pytest.raises(ValueError, match=message):
        ChatDataset(write_tar(tmp_path / "a.tar", members))


@pytest.mark.parametrize("left", [0.3, 0.6, 0.999])
def test_an_incomplete_tar_is_refused(left, tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{number}.txt": 600 * "a" for number in range(20)})
    path.write_bytes(path.read_bytes()[: int(left * 20 * 1536)])
    with pytest.raises(ValueError, match=r"a\.tar .*(complete|broken)"):
        ChatDataset(path, skip_bad=True)


# The Hub


def test_a_data_set_on_the_hub_is_read_by_split(hub, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi(hub.endpoint, token=hub.token)
    api.create_repo("you/chats", repo_type="dataset")
    for split in ("train", "test"):
        path = tmp_path / f"{split}.parquet"
        datasets.Dataset.from_list([chat(f"{split}{number}") for number in range(3)]).to_parquet(path)
        api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id="you/chats", repo_type="dataset")
    chats = open_mixture(["hf:you/chats[test]"])
    assert questions(chats) == ["test0", "test1", "test2"] and chats.where(0) == "hf:you/chats[test], sample 0"
    assert questions(open_mixture(["hf:you/chats[train[1:]]"])) == ["train1", "train2"]
    with pytest.raises(OSError, match=r"hf:you/chats .* several splits: give one, such as hf:you/chats\[train\]"):
        open_mixture(["hf:you/chats"])
    with pytest.raises(OSError, match="hf:you/none cannot be read from the Hub"):
        open_mixture(["hf:you/none"])


CONFIGURATIONS = """---
configs:
- config_name: pages
  data_files: [{split: train, path: pages.jsonl}]
- config_name: charts
  data_files: [{split: train, path: charts.jsonl}]
---
"""


def put_on_hub(hub, repo_id: str, **files: str) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(hub.endpoint, token=hub.token)
    api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
    operations = [CommitOperationAdd(name.replace("_", "."), text.encode()) for name, text in files.items()]
    api.create_commit(repo_id, operations, commit_message="Data", repo_type="dataset")


def test_of_a_data_set_with_several_configurations_one_is_named(hub):
    pages, charts = (json.dumps(chat(name)) + "\n" for name in ("page", "chart"))
    put_on_hub(hub, "you/chats", README_md=CONFIGURATIONS, pages_jsonl=pages, charts_jsonl=charts)
    assert questions(open_mixture(["hf:you/chats/charts@main[train]"])) == ["chart"]
    told = r"several configurations: give one, such as hf:you/chats/pages@main\[train\] \(pages, charts\)\)\.$"
    with pytest.raises(OSError, match=told):
        open_mixture(["hf:you/chats@main[train]"])


def test_without_the_hub_another_revision_in_the_cache_is_refused(hub, request):
    from huggingface_hub import HfApi

    api = HfApi(hub.endpoint, token=hub.token)
    for version in ("old", "new"):
        put_on_hub(hub, "you/chats", chats_jsonl=json.dumps(chat(version)) + "\n")
        api.create_tag("you/chats", tag=version, repo_type="dataset")
        assert questions(open_mixture([f"hf:you/chats@{version}"])) == [version]
    commit = api.dataset_info("you/chats").sha
    request.getfixturevalue("no_network")
    with pytest.raises(OSError, match=rf"cannot be asked for the revision old, and the cache .* has {commit}"):
        open_mixture(["hf:you/chats@old"])
    assert questions(open_mixture([f"hf:you/chats@{commit}"])) == ["new"]


def test_a_data_set_that_is_a_script_is_refused(hub):
    put_on_hub(hub, "you/chats", chats_py="import datasets\n")
    with pytest.raises(OSError, match=r"hf:you/chats cannot be read from the Hub \(Dataset scripts are no longer"):
        open_mixture(["hf:you/chats"])


# When samples are checked


def test_large_data_is_checked_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("genieblue.data.chats.CHECKED_WHEN_OPENED", 2)
    lines = [json.dumps(chat("a")), "{", json.dumps(chat("c"))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    chats = ChatDataset(tmp_path / "a.jsonl", skip_bad=True)
    assert len(chats) == 3 and chats.sha256 is not None and question(chats[2]) == "c"
    assert len(chats.by_kind()[1]) == 2  # which needs a look at every sample


# Image folders


def test_image_roots_are_the_first_part_of_a_path(tmp_path):
    (tmp_path / "elsewhere" / "train").mkdir(parents=True)
    (tmp_path / "elsewhere" / "train" / "a.png").write_bytes(png())
    rows = [chat("a", True, image="coco/train/a.png")]
    roots = {"coco": tmp_path / "elsewhere"}
    assert ChatDataset(rows, image_roots=roots)[0].images == [str(tmp_path / "elsewhere/train/a.png")]
    for name in ("coco/../secret.png", "other/a.png", "coco"):
        with pytest.raises(ValueError, match="outside|set `image_folder`"):
            ChatDataset([chat("a", True, image=name)], image_roots=roots)
    with pytest.raises(OSError, match="image root 'coco', .*none, is not a folder"):
        ChatDataset(rows, image_roots={"coco": tmp_path / "none"})


def test_links_out_of_a_folder_are_followed_only_when_asked(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "a.png")
    rows = [chat("a", True, image="link.png")]
    with pytest.raises(ValueError, match=r"is outside .*--follow-links"):
        ChatDataset(rows, image_folder=tmp_path / "data")
    chats = ChatDataset(rows, image_folder=tmp_path / "data", follow_links=True)
    assert chats[0].images == [str(tmp_path / "data" / "link.png")]
    with pytest.raises(ValueError, match="is outside .* move it inside"):
        ChatDataset([chat("a", True, image="../a.png")], image_folder=tmp_path / "data", follow_links=True)
