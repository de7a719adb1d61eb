"""The file of a lab: what it means, and what is refused before anything is made."""

import dataclasses
from pathlib import Path

import pytest
from tiny_lab import write_lab_values

from genieblue.lab.lab_file import RECORD, read_lab_file, write_lab_file

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_a_written_lab_is_read_back(tmp_path):
    lab = read_lab_file(write_lab_values(tmp_path))
    write_lab_file(tmp_path / "again.yaml", lab)
    assert read_lab_file(tmp_path / "again.yaml") == lab


def test_a_list_of_structures_takes_the_seeds_of_all(tmp_path):
    lab = read_lab_file(write_lab_values(tmp_path, structures=["full", "lora"], seeds=3))
    assert lab.structures == {"full": 3, "lora": 3}


def test_a_quick_lab_has_one_seed_and_less_of_everything(tmp_path):
    changes = {"held_out": 100, "vision": "small", "vision_steps": 80, "training": {"steps": 800}}
    lab = read_lab_file(write_lab_values(tmp_path, **changes))
    quick = lab.quick()
    assert set(quick.structures.values()) == {1} and quick.structures.keys() == lab.structures.keys()
    assert (quick.steps, quick.vision_steps, quick.held_out) == (100, 10, 25)


def test_where_files_are_does_not_decide_a_result_but_what_is_in_them_does(tmp_path):
    here, there = (read_lab_file(write_lab_values(tmp_path / name)) for name in ("here", "there"))
    assert here.texts != there.texts and here.decisive() == there.decisive()
    (tmp_path / "there" / "texts.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert here.decisive() != there.decisive()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structures": ["moe"]}, "Unknown structure 'moe': choose from full, lora, cogvlm-post"),
        ({"structures": ["genieblue-middle"]}, "Unknown structure 'genieblue-middle'"),
        ({"tasks": ["dancing"]}, "Unknown task 'dancing': choose from digits"),
        ({"tasks": {"mine": {"train": "a.jsonl"}}}, "expected {train: FILE, eval: FILE}"),
        ({"held_out": 100, "standard_error": 2}, "standard error of up to 5.0 points; for 2 .* takes 625"),
        ({"held_out": 0}, "`held_out` is 0: expected at least 1"),
        ({"data": {"mixed": 1.0}}, "share of texts in 'mixed' is 1.0"),
        ({"texts": [], "data": {"mixed": 0.2}}, "`texts` names none"),
        ({"training": {"batch_size": 2}}, "`training` needs `steps`"),
        ({"training": {"steps": 2, "stepz": 3}}, "Did you mean `steps`"),
        ({"training": {"steps": 2, "seed": 3}}, "`seed` is no setting of a lab"),
        ({"text_tasks": {"fact": 3}}, "Did you mean `facts`"),
        ({"text_tasks": {"facts": -3}}, "`facts` is -3"),
        ({"dtype": "float16"}, "expected float32 or bfloat16"),
        ({"structure": ["full"]}, "Did you mean `structures`"),
        ({"structures": {"full": 0}}, "'full' has 0 seeds: expected at least 1"),
        ({"structures": ["full"], "seeds": 0}, "'full' has 0 seeds: expected at least 1"),
        ({"structures": ["full"], "seeds": "two"}, "`seeds` is 'two', expected a whole number"),
        ({"structures": {"full": 1}, "seeds": 2}, "`seeds` is for a list of structures"),
        ({"structures": ["full", "full"]}, "`structures` has a name twice: full, full"),
        ({"structures": "full"}, "`structures` is 'full', expected lines like"),
        ({"data": ["mixed"]}, "`data` is .'mixed'., expected lines like"),
        ({"data": {"../x": 0}}, "'../x' cannot be the name of a folder"),
        ({"tasks": {"a/b": {"train": "a", "eval": "b"}}}, "'a/b' cannot be the name of a folder"),
        ({"tasks": {"mine": {"train": "a", "eval": ["b"]}}}, "expected {train: FILE, eval: FILE}"),
        ({"standard_error": 0}, "`standard_error` is 0.0: expected points above 0"),
        ({"standard_error": float("nan")}, "`standard_error` is nan"),
        ({"training": {"steps": None}}, "`training` needs `steps`"),
        ({"training": {"steps": 2, "learning_rates": {"loraa": 1e-3}}}, "has 'loraa': expected parts, language_model"),
        ({"training": {"steps": 2, "patience": 1}}, "`patience` is no setting of a lab"),
        ({"training": {"steps": 2, "pack": True}}, "`pack` is no setting of a lab"),
        ({"reading_steps": 0}, "`reading_steps` is 0: expected at least 1"),
        ({"training": {"steps": 2, "max_tiles": 4}}, "`max_tiles` is no setting of a lab"),
        ({"max_tiles": 5}, "expected a square number"),
        ({"projector_steps": -1}, "`projector_steps` is -1"),
        ({"base": ""}, "`base` is empty"),
        ({"text_tasks": {"mt_bench_tokens": 0}}, "`mt_bench_tokens` is 0: expected 1 or more"),
        ({"vision_steps": 50}, r"`vision_steps` is of the tower that the lab trains \(`vision: small`\)"),
        ({"reading_steps": 4000}, "`reading_steps` is of the tower that the lab trains"),
        ({"data": {"images": 0}}, "`texts` are named, but no data has a share of them"),
        ({"text_tasks": {"gsm8k_questions": 9}}, "`gsm8k_questions` is 9, but `gsm8k` names no file"),
        ({"text_tasks": {"mt_bench_tokens": 9}}, "`mt_bench_tokens` is 9, but `mt_bench` names no file"),
        ({"structures": None}, r"a lab needs `structures`: add it, such as `structures: \[full, lora\]`"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_lab_file(write_lab_values(tmp_path, **changes))


@pytest.mark.parametrize(
    ("lines", "name"),
    [("held_out: 9\n", "held_out"), ("data: {mixed: 0.1, mixed: 0.2}\n", "mixed"), ("tasks: {a: , a: }\n", "a")],
)
def test_a_name_that_is_there_twice_is_refused(tmp_path, lines, name):
    path = write_lab_values(tmp_path)
    path.write_text("held_out: 4\n" + lines)
    with pytest.raises(ValueError, match=f"lab.yaml: `{name}` is twice in what begins in line"):
        read_lab_file(path)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- base\n- tasks\n", "base"])
def test_a_file_without_settings_is_refused(tmp_path, text):
    (tmp_path / "lab.yaml").write_text(text)
    with pytest.raises(ValueError, match="lab.yaml holds no settings: expected lines like `base: smollm2`"):
        read_lab_file(tmp_path / "lab.yaml")


def test_the_record_in_a_folder_may_have_settings_without_effect(tmp_path):
    lab = dataclasses.replace(read_lab_file(write_lab_values(tmp_path)), vision_steps=125)
    write_lab_file(tmp_path / "again.yaml", lab)
    with pytest.raises(ValueError, match="`vision_steps` is of the tower"):
        read_lab_file(tmp_path / "again.yaml")
    (tmp_path / RECORD).write_text("{}")
    assert read_lab_file(tmp_path / "again.yaml") == lab


def test_a_file_that_is_not_there_is_named(tmp_path):
    lab = read_lab_file(write_lab_values(tmp_path, texts=["gone.jsonl"]))
    with pytest.raises(OSError, match=r"gone.jsonl is not a file"):
        lab.decisive()


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("lab_*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_a_lab_with_all_structures_of_the_paper(example):
    assert {placement.partition("-")[0] for placement in read_lab_file(example).structures} == {
        "full", "lora", "cogvlm", "genieblue"
    }  # fmt: skip
